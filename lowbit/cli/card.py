"""lowbit card: statistics of a model's inputs in one file, to calibrate from later without any text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import Device, Dtype, Json, Length, Model, Samples, Seed, Text, emit, quiet, say


def card(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The card, a safetensors file.")],
    gram: Annotated[bool, typer.Option("--gram", help="Gram matrices too, for gptq and the like; large.")] = False,
    text: Text = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Run calibration text through a model once and keep what methods need to know of it."""
    quiet()
    from lowbit.calibration import cards
    from lowbit.calibration.stats import Gram
    from lowbit.calibration.synthetic import calibration_tokens
    from lowbit.cli.progress import Bars
    from lowbit.models.resolve import open_model
    from lowbit.pipeline.recipe import Calibration
    from lowbit.report.text import size
    from lowbit.study.stages import torch_dtype

    given = {"text": text, "samples": samples, "length": length, "seed": seed}
    c = Calibration(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    source = open_model(model, say)
    chosen = torch_dtype(dtype)
    with Bars() as bars:
        tokens = calibration_tokens(
            source, c.text, samples=c.samples, length=c.length, seed=c.seed, dtype=chosen, device=device,
            on_tokens=lambda done, total: bars.update("writing text", done, total, "tokens"),
        )  # fmt: skip
        found = cards.make(
            out, source, tokens, kinds={*cards.LIGHT, *({Gram} if gram else ())}, dtype=chosen, device=device,
            on_block=lambda done, total: bars.update("card", done, total, "blocks"),
        )  # fmt: skip
    if as_json:
        emit({"card": str(out), "digest": found.digest, "bytes": out.stat().st_size, **found.about.model_dump()})
        return
    held = size(out.stat().st_size)
    print(f"{out}: {held}, {len(found.inputs)} inputs over {c.samples} windows of {c.length} tokens")
    print(f"Next: lowbit quantize {model} rtn:int4-g64,weighted=true --card {out} -o DIR")
