"""lowbit sensitivity: what every linear would cost in every format. And spending a budget of bytes by it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import Dtype, Json, Length, Model, Samples, Seed, Text, emit, quiet, say

if TYPE_CHECKING:
    import torch

    from lowbit.models.source import Source
    from lowbit.pipeline.allocate import Allocation
    from lowbit.pipeline.recipe import Recipe, Step
    from lowbit.pipeline.sensitivity import Sensitivity

Formats = Annotated[
    str | None,
    typer.Option("--formats", metavar="A,B,...", help="Formats to choose from; by default integers of 2 to 8 bits."),
]


def sensitivity(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The sensitivity as JSON.")],
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="RECIPE", help="Whose encoder chooses the codes: METHOD[,OPTION=VALUE].")
    ] = "gptq",
    formats: Formats = None,
    text: Text = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write an HTML page here.")] = None,
    as_json: Json = False,
) -> None:
    """Predict the KL that each linear costs in each format, from one backward pass. Loads a block at a time."""
    quiet()
    from lowbit.io.storage import NOTHING_LEFT, storage, write_json
    from lowbit.models.resolve import open_model
    from lowbit.pipeline.recipe import parse, with_calibration
    from lowbit.study.stages import torch_dtype

    names = _named(formats)
    parsed = with_calibration(parse(coded(recipe, names[0])), text=text, samples=samples, length=length, seed=seed)
    found = measured(open_model(model, say), parsed, names, torch_dtype(dtype))
    with storage(out, NOTHING_LEFT):
        write_json(out, found.model_dump(mode="json"))
    if report is not None:
        from lowbit.report import sensitivity_chart

        sensitivity_chart.write(found.model_dump(mode="json"), report)
    if as_json:
        emit(found.model_dump(mode="json"))
        return
    from lowbit.cli.columns import print_columns
    from lowbit.report.sensitivity_chart import by_kind
    from lowbit.report.text import number

    kinds = by_kind(found.model_dump(mode="json"))
    print_columns(["kind", *names], [[kind, *map(number, losses.values())] for kind, losses in kinds.items()], ["kind"])
    print(f"\nPredicted KL (nat a token), summed over blocks. Next: lowbit quantize {model} {recipe} --bytes SIZE "
          f"--sensitivity {out} -o OUT")  # fmt: skip


def spend(
    source: Source, recipe: Recipe, budget: int, formats: str | None, file: Path | None, dtype: torch.dtype
) -> Allocation:
    """The recipe with a format for every linear, so that the checkpoint has at most ``budget`` bytes.

    By the sensitivity of ``file``, or else by one that is measured, and remembered in the cache folder. Raises what
    ``allocate`` and ``measure`` raise, and RecipeError for ``formats`` beside a file.
    """
    from lowbit.errors import RecipeError
    from lowbit.pipeline.allocate import allocate
    from lowbit.pipeline.rates import FORMATS as RATES
    from lowbit.pipeline.rates import measurable, share, waits_for_budget
    from lowbit.pipeline.sensitivity import read

    if file is not None and formats is not None:
        raise RecipeError("the formats are those of the sensitivity", where=str(file), fix="leave --formats out")
    rates = waits_for_budget(recipe)
    if rates and formats is not None:
        raise RecipeError("ec takes any rate, there is nothing to choose from", where="--formats", fix="leave it out")
    names = list(RATES) if rates else _named(formats)
    found = measured(source, measurable(recipe), names, dtype) if file is None else read(file)
    return (share if rates else allocate)(source, recipe, found, budget)


def told(spent: Allocation) -> list[str]:
    """What became of a budget, in words."""
    from lowbit.report.text import number, size

    lines = [
        f"Budget {size(spent.budget)}: at most {size(spent.nbytes)} by {_choices(spent)}; "
        f"predicted KL {number(spent.loss)} nat a token"
    ]
    if spent.largest:
        lines.append(f"More bytes would change nothing: {size(spent.budget - spent.nbytes)} are left over.")
    if spent.gap > 0:
        lines.append(f"The choice is within {number(spent.gap)} of the best that exists.")
    return lines


def _choices(spent: Allocation) -> str:
    """How many linears have which format; rates, which all differ, by their range."""
    from lowbit.formats.ec import Entropy
    from lowbit.formats.presets import preset

    rates = [fmt.bits for name in spent.formats.values() if isinstance(fmt := preset(name), Entropy) and fmt.bits]
    if rates:
        return f"{len(rates)} linears at {min(rates):.2f} to {max(rates):.2f} bits a weight"
    return ", ".join(f"{n} linears in {fmt}" for fmt, n in sorted(Counter(spent.formats.values()).items()))


def coded(line: str, fmt: str) -> str:
    """A recipe's line in which the encoder has a format, whatever it is: ``gptq,damp=0.02`` becomes ``gptq:...``."""
    if line.endswith(".toml") or ":" in line:
        return line
    steps, _, last = line.rpartition("+")
    name, comma, options = last.partition(",")
    return f"{steps}{'+' if steps else ''}{name}:{fmt}{comma}{options}"


def measured(source: Source, recipe: Recipe, formats: list[str], dtype: torch.dtype) -> Sensitivity:
    """The sensitivity for a recipe's encoder and calibration text, measured once and then read from the cache."""
    from lowbit import digest
    from lowbit.calibration.synthetic import calibration_tokens
    from lowbit.cli.progress import Bars
    from lowbit.io.storage import NOTHING_LEFT, storage, write_json
    from lowbit.pipeline.sensitivity import measure, read

    c = recipe.calibration
    tokens = calibration_tokens(source, c.text, samples=c.samples, length=c.length, seed=c.seed, dtype=dtype)
    encoder, options = _encoder(recipe.step[-1])
    work: list[Any] = [2, source.digest, tokens.digest, formats, encoder, options, str(dtype)]
    memo = digest.cache_folder() / "sensitivity" / f"{digest.of_value(work)}.json"
    if memo.exists():
        return read(memo)
    with Bars() as bars:
        found = measure(
            source, tokens, formats, dtype=dtype, encoder=encoder, options=options,
            on_block=lambda done, total: bars.update("sensitivity", done, total, "steps"),
        )  # fmt: skip
    with storage(memo, NOTHING_LEFT):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, found.model_dump(mode="json"))
    return found


def _encoder(step: Step) -> tuple[str, dict[str, Any]]:
    """The encoder whose errors are measured; GPTQ stands for methods that work on whole blocks."""
    from lowbit.methods.base import kind

    return (step.method, dict(step.options)) if kind(step.method) == "encoder" else ("gptq", {})


def _named(formats: str | None) -> list[str]:
    from lowbit.pipeline.sensitivity import FORMATS

    return list(FORMATS) if formats is None else formats.split(",")
