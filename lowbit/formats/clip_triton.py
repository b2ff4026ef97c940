"""Clip search in one launch: every range is tried on a block while its values are in registers.

The kernels of :func:`lowbit.formats.clip.search` for plain scales: one read of the weights instead of a dozen an
evaluation. :func:`search` is for squared errors that may be weighted by column, both ends of a range together;
:func:`search_by_gram` for the output error d G dᵀ of short blocks, ends together or apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl

from lowbit.arrays import Float, Tensor
from lowbit.formats.format import Format
from lowbit.formats.snap_triton import SHARE, rules, snap

_ROWS = 64  # rows of blocks that a program of the search by Gram matrices takes: what a tensor core's product has


def search(
    fmt: Format,
    blocks: Float[Tensor, "rows columns n"],
    low: Float[Tensor, "rows columns"],
    high: Float[Tensor, "rows columns"],
    weights: Float[Tensor, "some columns n"] | None,
    factors: Sequence[float],
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """The ranges, one of ``factors`` times those given, of the least squared error, each block for itself.

    ``weights`` (one row, or one a row of blocks) weigh the squares. Equal errors keep the earlier factor. Cost: one
    read of the blocks.
    """
    rows, columns, n = blocks.shape
    width = triton.next_power_of_2(n)
    share = max(1, SHARE // width)
    best = torch.empty(rows, columns, device=blocks.device)
    _search[(triton.cdiv(rows * columns, share),)](
        blocks.contiguous(), low.contiguous(), high.contiguous(),
        blocks if weights is None else weights.contiguous(), torch.tensor(factors, device=blocks.device), best,
        rows * columns, n, 0 if weights is None else weights.shape[0] * columns, len(factors), **rules(fmt, low),
        WEIGHTED=weights is not None, SHARE=share, WIDTH=width, num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return low * best, high * best


def search_by_gram(
    fmt: Format,
    blocks: Float[Tensor, "rows columns n"],
    low: Float[Tensor, "rows columns"],
    high: Float[Tensor, "rows columns"],
    gram: Float[Tensor, "columns n n"],
    factors: Sequence[float],
    apart: bool,
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """The ranges of the least d G dᵀ, each block for itself, in the order of :func:`lowbit.formats.clip.search`.

    Products have TF32 operands on tensor cores, but for what one direction holds. Cost ``2 n`` operations a weight and
    evaluation.
    """
    rows, columns, n = blocks.shape
    rest, direction = _deflated(gram)
    best = torch.empty(2, rows, columns, device=blocks.device)
    _search_by_gram[(triton.cdiv(rows, _ROWS), columns)](
        blocks.contiguous(), low.contiguous(), high.contiguous(), rest, direction,
        torch.tensor(factors, device=blocks.device), best[0], best[1], rows, columns, n, len(factors),
        (5 if apart else 1) * len(factors), **rules(fmt, low),
        ROWS=_ROWS, WIDTH=max(16, triton.next_power_of_2(n)), num_warps=4,
    )  # fmt: skip
    return best[0], best[1]


def _deflated(gram: Float[Tensor, "columns n n"]) -> tuple[Float[Tensor, "columns n n"], Float[Tensor, "columns n"]]:
    """G as R + v vᵀ, R positive semidefinite, v along its largest eigenvector.

    Inputs with a mean have one direction that outweighs all others, and a search finds errors that avoid it: what is
    left of them must not drown in the rounding of products that cancel.
    """
    largest = gram.diagonal(dim1=1, dim2=2).argmax(1)
    u = gram[torch.arange(len(gram), device=gram.device), largest].unsqueeze(-1)
    for _ in range(4):
        u = gram @ u
        u = u / u.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    v = gram @ u
    v = v / (u * v).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return gram - v * v.mT, v.squeeze(-1).contiguous()


@triton.jit
@no_type_check  # triton has types of its own
def _search(
    blocks, low, high, weights, factors, best, count, n, period, steps,
    values, bounds, divisor, offset, smallest, LEVELS: tl.constexpr, TABLE: tl.constexpr, ASYMMETRIC: tl.constexpr,
    WHOLE: tl.constexpr, STORED: tl.constexpr, ZEROS: tl.constexpr,
    WEIGHTED: tl.constexpr, SHARE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
        snapped, scaled, step = snap(
            x, lowest * factor, highest * factor, values, bounds, divisor, offset, smallest,
            LEVELS, TABLE, ASYMMETRIC, WHOLE, STORED, ZEROS,
        )  # fmt: skip
        d = snapped - scaled
        squares = d * d * w if WEIGHTED else d * d
        error = tl.sum(squares, 1) * (step * step)
        better = error < least
        least = tl.where(better, error, least)
        chosen = tl.where(better, factor, chosen)
    tl.store(best + b, chosen, mask=exists)


@triton.jit
@no_type_check
def _search_by_gram(
    blocks, low, high, gram, direction, factors, best_low, best_high, rows, columns, n, steps, evaluations,
    values, bounds, divisor, offset, smallest, LEVELS: tl.constexpr, TABLE: tl.constexpr, ASYMMETRIC: tl.constexpr,
    WHOLE: tl.constexpr, STORED: tl.constexpr, ZEROS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, WIDTH)
    exists, within = row < rows, i < n
    b = tl.cast(row, tl.int64) * columns + tl.program_id(1)
    x = tl.load(blocks + b[:, None] * n + i[None, :], mask=exists[:, None] & within[None, :], other=0.0)
    # Symmetric, so read with its rows as columns: what a product wants of its second factor.
    G = tl.load(
        gram + tl.program_id(1) * n * n + i[:, None] + i[None, :] * n,
        mask=within[:, None] & within[None, :], other=0.0,
    )  # fmt: skip
    v = tl.load(direction + tl.program_id(1) * n + i, mask=within, other=0.0)
    lowest = tl.load(low + b, mask=exists, other=0.0)
    highest = tl.load(high + b, mask=exists, other=0.0)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    chosen_low, chosen_high, start, end = lowest, highest, lowest, highest
    for t in range(evaluations):
        part, s = t // steps, t % steps  # both ends, the high, the low, the high, the low
        start, end = tl.where(s == 0, chosen_low, start), tl.where(s == 0, chosen_high, end)
        factor = tl.load(factors + s)
        bottom = tl.where(part % 2 == 1, start, lowest * factor)
        top = tl.where((part > 0) & (part % 2 == 0), end, highest * factor)
        snapped, scaled, step = snap(
            x, bottom, top, values, bounds, divisor, offset, smallest, LEVELS, TABLE, ASYMMETRIC, WHOLE, STORED, ZEROS
        )
        d = snapped - scaled
        along = tl.sum(d * v[None, :], 1)
        error = (tl.sum(tl.dot(d, G, input_precision="tf32") * d, 1) + along * along) * (step * step)
        better = error < least
        least = tl.where(better, error, least)
        chosen_low, chosen_high = tl.where(better, bottom, chosen_low), tl.where(better, top, chosen_high)
    tl.store(best_low + b, chosen_low, mask=exists)
    tl.store(best_high + b, chosen_high, mask=exists)
