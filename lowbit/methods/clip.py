"""Clip search: how much of a block's range is worth representing, by the error of its output.

The second half of AWQ (Lin et al., arXiv 2306.00978, its released code): for every row and group the range with the
least d G dᵀ, where d is the rounding error of the group and G the Gram matrix of its inputs. Query and key are left
alone there, since an error in both multiplies. The two ends of a range are searched apart where the grid is
asymmetric: the asymmetric clip of LLMC (arXiv 2405.06001), which found that one factor for both ruins two bits.

A step between transforms and the encoder, which then fits its grids to these ranges: ``awq+clip+rtn:int4-g64``. It
changes no weight, and alone it does nothing. Options: ``steps`` (ranges tried), ``apart``, ``skip`` (names of linears
left alone, joined by a bar).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from lowbit.calibration.stats import Gram, Stat, Stats
from lowbit.errors import RecipeError
from lowbit.formats.clip import Ends
from lowbit.formats.format import Format, Params, Stored
from lowbit.formats.grids import IntGrid
from lowbit.methods.base import BlockView, Edit, Kind, Ranges, SetRanges


@dataclass(frozen=True)
class Clip:
    steps: int = 20
    apart: bool = True
    skip: str = "q_proj|k_proj"

    kind: ClassVar[Kind] = "transform"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RecipeError(f"steps {self.steps} is less than one", where="clip", fix="steps=20")

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({Gram})

    def __call__(self, block: BlockView, stats: Mapping[str, Stats]) -> Iterator[Edit]:
        """Ranges a linear. Cost ``steps`` roundings of every weight and as many products with blocks of G."""
        skipped = self.skip.split("|")
        for site, found in stats.items():
            fmt = block.format(site)
            if fmt is None or Gram not in found or site.rpartition(".")[2] in skipped:
                continue
            if not fmt.block.follows_rows or not isinstance(fmt.scale, Stored):
                continue  # a block's own output error, for a scale that is its own
            ends: Ends = "apart" if self.apart and fmt.asymmetric else "together"
            params = fmt.fit(block.weight(site), found[Gram].sum(), self.steps, ends=ends)
            yield SetRanges(site, ranges(fmt, params))


def ranges(fmt: Format, params: Params) -> Ranges:
    """The lowest and highest value of every block's grid."""
    step = params.step
    if isinstance(fmt.grid, IntGrid) and (params.zero is not None or fmt.grid.signed):
        zero = fmt.grid.offset if params.zero is None else params.zero
        ends = -zero * step, (fmt.grid.levels - 1 - zero) * step
        return torch.minimum(*ends), torch.maximum(*ends)  # a signed grid's steps may be negative
    top = step * fmt.grid.top
    return -top, top


METHOD = Clip
