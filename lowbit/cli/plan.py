"""lowbit plan: bytes, bits, memory and minutes of a recipe, before any work; of a checkpoint, how it will run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lowbit.cli.options import Dtype, Json, Length, Model, Samples, emit, quiet, say

_KEPT = 8  # kept matrices that are listed


def plan(
    model: Model,
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="METHOD:FORMAT[,OPTION=VALUE...]; without one, MODEL is a checkpoint."),
    ] = None,
    samples: Samples = None,
    length: Length = None,
    dtype: Dtype = "auto",
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Of a checkpoint: what it may hold, Python included (512MiB)."),
    ] = None,
    disk: Annotated[
        str | None, typer.Option("--disk", metavar="RATE", help="Of a checkpoint: 1.4GB/s; measured when not given.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Of a checkpoint: the longest text.")] = 1024,
    as_json: Json = False,
) -> None:
    """Bytes, bits per weight, peak memory, minutes per stage and coverage of a recipe; loads no weights.

    Of a native checkpoint, without a recipe: seconds a token and load time within a memory, streamed from disk.
    """
    quiet()
    if recipe is None:
        from lowbit.cli.plan_memory import plan_memory

        plan_memory(model, memory, disk, tokens, dtype, as_json)
        return
    if memory is not None or disk is not None:
        raise typer.BadParameter("--memory and --disk are of a checkpoint, without a recipe")
    from lowbit.models.resolve import open_model
    from lowbit.pipeline.plan import Rates
    from lowbit.pipeline.plan import plan as price
    from lowbit.pipeline.recipe import parse, with_calibration
    from lowbit.report.text import size
    from lowbit.study.stages import torch_dtype

    parsed = with_calibration(parse(recipe), samples=samples, length=length)
    found = price(open_model(model, say), parsed, Rates.measure(), torch_dtype(dtype))
    if as_json:
        emit({**asdict(found), "bytes_total": found.bytes_total, "seconds": found.seconds, "peak": found.peak})
        return
    share = f"{100 * found.quantized / found.parameters:.1f} % of {found.parameters:,} parameters"
    dense = found.bytes_source_16bit
    of_16bit = f"{100 * found.bytes_total / dense:.1f} % of {size(dense)} in 16 bit"
    kept = [f"kept {kept.name} ({kept.parameters:,}): {kept.why}" for kept in found.kept]
    c = parsed.calibration
    rows = [
        ("size", f"{size(found.bytes_total)}, {of_16bit}"),
        ("", f"{size(found.bytes_quantized)} low-bit, {size(found.bytes_kept)} kept in 16 bit"),
        ("bits/weight", f"{found.bits_per_weight:.4f} over the quantized linears, scales and zeros included"),
        ("coverage", f"{found.sites} linears, {share}"),
        *(("", line) for line in kept[:_KEPT]),
        *([("", f"... and {len(kept) - _KEPT} more")] if kept[_KEPT:] else []),
        ("calibration", f"{c.samples} windows of {c.length} tokens" if parsed.calibrated else "none needed"),
        ("memory", f"{size(found.peak)} at peak, Python and its libraries included" + _mapped(found.mapped)),
        ("time", f"{_about(found.seconds)} on this machine, when it is idle"),
        *(("", f"{s.name:<16}{_about(s.seconds):<12}{size(s.memory):>10}") for s in found.stages),
    ]
    print(f"{parsed.line} on {model}")
    for name, value in rows:
        print(f"  {name:<14}{value}".rstrip())


def _mapped(nbytes: int) -> str:
    from lowbit.report.text import size

    return f", {size(nbytes)} of it pages of the model's files, which the system takes back" if nbytes else ""


def _about(seconds: float) -> str:
    """An estimate, to no more digits than it is good for."""
    from lowbit.report.text import duration

    return "under 1 s" if seconds < 1 else f"about {seconds:.0f} s" if seconds < 120 else f"about {duration(seconds)}"
