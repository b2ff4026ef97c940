"""lowbit advise: which measured version of a model to take, and why not the others."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowbit.cli.options import Json, Model, StoreFolder, emit, quiet, say

if TYPE_CHECKING:
    from lowbit.study.advise import Advice, Option


def advise(
    model: Model,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Such as 6GiB.")] = None,
    max_loss: Annotated[
        str | None, typer.Option("--max-loss", metavar="PERCENT", help="Of perplexity, shown: 1%.")
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
    """Choose among the versions that a study or `lowbit compare` has scored; runs nothing."""
    quiet()
    from lowbit import digest
    from lowbit.models.resolve import open_model
    from lowbit.pipeline.allocate import size as parse_size
    from lowbit.study import advise as advice
    from lowbit.study import fit
    from lowbit.study.store import Store

    source = open_model(model, say)
    shape = fit.shape_of(source.config)
    kv = shape.kv_bytes(context)
    overhead = kv + shape.activation_bytes(1) + (0 if reserve is None else parse_size(reserve))
    folder = store or digest.cache_folder() / "compare"
    with Store(folder, create=False) as held:
        name = study or _study(held, source.digest, model)
        options = advice.table(held, name, source.digest, overhead=overhead)
    if bandwidth is not None:
        options = _with_rates(options, kv, float(parse_size(bandwidth.removesuffix("/s"))))
    limit = None if memory is None else parse_size(memory)
    if limit is not None and unified:
        limit = fit.Device(limit, unified=True).usable
    constraint = advice.Constraint(limit, None if max_loss is None else _share(max_loss), min_rate)
    found = advice.advise(options, constraint, None if prefer == "auto" else prefer)
    if as_json:
        emit({**asdict(found), "command": _command(model, found), "study": name, "loads": _loads(found)})
    else:
        _show(model, found, len(options), name)
    if found.choice is None:
        raise typer.Exit(1)


def _study(store: Any, model_digest: str, model: str) -> str:
    """The only study of a store that scored this model."""
    from lowbit.errors import StudyError

    names = [
        name
        for name in store.studies()
        if any(cell.params.get("model_digest") == model_digest for _, cell in store.cells(name))
    ]
    if len(names) != 1:
        raise StudyError(
            f"{len(names)} studies scored this model" + (f": {', '.join(names)}" if names else ""),
            where=f"{store.root}, {model}",
            fix="--study NAME" if names else "lowbit compare MODEL OUT..., or lowbit study run and --store",
        )
    return str(names[0])


def _share(text: str) -> float:
    from lowbit.errors import RecipeError

    try:
        value = float(text.removesuffix("%").strip()) / 100
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise RecipeError(f"no loss {text!r}", where="--max-loss", fix="percent of perplexity above 0, such as 1%")
    return value


def _with_rates(options: list[Option], kv: int, bandwidth: float) -> list[Option]:
    from dataclasses import replace

    from lowbit.study.fit import decode_rate

    return [replace(o, rate=decode_rate(o.nbytes, kv, bandwidth).middle) for o in options]


def _command(model: str, found: Advice) -> str | None:
    """The command that makes the choice; None where a line cannot say how it was made."""
    from pathlib import Path

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
    from pathlib import Path

    from lowbit.io import native
    from lowbit.io.loadable import loadable

    if found.choice is None or not found.choice.path or not native.is_native(Path(found.choice.path)):
        return {}
    verdicts = loadable(Path(found.choice.path))
    return {layout: sorted({v.engine for v in answers if v.answer == "yes"}) for layout, answers in verdicts.items()}


def _show(model: str, found: Advice, versions: int, study: str) -> None:
    from lowbit.cli.columns import print_columns
    from lowbit.report.text import MISSING, size

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
        ["version", "memory", "Δ perplexity", "tokens/s", "front", "why not"],
        [
            [
                o.label, size(o.need), o.percent, MISSING if o.rate is None else f"{o.rate:.1f}",
                "yes" if o.label in front else "", why.get(o.label, "taken"),
            ]
            for o in sorted(shown, key=lambda o: o.need)
        ],
        ["version", "why not"],
    )  # fmt: skip
