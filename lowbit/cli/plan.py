"""lowbit plan: bytes, bits, memory and minutes of a recipe, before any work."""

from __future__ import annotations

from dataclasses import asdict

from lowbit.cli.options import Dtype, Json, Model, RecipeLine, emit, quiet, say, size


def plan(model: Model, recipe: RecipeLine, dtype: Dtype = "auto", as_json: Json = False) -> None:
    """Bytes, bits per weight, peak memory, minutes per stage and coverage of a recipe; loads no weights."""
    from lowbit.models.resolve import open_model
    from lowbit.pipeline.plan import Rates
    from lowbit.pipeline.plan import plan as price
    from lowbit.pipeline.recipe import parse
    from lowbit.study.stages import torch_dtype

    quiet()
    parsed = parse(recipe)
    found = price(open_model(model, say), parsed, Rates.measure(), torch_dtype(dtype))
    if as_json:
        emit({**asdict(found), "bytes_total": found.bytes_total, "seconds": found.seconds, "peak": found.peak})
        return
    share = 100 * found.quantized / found.parameters
    print(f"{parsed.line} on {model}")
    print(f"  size        {size(found.bytes_total)} ({size(found.bytes_quantized)} low-bit + {size(found.bytes_kept)} "
          f"in 16 bit), {100 * found.bytes_total / found.bytes_source_16bit:.1f} % of 16 bit")  # fmt: skip
    print(f"  bits/weight {found.bits_per_weight:.4f} over the quantized linears, scales and zeros included")
    print(f"  coverage    {found.sites} linears, {share:.1f} % of {found.parameters:,} parameters")
    for kept in found.kept[:8]:
        print(f"              kept {kept.name} ({kept.parameters:,}): {kept.why}")
    if len(found.kept) > 8:
        print(f"              ... and {len(found.kept) - 8} more")
    print(f"  memory      {size(found.peak)} at peak")
    print(f"  time        about {found.seconds / 60:.1f} min on this machine")
    for stage in found.stages:
        print(f"              {stage.name:<16}{stage.seconds:8.1f} s   {size(stage.memory)}")
