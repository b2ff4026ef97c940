"""One quantization from beginning to end."""

from __future__ import annotations

from pathlib import Path

import torch

from lowbit.io.native import Writer
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import parse
from lowbit.pipeline.walk import walk

LINE = "gptq:int3-g32,damp=0.1,clip=0"


def quantize(root: Path, out: Path, tokens: torch.Tensor | None, line: str = LINE) -> bool:
    """One whole run into ``out``; whether there was nothing left to do."""
    source, recipe = of_directory(root), parse(line)
    with Writer(out, source, recipe, None if tokens is None else "the tokens") as sink:
        if not sink.already_done:
            walk(source, recipe, tokens, sink)
            sink.finish({"note": "test"})
        return sink.already_done
