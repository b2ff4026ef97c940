"""lowbit quantize: a model and a recipe in, a native checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import Device, Dtype, Json, Length, Model, RecipeLine, Samples, Seed, Text, emit, quiet, say
from lowbit.cli.sensitivity import Formats


def quantize(
    model: Model,
    recipe: RecipeLine,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Directory of the result.")],
    budget: Annotated[
        str | None,
        typer.Option("--bytes", metavar="SIZE", help="Choose every linear's format so that all fits: 90MB, 1.5GiB."),
    ] = None,
    formats: Formats = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option("--sensitivity", metavar="FILE", help="From lowbit sensitivity; else it is measured."),
    ] = None,
    card: Annotated[
        Path | None, typer.Option("--card", metavar="FILE", help="From lowbit card, instead of calibration text.")
    ] = None,
    text: Text = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Quantize a model block by block. Killed at any moment, the same command goes on where it was."""
    quiet()
    from lowbit.cli.progress import Bars
    from lowbit.cli.sensitivity import coded, spend, told
    from lowbit.errors import RecipeError
    from lowbit.models.resolve import open_model
    from lowbit.pipeline.allocate import size as parse_size
    from lowbit.pipeline.recipe import parse, with_calibration
    from lowbit.report.text import duration, size
    from lowbit.study.stages import make, torch_dtype

    if budget is None and (formats is not None or sensitivity is not None):
        raise RecipeError("--formats and --sensitivity serve a budget", fix="--bytes 90MB beside them")
    line = coded(recipe, "int4-g64") if budget is not None else recipe
    parsed = with_calibration(parse(line), text=text, samples=samples, length=length, seed=seed)
    source, chosen = open_model(model, say), torch_dtype(dtype)
    if budget is not None:
        spent = spend(source, parsed, parse_size(budget), formats, sensitivity, chosen)
        parsed = spent.recipe
        for told_line in told(spent):
            say(told_line)
    with Bars() as bars:
        found = make(
            source, parsed, out, chosen, lambda d, t, u: bars.update(parsed.line, d, t, u), card=card, device=device,
            say=say,
        )  # fmt: skip
    if as_json:
        emit({"out": str(out), **found})
        return
    print(f"{out}: {size(found['bytes_total'])}, " + (
        f"{found['bits_per_weight']:.4f} bits a weight over {found['sites']} linears of {parsed.line}"
        if found["sites"] else f"no linear has codes after {parsed.line}"
    ))  # fmt: skip
    for note, count in found["notes"].items():
        print(f"  {count} linears: {note}")
    if found["already_done"]:
        print("It was there already, complete; nothing was done.")
    else:
        since = " since it was resumed" if found["resumed"] else ""
        print(f"Made in {duration(found['seconds'])}{since} ({duration(found['cpu_seconds'])} of processor time).")
    print(f"Next: lowbit compare {model} {out}")
