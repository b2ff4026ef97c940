"""lowbit quantize: a model and a recipe in, a native checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import Dtype, Json, Length, Model, RecipeLine, Samples, Seed, Text, emit, quiet, say


def quantize(
    model: Model,
    recipe: RecipeLine,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Directory of the result.")],
    text: Text = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Quantize a model block by block. Killed at any moment, the same command goes on where it was."""
    quiet()
    from lowbit.cli.progress import Bars
    from lowbit.models.resolve import open_model
    from lowbit.pipeline.recipe import parse, with_calibration
    from lowbit.report.text import duration, size
    from lowbit.study.stages import make, torch_dtype

    parsed = with_calibration(parse(recipe), text=text, samples=samples, length=length, seed=seed)
    source = open_model(model, say)
    with Bars() as bars:
        found = make(source, parsed, out, torch_dtype(dtype), lambda d, t, u: bars.update(parsed.line, d, t, u))
    if as_json:
        emit({"out": str(out), **found})
        return
    print(f"{out}: {size(found['bytes_total'])}, {found['bits_per_weight']:.4f} bits a weight over {found['sites']} "
          f"linears of {parsed.line}")  # fmt: skip
    if found["already_done"]:
        print("It was there already, complete; nothing was done.")
    else:
        since = " since it was resumed" if found["resumed"] else ""
        print(f"Made in {duration(found['seconds'])}{since} ({duration(found['cpu_seconds'])} of processor time).")
    print(f"Next: lowbit compare {model} {out}")
