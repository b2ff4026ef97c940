"""HQQ: move every block's zero point to where rounding loses least, forgiving outliers. No text needed.

Badri and Shaji, "Half-Quadratic Quantization" (2023, https://mobiusml.github.io/hqq_blog). With the scale s fixed by
min-max, minimise over the zero z

    sum |w - s (q - z)|^p,   q = clamp(round(w / s + z)),   p < 1

by half-quadratic splitting. An auxiliary e stands for the error; in turn

    e <- sign(d) max(|d| - |d|^(p-1) / beta, 0),   d = w / s - (q - z)      what counts as an outlier's error
    z <- mean(q - (w / s - e)),                    beta <- kappa beta       least squares for the rest

over each block, all blocks at once.

What this file does differently:

- Errors are in units of the step, so that a weight times a constant gets the same codes, and ``beta`` is 1: at first an
  error is forgiven in part where it exceeds one step. Rounding makes none of more than half a step, so that under
  min-max scales e is 0 and what remains is least squares; under ranges that cut outliers off (``clip``) it is not. The
  original takes errors in the weight's units, where with its beta of 10 every e is 0 too at usual magnitudes.
- There are many local minima a step apart and less, so each block searches from several starts, spread evenly over one
  step around min-max's zero. With 3 starts of 6 steps, the work of 20 steps from one, squared errors of 3-bit codes
  are 5 % smaller.
- A block keeps the zero, as it is stored, of the least sum of squares among all that it visited, min-max's among them:
  outputs add errors up, and no block ends worse than round to nearest by that sum.
- Zeros move by fractions of a step, so they need a format that stores such (``int4-g64-z16``: 4.5 bits, as the
  original); with whole zeros nothing would change, and such formats are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lowbit.arrays import Float, Tensor
from lowbit.calibration.stats import Stat, Stats
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.clip import chunks
from lowbit.formats.format import Format, Params
from lowbit.formats.qtensor import QTensor
from lowbit.formats.snap import divisible
from lowbit.methods.base import Kind, Weight


@dataclass(frozen=True)
class Hqq:
    kind: ClassVar[Kind] = "encoder"
    p: float = 0.7  # the norm: 1 is the mean error, less forgives outliers more
    beta: float = 1.0  # how strictly the auxiliary error is held to the real one at first
    kappa: float = 1.01  # by what beta grows each time
    iterations: int = 6  # from each start
    starts: int = 3  # zeros that the search begins at, 1 / starts of a step apart; 1 is the original's
    clip: int = 0  # smaller ranges searched for the scale; 0 is min-max
    true_sequential: bool = False  # no statistics are used

    def __post_init__(self) -> None:
        if not (0 < self.p <= 1 and self.beta > 0 and self.kappa >= 1):
            raise RecipeError(
                f"p {self.p}, beta {self.beta} or kappa {self.kappa} is out of range", where="hqq",
                fix="p=0.7,beta=1,kappa=1.01",
            )  # fmt: skip
        if not (self.iterations >= 0 and self.starts >= 1 and self.clip >= 0):
            raise RecipeError(
                f"iterations {self.iterations}, starts {self.starts} or clip {self.clip} is too small", where="hqq",
                fix="iterations=6,starts=3,clip=0",
            )  # fmt: skip

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset()

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        """Cost: ``starts * (iterations + 1)`` times about nine elementwise passes; memory one copy of the weight."""
        if not fmt.asymmetric or fmt.zero is None:
            fix = "a format such as int4-g64-z16, or rtn"
            if fmt.asymmetric:
                fix = f"{fmt.name}-z16 (a 16-bit zero a block), or rtn"
            raise FormatError(
                f"hqq moves zero points by fractions of a step, {fmt.name} stores no such", where=w.name, fix=fix
            )
        params = fmt.fit(w.matrix, None, self.clip, w.ranges)
        return fmt.encode(w.matrix, replace(params, zero=self._zeros(w.matrix, fmt, params)))

    def _zeros(self, W: Tensor, fmt: Format, params: Params) -> Float[Tensor, "rows columns"]:
        """The best zero of every block."""
        assert params.zero is not None
        x = fmt.block.split(W / fmt.block.spread(divisible(params.step), tuple(W.shape)))  # (rows, columns, n)
        counted = None if x.numel() == W.numel() else fmt.block.split(torch.ones_like(W))  # 0 where blocks are padded
        best = torch.empty_like(params.zero)
        for rows in chunks(x):
            best[rows] = self._search(x[rows], params.zero[rows], None if counted is None else counted[rows], fmt)
        return best

    def _search(
        self, x: Float[Tensor, "rows columns n"], start: Float[Tensor, "rows columns"], mask: Tensor | None, fmt: Format
    ) -> Float[Tensor, "rows columns"]:
        """The zeros of the least sums of squares among those visited from all starts."""
        best, least = start, torch.full_like(start, torch.inf)
        for k in range(self.starts):
            z = fmt.round_zero(start + (k / self.starts + 0.5) % 1 - 0.5)
            beta = self.beta
            for _ in range(self.iterations + 1):
                loss, moved = self._half_quadratic(x, z, mask, fmt.grid.levels - 1, beta)
                better = loss < least
                least, best = torch.where(better, loss, least), torch.where(better, z, best)
                z, beta = fmt.round_zero(moved), beta * self.kappa
        return best

    def _half_quadratic(
        self, x: Float[Tensor, "rows columns n"], z: Float[Tensor, "rows columns"], mask: Tensor | None, top: int,
        beta: float,
    ) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:  # fmt: skip
        """The norm of every block's error under the zeros ``z``, and the zeros that follow."""
        z = z.unsqueeze(-1)
        shift = (x + z).round_().clamp_(0, top).sub_(x)  # q - w / s
        error = shift - z  # -d
        if mask is not None:
            shift.mul_(mask)
            error.mul_(mask)
        total = shift.sum(-1)
        if float(torch.linalg.vector_norm(error, torch.inf)) > beta ** (-1 / (2 - self.p)):  # else every e is 0
            size = error.abs()
            power = size.clamp_min(torch.finfo(size.dtype).tiny).pow_(self.p - 1)  # |d|^(p-1)
            total -= torch.copysign(size.sub_(power.div_(beta)).clamp_min_(0), error).sum(-1)
        count = x.shape[-1] if mask is None else mask.sum(-1)
        return torch.linalg.vector_norm(error, dim=-1), total / count


METHOD = Hqq
