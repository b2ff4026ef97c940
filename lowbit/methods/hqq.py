"""HQQ: move every block's zero point to where rounding loses least, by a norm that forgives outliers. No text needed.

Badri and Shaji, "Half-Quadratic Quantization" (2023, https://mobiusml.github.io/hqq_blog). With the scale s fixed by
min-max, minimise over the zero z

    sum |w - s (q - z)|^p,   q = clamp(round(w / s + z)),   p < 1

by half-quadratic splitting. An auxiliary e stands for the error; in turn

    e <- sign(d) max(|d| - |d|^(p-1) / beta, 0),   d = w / s - (q - z)      what counts as an outlier's error
    z <- mean(q - (w / s - e)),                    beta <- kappa beta       least squares for the rest

over each block, all blocks at once. The original stops when the mean error no longer falls; so does this.

What this file does differently:

- Errors are in units of the step, so that a weight times a constant gets the same codes. The original takes them in
  the weight's units: at usual magnitudes (errors below 0.17 with its beta) every e is then zero and all that remains
  is least squares.
- A block keeps the best zero it ever had, min-max's among them, as it is stored: no block ends worse than round to
  nearest by the sum above.
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
    beta: float = 10.0  # how strictly the auxiliary error is held to the real one at first
    kappa: float = 1.01  # by what beta grows each time
    iterations: int = 20  # at most
    clip: int = 0  # smaller ranges searched for the scale; 0 is min-max
    true_sequential: bool = False  # no statistics are used

    def __post_init__(self) -> None:
        if not (0 < self.p <= 1 and self.beta > 0 and self.kappa >= 1 and self.iterations >= 0 and self.clip >= 0):
            raise RecipeError(
                f"p {self.p}, beta {self.beta}, kappa {self.kappa}, iterations {self.iterations} or clip {self.clip} "
                "is out of range", where="hqq", fix="p=0.7,beta=10,kappa=1.01,iterations=20,clip=0",
            )  # fmt: skip

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset()

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        """Cost: about fifteen elementwise passes over the weight an iteration; memory two copies of it."""
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
        z, best = params.zero, params.zero
        least, lowest, beta = torch.full_like(z, torch.inf), torch.inf, self.beta
        for _ in range(self.iterations + 1):
            loss, moved = torch.empty_like(z), torch.empty_like(z)
            for rows in chunks(x):
                mask = None if counted is None else counted[rows]
                loss[rows], moved[rows] = self._half_quadratic(x[rows], z[rows], mask, fmt.grid.levels - 1, beta)
            better = loss < least
            least, best = torch.where(better, loss, least), torch.where(better, z, best)
            if not (total := float((loss * params.step**self.p).sum(dtype=torch.float64))) < lowest:
                break
            z, lowest, beta = fmt.round_zero(moved), total, beta * self.kappa
        return best

    def _half_quadratic(
        self, x: Float[Tensor, "rows columns n"], z: Float[Tensor, "rows columns"], mask: Tensor | None, top: int,
        beta: float,
    ) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:  # fmt: skip
        """The sum of |d|^p of every block under the zeros ``z``, and the zeros that follow."""
        z = z.unsqueeze(-1)
        q = (x + z).round_().clamp_(0, top)
        d = x - q + z
        size = d.abs()
        power = size.clamp_min(torch.finfo(size.dtype).tiny).pow_(self.p - 1)  # |d|^(p-1)
        loss = size * power
        e = torch.copysign(size.sub_(power.div_(beta)).clamp_min_(0), d)
        shift = q.sub_(x).add_(e)
        if mask is None:
            return loss.sum(-1), shift.mean(-1)
        return loss.mul_(mask).sum(-1), shift.mul_(mask).sum(-1) / mask.sum(-1)


METHOD = Hqq
