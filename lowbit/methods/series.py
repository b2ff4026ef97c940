"""Series expansion: a weight as a sum of terms of few bits, each coding what those before it left.

FP=xINT, arXiv 2412.06865. With X bits a term, ``s_1 = max|W| / (2^(X-1) - 1)`` over a block, ``T_1 = round(W / s_1)``
and ``s_{k+1} = s_k / 2^X``: the error falls by 2^-X a term, without calibration. Terms are independent and commute,
and any first few of them are a model (:func:`prefix`). n terms of X bits take n * X bits: the rival is one such term.

What this file does where the paper is silent: rounding a remainder of up to half a step onto a grid 2^X times as fine
takes 2^X + 1 values, one more than X bits hold, and clamping the last one would break the bound for later terms. So
terms after the first have their levels in the middle of 2^X equal cells (``floor`` and an offset: odd multiples of half
a step), which cover the remainder exactly. Every prefix of k terms is within ``s_k / 2``; a zero is not exact.
Scales are kept in bfloat16, whose range holds every ``s_k`` exactly.

Options: ``terms`` is the most there will be; ``target`` stops earlier, once the squared error relative to the weight's
square is no larger (0: never).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Tensor
from lowbit.calibration.stats import Stat, Stats
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import IntGrid
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import Affine, QTensor, Raw, Sum
from lowbit.methods.base import Weight

_SCALE = torch.bfloat16


@dataclass(frozen=True)
class Series:
    terms: int = 2
    target: float = 0.0
    true_sequential: bool = False  # no statistics are used

    def __post_init__(self) -> None:
        if self.terms < 1 or not self.target >= 0:
            raise RecipeError(
                f"terms {self.terms} and target {self.target} are out of range", where="series",
                fix="terms of at least 1, target of at least 0",
            )  # fmt: skip

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset()

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        """A ``Sum`` of ``terms`` Affines. Cost O(terms * out * in).

        Raises FormatError for a format that is no symmetric integer grid with a plain scale, and for NaN or infinity.
        """
        grid = _grid(fmt, w.name)
        fmt.check(tuple(w.matrix.shape))
        W, shape = w.matrix, tuple(w.matrix.shape)
        step = (fmt.block.split(W).abs().amax(-1) / grid.top).to(_SCALE).to(torch.float32)
        if not torch.isfinite(step).all():
            raise FormatError(
                "a NaN or infinite weight has no expansion", where=w.name, fix="look for NaN in this weight"
            )
        first = fmt.snap(W, fmt.block.spread(step, shape), None)
        terms = [Affine(shape, Codes.of(first.codes, grid.levels), Raw.of(step.to(_SCALE)), None, fmt.block)]
        rest = W - first.values
        while len(terms) < self.terms and float(rest.square().sum()) > self.target * float(W.square().sum()):
            step = step / grid.levels
            terms.append(_midway(rest, step, fmt, grid))
            rest = rest - terms[-1].decode()
        return Sum(shape, tuple(terms))

    def nbytes(self, fmt: Format, shape: tuple[int, ...]) -> int:
        """Exact bytes that a weight of ``shape`` will occupy; the most, with a ``target``."""
        return self.terms * fmt.nbytes(shape) + (self.terms - 1) * torch.float16.itemsize


def prefix(q: QTensor, terms: int) -> Sum:
    """The first ``terms`` of a sum, sharing its tensors: a coarser model from the same bytes.

    Raises FormatError when there are not so many.
    """
    if not isinstance(q, Sum) or not 1 <= terms <= len(q.terms):
        held = f"{len(q.terms)} terms" if isinstance(q, Sum) else type(q).__name__
        raise FormatError(f"the first {terms} terms of {held}", fix="series:int4-g64-sym makes sums")
    return Sum(q.shape, q.terms[:terms])


def _midway(rest: Float[Tensor, "out in"], step: Float[Tensor, "rows columns"], fmt: Format, grid: IntGrid) -> Affine:
    """Values of at most ``levels / 2`` steps to the middles of ``levels`` cells."""
    shape, half = tuple(rest.shape), grid.levels // 2
    wide = fmt.block.spread(torch.where(step > 0, step, 1.0), shape)
    codes = torch.floor(rest / wide).add_(half).clamp_(0, grid.levels - 1)
    zero = Raw(tuple(step.shape), torch.full((1, 1), half - 0.5, dtype=torch.float16, device=rest.device))
    return Affine(shape, Codes.of(codes, grid.levels), Raw.of(step.to(_SCALE)), zero, fmt.block)


def _grid(fmt: Format, where: str) -> IntGrid:
    if isinstance(fmt.grid, IntGrid) and fmt.grid.symmetric and fmt.scale == Stored(torch.float16):
        return fmt.grid
    raise FormatError(
        f"a series needs symmetric integers with 16-bit scales, not {fmt.name}", where=where,
        why="later terms are 2^-bits of the first one's scale", fix="int4-g64-sym",
    )  # fmt: skip


METHOD = Series
