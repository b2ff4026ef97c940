"""Matryoshka encoding: one 8-bit parent that can be read at 8, 6, 4, 3 or 2 bits.

MatQuant, arXiv 2502.06786. The parent is min-max's; slicing keeps the upper bits of its codes, rounded, on the
parent's scale (:mod:`lowbit.formats.nodes_nested`). The paper trains weights, or clipping, for the loss
``sum_r lambda_r L(slice at r)`` over r = 8, 4, 2. Without gradients, ``clip`` searches every block's range for the
least ``sum_r lambda_r |S_r(w) - w|²``: the same objective over one of its parameters. That buys 2 bits with the
parent's own precision, so it is off by default: choose it for a checkpoint that is mostly read at 2 bits.

Options: ``read`` is the width at which the checkpoint is read (override it per site to mix widths; another width is
:func:`at_bits`, and :func:`~lowbit.formats.nodes_nested.repack` drops the bits that are not read); ``extra`` keeps the
bucket above the highest (extra precision); ``clip`` smaller ranges are searched (0: min-max); ``lambda8``, ``lambda4``
and ``lambda2`` weigh the widths in that search (the paper's values); ``weighted`` weighs each column by the mean square
of its inputs there, which needs calibration text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Tensor
from lowbit.calibration.stats import Moments, Stat, Stats
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.format import Format, Params
from lowbit.formats.grids import IntGrid
from lowbit.formats.nodes_nested import PARENT_BITS, WIDTHS, buckets
from lowbit.formats.qtensor import Nested, QTensor
from lowbit.methods.base import Weight


@dataclass(frozen=True)
class MatQuant:
    read: int = 8
    extra: bool = False
    clip: int = 0
    lambda8: float = 0.1
    lambda4: float = 0.1
    lambda2: float = 1.0
    weighted: bool = False
    true_sequential: bool = False  # statistics from the block with its earlier linears already quantized

    def __post_init__(self) -> None:
        if self.read not in WIDTHS:
            raise RecipeError(f"read {self.read} of 8 bits", where="nested", fix="8, 6, 4, 3 or 2")
        if self.clip < 0:
            raise RecipeError(f"clip {self.clip} is negative", where="nested", fix="0 for min-max, 20 to search")
        if self.weighted and not self.clip:
            raise RecipeError("weighted changes nothing without a search", where="nested", fix="clip=20")
        if not min(weights := self.lambdas.values()) >= 0 or not sum(weights) > 0:
            raise RecipeError(f"lambdas {self.lambdas} weigh nothing", where="nested", fix="lambda2=1")

    @property
    def lambdas(self) -> dict[int, float]:
        """The weight of each width."""
        return {8: self.lambda8, 4: self.lambda4, 2: self.lambda2}

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({Moments}) if self.weighted else frozenset()

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        """Cost O(out * in * clip) for each width; memory 4 * out * in floats. Raises FormatError unless ``fmt`` is
        an integer format of 8 bits.
        """
        if not isinstance(fmt.grid, IntGrid) or fmt.grid.bits != PARENT_BITS:
            raise FormatError(f"a parent has 8-bit integers, not {fmt.name}", where=w.name, fix="int8-row or int8-g64")
        if w.ranges is not None or not self.clip:
            params = fmt.fit(w.matrix, ranges=w.ranges)
        else:
            params = self._search(w.matrix, stats[Moments].mean_square() if self.weighted else None, fmt)
        return Nested(tuple(w.matrix.shape), fmt.encode(w.matrix, params), self.read, self.extra)

    def _search(self, W: Float[Tensor, "out in"], importance: Float[Tensor, "in"] | None, fmt: Format) -> Params:
        """The ranges of the least weighted error, block by block; min-max is among them."""
        blocks = fmt.block.split(W)
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        # A ragged block is filled with zeros, which a slice moves: they must not count.
        columns = torch.ones(W.shape[1], device=W.device) if importance is None else importance
        weight = fmt.block.split(columns.expand(W.shape))
        best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
        for i in range(self.clip):
            factor = 1 - 0.6 * i / self.clip
            error = self._error(blocks, fmt.fit(W, ranges=(low * factor, high * factor)), weight, fmt)
            best, least = torch.where(error < least, factor, best), torch.minimum(error, least)
        return fmt.fit(W, ranges=(low * best, high * best))

    def _error(
        self,
        blocks: Float[Tensor, "rows columns n"],
        params: Params,
        weight: Float[Tensor, "rows columns n"],
        fmt: Format,
    ) -> Float[Tensor, "rows columns"]:
        step = params.step.unsqueeze(-1)
        zero = None if params.zero is None else params.zero.unsqueeze(-1)
        codes = fmt.snap(blocks, step, zero).codes.to(torch.uint8)
        origin = 1 << (PARENT_BITS - 1) if zero is None else zero
        total = torch.zeros_like(params.step)
        for bits, share in self.lambdas.items():
            sliced = (buckets(codes, bits, self.extra) << (PARENT_BITS - bits)).to(torch.float32)
            total += share * (sliced - origin).mul_(step).sub_(blocks).square_().mul_(weight).sum(-1)
        return total


def at_bits(q: QTensor, bits: int) -> Nested:
    """The same parent read at another width, sharing its tensors.

    Raises FormatError for a tensor that is not nested, or a width that it cannot be read at.
    """
    if not isinstance(q, Nested):
        raise FormatError(f"a {type(q).__name__} has one width", fix="nested:int8-row makes tensors with several")
    if bits not in WIDTHS:
        raise FormatError(f"{bits} of 8 bits", fix="8, 6, 4, 3 or 2")
    return dataclasses.replace(q, bits=bits)


METHOD = MatQuant
