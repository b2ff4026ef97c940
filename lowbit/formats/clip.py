"""Clip search: block by block, the range whose rounding costs least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.errors import FormatError
from lowbit.formats.blocks import Block

Ends = Literal["together", "apart"]
Cost = Callable[[Tensor, Tensor], Tensor]
"""The error of every block of a chunk, when their ranges are ``(low, high)``."""


@dataclass(frozen=True)
class Importance:
    """What the errors of a block's weights cost: d dᵀ, a weighted sum of squares, or d G dᵀ."""

    diagonal: Float[Tensor, "rows columns n"] | None = None
    gram: Float[Tensor, "columns n n"] | None = None

    @classmethod
    def of(cls, given: Float[Tensor, "n"] | Float[Tensor, "n n"] | None, block: Block, w: Matrix) -> Importance:
        """Arranged by blocks. Raises FormatError for another shape, and for a Gram matrix of blocks across rows."""
        shape = tuple(w.shape)
        if given is None:
            if block.split(w).numel() == w.numel():
                return cls()
            given = w.new_ones(shape[1])  # what fills up ragged blocks counts for nothing
        if set(given.shape) != {shape[1]}:
            raise FormatError(f"importance of shape {tuple(given.shape)} for {shape[1]} inputs")
        if given.dim() == 1:
            one_row = given.view(1, -1)
            return cls(block.split(one_row if block.follows_rows else one_row.expand(shape)))
        if not block.follows_rows:
            raise FormatError(
                f"a Gram matrix weighs blocks that lie along rows, not {block}", fix="the mean square of each input"
            )
        columns = block.count(shape)[1]
        n = block.split(given[:1]).shape[2]
        pad = columns * n - shape[1]
        padded = torch.nn.functional.pad(given, (0, pad, 0, pad)) if pad else given
        return cls(gram=padded.view(columns, n, columns, n).diagonal(dim1=0, dim2=2).permute(2, 0, 1))

    def cost(self, error: Float[Tensor, "rows columns n"], rows: slice) -> Float[Tensor, "rows columns"]:
        """Of the errors of the block rows ``rows``, which are overwritten."""
        if self.gram is not None:
            by_column = error.transpose(0, 1)  # (columns, rows, n)
            return torch.bmm(by_column, self.gram).mul_(by_column).sum(-1).t()
        error.square_()
        if self.diagonal is not None:
            error.mul_(self.diagonal if self.diagonal.shape[0] == 1 else self.diagonal[rows])
        return error.sum(-1)


@dataclass
class _Best:
    """The cheapest ranges offered so far; the first of equals stays."""

    error: Cost
    low: Tensor
    high: Tensor
    least: Tensor

    def offer(self, low: Tensor, high: Tensor) -> None:
        error = self.error(low, high)
        better = error < self.least
        self.least = torch.where(better, error, self.least)
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)


def search(
    low: Float[Tensor, "rows columns"], high: Float[Tensor, "rows columns"], factors: Sequence[float],
    error: Callable[[slice], Cost], chunks: Iterator[slice], apart: bool,
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:  # fmt: skip
    """The ranges, ``factors`` of those given, of the least error, each block for itself.

    Both ends shrink by one factor, which costs one evaluation of the error a factor. ``apart`` goes on from there: the
    high end alone, the low end alone, and once more (LLMC, arXiv 2405.06001, asks for ends as asymmetric as the grid);
    5 evaluations a factor. So it never ends with a larger error.
    """
    best_low, best_high = low.clone(), high.clone()
    for rows in chunks:
        low_, high_ = low[rows], high[rows]
        best = _Best(error(rows), low_, high_, torch.full_like(low_, math.inf))
        for factor in factors:
            best.offer(low_ * factor, high_ * factor)
        for _ in range(2 if apart else 0):
            start = best.low
            for factor in factors:
                best.offer(start, high_ * factor)
            end = best.high
            for factor in factors:
                best.offer(low_ * factor, end)
        best_low[rows], best_high[rows] = best.low, best.high
    return best_low, best_high


def chunks(blocks: Float[Tensor, "rows columns n"]) -> Iterator[slice]:
    """Block rows whose temporaries fit a cache of the device: a few MB on a CPU, 64 MB on others."""
    elements = 1 << (18 if blocks.device.type == "cpu" else 24)
    step = max(1, elements // (blocks.shape[1] * blocks.shape[2]))
    return (slice(start, start + step) for start in range(0, blocks.shape[0], step))
