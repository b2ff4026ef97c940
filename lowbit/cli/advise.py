"""lowbit advise: which measured version of a model to take, and why not the others."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowbit.cli.options import Jobs, Json, Model, StoreFolder, emit, quiet, say

if TYPE_CHECKING:
    from lowbit.study.advise import Advice, Option


def advise(
    model: Model,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Such as 6GiB.")] = None,
    max_loss: Annotated[
        str | None, typer.Option("--max-loss", metavar="PERCENT", help="Of perplexity (or score), shown: 1%.")
    ] = None,
    min_rate: Annotated[
        float | None, typer.Option("--min-rate", metavar="N", min=0.0, help="Tokens a second, decoding.")
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens of keys and values that memory holds, 16 bit.")] = 0,
    reserve: Annotated[str | None, typer.Option(metavar="SIZE", help="Of the runtime itself, beside all that.")] = None,
    unified: Annotated[
        bool, typer.Option("--unified", help="One memory for processor and accelerator: three quarters of it count.")
    ] = False,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE/s", help="Of that memory (800GB/s); predicts tokens a second.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="Its memory and bandwidth: h200, rtx-4090, ...; this: measured."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="LIST", help="Judge by answers to tasks or families, not by perplexity."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Make recipes that fit, screen them on few items, confirm on many.")
    ] = False,
    recipes: Annotated[
        str | None,
        typer.Option("--recipes", metavar="A;B;...", help="That --search tries; default: a ladder of widths."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="The folder below which the tasks' files lie.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="The first N records of each task.")] = None,
    few: Annotated[int, typer.Option("--few", min=50, help="Items that screening asks of each version.")] = 100,
    many: Annotated[int, typer.Option("--many", min=50, help="Items that confirm those left.")] = 1000,
    jobs: Jobs = 1,
    prefer: Annotated[
        Literal["auto", "quality", "size", "speed"],
        typer.Option(help="What decides among versions that meet it; auto: quality, or size for --max-loss alone."),
    ] = "auto",
    store: StoreFolder = None,
    study: Annotated[
        str | None, typer.Option("--study", metavar="NAME", help="Default: the one that scored this model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose among the versions that a study or `lowbit compare` has scored; runs nothing without --search."""
    quiet()
    from lowbit import digest
    from lowbit.models.resolve import open_model
    from lowbit.pipeline.allocate import size as parse_size
    from lowbit.study import advise as advice
    from lowbit.study import advise_tasks, fit
    from lowbit.study.store import Store

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    _require_tasks(names, search=search, recipes=recipes, study=study)
    room, per_second = _device(device, memory, bandwidth, unified)
    source = open_model(model, say)
    shape = fit.shape_of(source.config)
    kv = shape.kv_bytes(context)
    overhead = kv + shape.activation_bytes(1) + (0 if reserve is None else parse_size(reserve))
    folder = store or digest.cache_folder() / "compare"
    speed = None if per_second is None else partial(_rate, kv, per_second)
    constraint = advice.Constraint(room, None if max_loss is None else _share(max_loss), min_rate)
    wanted = None if prefer == "auto" else prefer
    if search:
        from lowbit.cli.advise_search import asked, search_recipes

        name = "advise"
        settings = asked(model, recipes, names, data, limit)
        found = search_recipes(
            folder, name, settings, source, constraint, few, many, jobs,
            overhead=overhead, rate=speed, prefer=wanted,
        )  # fmt: skip
    else:
        with Store(folder, create=False) as held:
            name = study or _study(held, source.digest, model, "task" if names else "reference")
            if names:
                options = advise_tasks.table(held, name, source.digest, names, overhead=overhead)
            else:
                options = advice.table(held, name, source.digest, overhead=overhead)
        if speed is not None:
            options = [replace(o, rate=speed(o.nbytes)) for o in options]
        found = advice.advise(options, constraint, wanted)
    if as_json:
        emit({**_to_json(found), "command": _command(model, found), "study": name, "loads": _loads(found)})
    else:
        _show(model, found, name)
    if found.choice is None:
        raise typer.Exit(1)


def _require_tasks(names: list[str], *, search: bool, recipes: str | None, study: str | None) -> None:
    from lowbit.errors import RecipeError

    if search and not names:
        raise RecipeError("a search asks tasks", where="--search", fix="--tasks hellaswag,arc_easy --data FOLDER")
    if search and study is not None:
        raise RecipeError("a search makes a study of its own", where="--study", fix="--search without it")
    if recipes is not None and not search:
        raise RecipeError("nothing is made without --search", where="--recipes", fix="--search beside it")


def _device(
    name: str | None, memory: str | None, bandwidth: str | None, unified: bool
) -> tuple[int | None, float | None]:
    """Bytes that may be used and bytes a second, of ``--device`` unless said beside it; None where unknown."""
    from lowbit.pipeline.allocate import size
    from lowbit.study import devices
    from lowbit.study.fit import Device

    known = None if name is None else devices.named(name)
    rate = float(size(bandwidth.removesuffix("/s"))) if bandwidth else known.bandwidth if known else None
    room = size(memory) if memory else known.memory if known else None
    shared = unified or (known is not None and known.unified)
    return None if room is None else Device(room, rate, shared).usable, rate


def _rate(kv: int, bandwidth: float, nbytes: int) -> float:
    from lowbit.study.fit import decode_rate

    return decode_rate(nbytes, kv, bandwidth).middle


def _study(store: Any, model_digest: str, model: str, stage: str) -> str:
    """The only study of a store that scored this model, or asked it tasks."""
    from lowbit.errors import StudyError

    names = [
        name for name in store.studies() if _measured([cell for _, cell in store.cells(name)], model_digest, stage)
    ]
    if len(names) != 1:
        raise StudyError(
            f"{len(names)} studies {'asked this model tasks' if stage == 'task' else 'scored this model'}"
            + (f": {', '.join(names)}" if names else ""),
            where=f"{store.root}, {model}",
            fix="--study NAME" if names else "lowbit compare MODEL OUT..., or lowbit study run and --store",
        )
    return str(names[0])


def _measured(cells: list[Any], model_digest: str, stage: str) -> bool:
    """Whether a study has scored this model, or put whole tasks to it and to a version of it."""
    whole = [cell for cell in cells if cell.stage == stage and "only" not in cell.params]
    if stage != "task":
        return any(cell.params.get("model_digest") == model_digest for cell in whole)
    own = {cell.key for cell in whole if not cell.inputs and cell.params.get("digest") == model_digest}
    return any(cell.inputs and cell.inputs[0] in own and cell.params.get("digest") != model_digest for cell in whole)


def _share(text: str) -> float:
    from lowbit.errors import RecipeError

    try:
        value = float(text.removesuffix("%").strip()) / 100
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise RecipeError(f"no loss {text!r}", where="--max-loss", fix="percent of perplexity above 0, such as 1%")
    return value


def _to_json(found: Advice) -> dict[str, Any]:
    def told(option: Option | None) -> dict[str, Any] | None:
        return None if option is None else {**asdict(option), "loss": option.loss._asdict(), "percent": option.percent}

    return {
        "choice": told(found.choice), "reason": found.reason, "front": [told(o) for o in found.front],
        "ruled_out": [{"option": told(r.option), "why": r.why} for r in found.ruled_out],
    }  # fmt: skip


def _command(model: str, found: Advice) -> str | None:
    """The command that makes the choice; None where a line cannot say how it was made."""
    from lowbit.io import native
    from lowbit.study.advise import ORIGINAL

    choice = found.choice
    if choice is None or choice.label == ORIGINAL or choice.recipe == "dense":
        return None
    if choice.path and native.is_native(Path(choice.path)):
        recipe = native.verify(Path(choice.path), contents=False)["recipe"]
        if recipe["override"]:
            return None
    return shlex.join(["lowbit", "quantize", model, choice.recipe, "-o", "OUT"])


def _loads(found: Advice) -> dict[str, list[str]]:
    """By layout that holds the choice exactly, the engines that load it with their fast kernels."""
    from lowbit.io import native
    from lowbit.io.loadable import loadable

    if found.choice is None or not found.choice.path or not native.is_native(Path(found.choice.path)):
        return {}
    verdicts = loadable(Path(found.choice.path))
    return {layout: sorted({v.engine for v in answers if v.answer == "yes"}) for layout, answers in verdicts.items()}


_HEADINGS = {"perplexity": "Δ perplexity", "score": "score lost"}


def _show(model: str, found: Advice, study: str) -> None:
    from lowbit.cli.columns import print_columns
    from lowbit.report.text import MISSING, size

    versions = len(found.ruled_out) + (found.choice is not None)
    print(f"{model}: {versions} versions in study {study!r}")
    if found.choice is None:
        print(f"none: {found.reason}")
    else:
        print(f"take {found.choice.label}: {found.reason}")
        if (command := _command(model, found)) is not None:
            print(f"  {command}")
        if found.choice.path:
            print(f"  it lies in {found.choice.path}")
        for layout, engines in _loads(found).items():
            print(f"  exported to {layout} it loads in {', '.join(engines) or 'no engine that is known'}")
    why = {ruled.option.label: ruled.why for ruled in found.ruled_out}
    front = {option.label for option in found.front}
    shown = [r.option for r in found.ruled_out] + ([] if found.choice is None else [found.choice])
    print()
    print_columns(
        ["version", "memory", _HEADINGS[shown[0].measure], "tokens/s", "front", "why not"],
        [
            [
                o.label, size(o.need), o.percent, MISSING if o.rate is None else f"{o.rate:.1f}",
                "yes" if o.label in front else "", why.get(o.label, "taken"),
            ]
            for o in sorted(shown, key=lambda o: o.need)
        ],
        ["version", "why not"],
    )  # fmt: skip
