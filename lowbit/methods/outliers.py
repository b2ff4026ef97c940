"""A budget of outliers in 16 bit, the rest in a coarse format: few weights carry much of what rounding loses.

The result is a sum: the base method's codes of the weight without its outliers, so that ranges are fitted to the rest
alone, and the outliers themselves in float16. ``by`` says which they are:

- ``sensitivity``: single weights, by the output error that their rounding leaves once all others make up for it,
  (w - q)² / [H⁻¹]_jj with H the Gram matrix of the inputs (SpQR, Dettmers et al., arXiv 2306.03078). As there, the
  largest and the smallest weight of a block also count what their absence gives the others, whose range shrinks. The
  budget is spent in four rounds, since each one changes the ranges. SpQR takes what exceeds a threshold; this takes a
  budget, so that sizes are known beforehand.
- ``magnitude``: single weights, the largest. Needs no text.
- ``proxy``: whole columns, those of the largest standard deviation. Needs no text. The proxy of Dettmers and
  Zettlemoyer, arXiv 2212.09720, chooses the inputs of a linear by the standard deviation of the weights that *produce*
  them: rows of the linear before it, times the gain of a norm between them. One linear does not see its producer; what
  this sees are columns of a large standard deviation of its own. A norm whose gain went up while the columns after it
  went down hides its outliers from that; they need ``sensitivity``, or llmint8.

A single weight costs 4 bytes (its column, its value; 6 from 32769 columns), and a row 4 more; a column 2 bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lowbit.arrays import Bool, Float, Int, Matrix, Tensor
from lowbit.calibration.stats import Gram, Stat, Stats
from lowbit.errors import FormatError, GramError, RecipeError, nearest
from lowbit.formats.format import Format
from lowbit.formats.qtensor import Columns, QTensor, Raw, Sparse, Sum
from lowbit.methods.base import Kind, Weight
from lowbit.methods.gptq import Gptq

_BY, _BASES = ("sensitivity", "magnitude", "proxy"), ("rtn", "gptq")
_ROUNDS = 4
_INT16_COLUMNS = 1 << 15


@dataclass(frozen=True)
class Outliers:
    kind: ClassVar[Kind] = "encoder"
    share: float = 1.0  # percent of the weights, or of the columns
    by: str = "sensitivity"
    base: str = "rtn"  # or gptq: how the rest is rounded
    clip: int = 20  # smaller ranges searched a block for the rest; 0 is min-max
    damp: float = 0.01  # added to the diagonal of H, as a share of its mean
    true_sequential: bool = True  # statistics from the block with its earlier linears already quantized

    def __post_init__(self) -> None:
        for value, known in ((self.by, _BY), (self.base, _BASES)):
            if value not in known:
                raise RecipeError(f"{value!r} is no choice", where="outliers", fix=nearest(value, known))
        if not (0 <= self.share <= 100 and self.clip >= 0 and self.damp >= 0):
            raise RecipeError(
                f"share {self.share} %, clip {self.clip} or damp {self.damp} is out of range", where="outliers",
                fix="share=1.0,clip=20,damp=0.01",
            )  # fmt: skip

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({Gram}) if self.by == "sensitivity" or self.base == "gptq" else frozenset()

    def extra_nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes that the outliers of a matrix of ``shape`` add to the format's own."""
        rows, columns = shape
        index = 2 if columns <= _INT16_COLUMNS else 4
        if not (count := self._count(shape)):
            return 0
        return count * (index + 2 * rows) if self.by == "proxy" else count * (index + 2) + 4 * (rows + 1)

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        """Cost: for ``sensitivity`` 12 fits of the format and one inverse, O(in³); else one fit and a selection."""
        if not self._count(tuple(w.matrix.shape)):
            return self._rest(w, w.matrix, stats, fmt)
        kept = self._columns(w) if self.by == "proxy" else self._single(w, stats, fmt)
        rest = self._rest(w, w.matrix - kept.decode(), stats, fmt)
        return Sum(rest.shape, (rest, kept))

    def _count(self, shape: tuple[int, ...]) -> int:
        rows, columns = shape
        return round(self.share / 100 * (columns if self.by == "proxy" else rows * columns))

    def _rest(self, w: Weight, rest: Matrix, stats: Stats, fmt: Format) -> QTensor:
        if self.base == "gptq":
            return Gptq(damp=self.damp, clip=self.clip)(Weight(w.name, rest, w.ranges), stats, fmt)
        importance = stats[Gram].mean_square() if Gram in self.needs else None
        return fmt.encode(rest, fmt.fit(rest, importance, self.clip, w.ranges))

    def _columns(self, w: Weight) -> Columns:
        spread = w.matrix.std(dim=0, correction=0)
        return columns(w, spread.topk(self._count(tuple(w.matrix.shape))).indices.sort().values)

    def _single(self, w: Weight, stats: Stats, fmt: Format) -> Sparse:
        W, count = w.matrix, self._count(tuple(w.matrix.shape))
        chosen = torch.zeros_like(W, dtype=torch.bool)
        if self.by == "magnitude":
            _choose(chosen, W.abs(), count)
        else:
            gram = stats[Gram]
            importance = gram.mean_square(), 1 / _inverse_diagonal(gram, self.damp, w.name)
            for i in range(_ROUNDS):
                share = count * (i + 1) // _ROUNDS - count * i // _ROUNDS
                _choose(chosen, self._sensitivity(W.masked_fill(chosen, 0), importance, fmt), share)
        half(W[chosen], w.name)
        return Sparse.of(W, chosen)

    def _sensitivity(self, W: Matrix, importance: tuple[Tensor, Tensor], fmt: Format) -> Float[Tensor, "out in"]:
        """What keeping each weight would gain, in output error."""
        inputs, others = importance

        def error(W: Matrix) -> Float[Tensor, "out in"]:
            return (fmt.encode(W, fmt.fit(W, inputs, self.clip)).decode() - W).square_() * others

        own = error(W)
        gain, total = own.flatten(), fmt.block.split(own).sum(-1)
        blocks = fmt.block.split(W)
        places = fmt.block.split(torch.arange(W.numel(), dtype=torch.float64, device=W.device).view(W.shape))
        for end in (blocks.argmax(-1, keepdim=True), blocks.argmin(-1, keepdim=True)):
            place = places.gather(-1, end).flatten().to(torch.int64)
            without = W.flatten().scatter(0, place, 0).view(W.shape)
            gained = (total - fmt.block.split(error(without)).sum(-1)).flatten()
            gain = gain.scatter_reduce(0, place, gained, "amax")
        return gain.view(W.shape)


def columns(w: Weight, index: Int[Tensor, "k"]) -> Columns:
    """The columns ``index`` of a weight in float16, zero elsewhere; raises FormatError where that overflows."""
    narrow = torch.int16 if w.matrix.shape[1] <= _INT16_COLUMNS else torch.int32
    return Columns(tuple(w.matrix.shape), index.to(narrow), Raw.of(half(w.matrix[:, index], w.name)))


def half(values: Float[Tensor, "*shape"], where: str) -> Float[Tensor, "*shape"]:
    """In float16; raises FormatError where that overflows."""
    stored = values.to(torch.float16)
    if not torch.isfinite(stored).all():
        raise FormatError(
            f"a weight of {float(values.abs().max()):.3g} does not fit float16", where=where,
            why="outliers are stored in it", fix="an override that keeps this linear in 16 bit",
        )  # fmt: skip
    return stored


def _choose(chosen: Bool[Tensor, "out in"], score: Float[Tensor, "out in"], count: int) -> None:
    """Mark ``count`` more weights, those of the highest score."""
    chosen.view(-1)[score.masked_fill(chosen, -torch.inf).flatten().topk(count).indices] = True


def _inverse_diagonal(gram: Gram, damp: float, where: str) -> Float[Tensor, "in"]:
    """The diagonal of the damped H⁻¹; an input that was always zero counts as one. Cost in³ in float64.

    Raises GramError where H is not finite, or not positive definite even with damping.
    """
    H = gram.sum().to(torch.float64)
    H.diagonal()[H.diagonal() == 0] = 1
    H.diagonal().add_(damp * H.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(H)
    if int(info) or not torch.isfinite(lower).all():
        raise GramError(
            f"the Gram matrix ({len(H)} x {len(H)}, {gram.tokens} tokens) is not positive definite with damp {damp:g}",
            where=where, fix=f"damp={max(10 * damp, 0.01):g}, or more calibration tokens",
        )  # fmt: skip
    return torch.cholesky_inverse(lower).diagonal().to(torch.float32)


METHOD = Outliers
