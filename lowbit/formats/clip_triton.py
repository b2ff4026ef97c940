"""Clip search in one launch: every factor is tried on a block while its values are in registers.

The kernel of :func:`lowbit.formats.clip.search` for both ends together, plain scales, and squared errors that may be
weighted by column: one read of the weights instead of a dozen a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl

from lowbit.arrays import Float, Tensor
from lowbit.formats.grids import Codebook, IntGrid

LARGEST = 1 << 14  # values of a block that fit the registers of one program
_SHARE = 2048  # values that a program takes of smaller blocks together
_STORED: dict[torch.dtype, Any] = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
}  # fmt: skip


def search(
    blocks: Float[Tensor, "rows columns n"],
    low: Float[Tensor, "rows columns"],
    high: Float[Tensor, "rows columns"],
    weights: Float[Tensor, "some columns n"] | None,
    factors: Sequence[float],
    grid: IntGrid | Codebook,
    divisor: float,
    stored: torch.dtype,
    whole: bool,
    zeros: torch.dtype,
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """The ranges, one of ``factors`` times those given, of the least squared error, each block for itself.

    ``weights`` (one row, or one a row of blocks) weigh the squares. A scale is the range over the levels of an
    asymmetric grid, else the largest magnitude over ``divisor``, rounded to ``stored``; zeros are ``whole``, or
    rounded to ``zeros``. Equal errors keep the earlier factor. Cost: one read of the blocks.
    """
    rows, columns, n = blocks.shape
    asymmetric = isinstance(grid, IntGrid) and not grid.symmetric
    if isinstance(grid, IntGrid):
        levels, offset, values, bounds = grid.levels, float(grid.offset), low, low
    else:
        levels, offset, values, bounds = len(grid.sorted), 0.0, grid.sorted, grid.bounds
    limits = torch.finfo(stored)
    width = triton.next_power_of_2(n)
    share = max(1, _SHARE // width)
    best = torch.empty(rows, columns, device=blocks.device)
    _search[(triton.cdiv(rows * columns, share),)](
        blocks.contiguous(), low.contiguous(), high.contiguous(),
        blocks if weights is None else weights.contiguous(), torch.tensor(factors, device=blocks.device), values,
        bounds, best, rows * columns, n, 0 if weights is None else weights.shape[0] * columns, len(factors),
        divisor, offset, limits.smallest_normal * limits.eps,
        LEVELS=levels, TABLE=isinstance(grid, Codebook), ASYMMETRIC=asymmetric, WHOLE=whole,
        WEIGHTED=weights is not None, STORED=_STORED[stored], ZEROS=_STORED[zeros], SHARE=share, WIDTH=width,
        num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return low * best, high * best


@triton.jit
@no_type_check  # triton has types of its own
def _search(
    blocks, low, high, weights, factors, values, bounds, best, count, n, period, steps, divisor, offset, smallest,
    LEVELS: tl.constexpr, TABLE: tl.constexpr, ASYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, WEIGHTED: tl.constexpr,
    STORED: tl.constexpr, ZEROS: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    MAGIC: tl.constexpr = 12582912.0  # 1.5 * 2²³: adding it rounds magnitudes below 2²², ties to even
    b = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
    i = tl.arange(0, WIDTH)
    exists = b < count
    inside = exists[:, None] & (i < n)[None, :]
    x = tl.load(blocks + tl.cast(b, tl.int64)[:, None] * n + i[None, :], mask=inside, other=0.0)
    if WEIGHTED:
        w = tl.load(weights + tl.cast(b % period, tl.int64)[:, None] * n + i[None, :], mask=inside, other=0.0)
    lowest = tl.load(low + b, mask=exists, other=0.0)
    highest = tl.load(high + b, mask=exists, other=0.0)
    least = tl.full((SHARE,), float("inf"), tl.float32)
    chosen = tl.full((SHARE,), 1.0, tl.float32)
    for s in range(steps):
        factor = tl.load(factors + s)
        bottom, top = lowest * factor, highest * factor
        if ASYMMETRIC:
            scale = tl.div_rn(top - bottom, lowest * 0.0 + (LEVELS - 1))
        else:
            scale = tl.div_rn(tl.maximum(top, -bottom), lowest * 0.0 + divisor)
        scale = tl.where(scale > 0, tl.maximum(scale, smallest), scale)
        step = scale.to(STORED).to(tl.float32)
        by = tl.where(tl.abs(step) < 1.1754943508222875e-38, 1.0, step)
        scaled = x * tl.div_rn(lowest * 0.0 + 1.0, by)[:, None]
        if TABLE:
            snapped = tl.load(values) + scaled * 0.0
            for k in tl.static_range(LEVELS - 1):
                snapped = tl.where(scaled > tl.load(bounds + k), tl.load(values + k + 1), snapped)
        else:
            zero = lowest * 0.0 + offset
            if ASYMMETRIC:
                zero = tl.div_rn(-bottom, by)
                if WHOLE:
                    zero = (tl.minimum(tl.maximum(zero, 0.0), LEVELS - 1.0) + MAGIC) - MAGIC
                else:
                    zero = zero.to(ZEROS).to(tl.float32)
            z = zero[:, None]
            if WHOLE:
                snapped = (tl.minimum(tl.maximum(scaled, -z), LEVELS - 1 - z) + MAGIC) - MAGIC
            else:
                snapped = (tl.minimum(tl.maximum(scaled + z, 0.0), LEVELS - 1.0) + MAGIC) - MAGIC - z
        d = snapped - scaled
        squares = d * d * w if WEIGHTED else d * d
        error = tl.sum(squares, 1) * (step * step)
        better = error < least
        least = tl.where(better, error, least)
        chosen = tl.where(better, factor, chosen)
    tl.store(best + b, chosen, mask=exists)
