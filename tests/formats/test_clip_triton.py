"""Clip search on a GPU against the search in torch; without a GPU, in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from lowbit.formats.clip import Importance
from lowbit.formats.format import Format, Stored, _factors
from lowbit.formats.grids import IntGrid, Table, codebook
from lowbit.formats.presets import preset

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ["int4-g16", "int3-row", "int4-g20", "int2-g16-sym", "int4-tensor", "nf4", "fp4", "ternary"]


@pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fmt", [
    *map(preset, FORMATS), dataclasses.replace(preset("int4-g16"), name="fractions", zero=Stored(torch.float16)),
], ids=lambda f: f.name)  # fmt: skip
def test_ranges_are_those_of_the_search(fmt: Format, weighted: bool) -> None:
    from lowbit.formats import clip_triton

    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 72, generator=generator)
    w[0, 0] = 30.0
    w[1] = w[1].abs()
    w[2] = 0.0
    importance = torch.rand(72, generator=generator) if weighted else None
    blocks = fmt.block.split(w).to(DEVICE)
    assert isinstance(fmt.scale, Stored)
    grid = fmt.grid if isinstance(fmt.grid, IntGrid) else codebook(fmt.grid.name, blocks.device)  # type: ignore[union-attr]
    assert isinstance(fmt.grid, IntGrid | Table)
    weights = Importance.of(importance, fmt.block, w).diagonal
    ranges = clip_triton.search(
        blocks, blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0),
        None if weights is None else weights.to(DEVICE), _factors(fmt, max(20, fmt.least_clip_steps)), grid,
        fmt._divisor(), fmt.scale.dtype, fmt.zero is None, torch.float16,
    )  # fmt: skip
    got, expected = fmt.fit(w, ranges=(ranges[0].cpu(), ranges[1].cpu())), fmt.fit(w, importance, 20)
    assert float((got.step != expected.step).float().mean()) < 0.01  # equal errors, up to rounding
    assert not torch.equal(expected.step, fmt.fit(w, importance).step) or fmt.least_clip_steps
