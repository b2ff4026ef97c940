"""Round to nearest: every weight to the closest value of its block's grid.

The baseline of every other method; with an affine grid, the quantizer of Jacob et al., arXiv 1712.05877.

With an entropy-coded format all weights have one step, as fine as the rate allows, or with ``weighted`` one a column,
in inverse proportion to the size of its inputs.

Options: ``clip`` searches that many smaller ranges a block for the least squared error (0: min-max);
``weighted`` weighs each column's error by the mean square of its inputs, which needs calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowbit.calibration.stats import Moments, Stat, Stats
from lowbit.errors import RecipeError
from lowbit.formats.ec import Entropy
from lowbit.formats.format import Format
from lowbit.formats.qtensor import QTensor
from lowbit.methods.base import Weight
from lowbit.methods.columns.lattice import rtn_at_rate


@dataclass(frozen=True)
class Rtn:
    clip: int = 0
    weighted: bool = False
    true_sequential: bool = False  # statistics from the block with its earlier linears already quantized

    any_rate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clip < 0:
            raise RecipeError(f"clip {self.clip} is negative", where="rtn", fix="0 for min-max, 20 to search")

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({Moments}) if self.weighted else frozenset()

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        importance = stats[Moments].mean_square() if self.weighted else None
        if isinstance(fmt, Entropy):
            return rtn_at_rate(w, importance, fmt)
        clip = max(self.clip, 20) if self.weighted else self.clip
        return fmt.encode(w.matrix, fmt.fit(w.matrix, importance, clip, w.ranges))


METHOD = Rtn
