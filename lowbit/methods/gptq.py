"""GPTQ: round columns one by one, and let the columns not yet rounded make up for the error.

Frantar et al., arXiv 2210.17323. With H = sum x xᵀ over calibration tokens, the columns already rounded are fixed, and
each next one is rounded to where the output error is least (:mod:`lowbit.methods.columns`).

What this file does where descriptions differ:

- One factorisation a Gram matrix, in float64, and no inverse; linears that read the same input share it.
- Grids are static by default: every block's scale is fixed from the original weights before the loop, by a clip
  search weighted with diag(H). Then ``act_order`` (columns by falling diag(H)) costs nothing at inference, and the
  block size cannot change a code beyond the order of float additions.
- ``static_groups=False`` fits a group when its first column is reached, from weights with all earlier errors
  already applied, whatever the block size. It excludes ``act_order``, which would need an index at inference.
- ``true_sequential`` asks the walk for statistics that saw the block's earlier linears already quantized.
- An input that was always zero leaves its column without error: it is rounded alone.

With an entropy-coded format (``ec2.5``) the same loop rounds to whole numbers of any size, with steps that follow from
H (:mod:`lowbit.methods.columns.lattice`), as fine as the rate allows. Groups and ranges play no part then. ``fisher``
gives rows that the predictions depend on more a finer grid; it costs one backward pass over a little of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lowbit.arrays import Matrix, Tensor
from lowbit.calibration.stats import Gram, Stat, Stats
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.ec import Entropy
from lowbit.formats.format import Format
from lowbit.formats.qtensor import QTensor
from lowbit.methods.base import Weight
from lowbit.methods.columns import feedback, round_columns
from lowbit.methods.columns.lattice import gptq_at_rate


@dataclass(frozen=True)
class Gptq:
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    damp: float = 0.01  # added to the diagonal, as a share of its mean
    block: int = 64  # columns that are rounded one by one, before their errors are applied in products
    clip: int = 20  # smaller ranges searched a block; 0 is min-max
    fisher: bool = True  # entropy-coded formats: a gain a row, by how much the predictions depend on it

    any_rate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.act_order and not self.static_groups:
            raise RecipeError(
                "act_order with dynamic groups needs an index of groups at inference", where="gptq",
                fix="static_groups=true, or act_order=false",
            )  # fmt: skip
        if not self.damp >= 0 or self.block < 1 or self.clip < 0:
            raise RecipeError(
                f"damp {self.damp}, block {self.block} and clip {self.clip} are out of range", where="gptq",
                fix="damp and clip of at least 0, block of at least 1",
            )  # fmt: skip

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({Gram})

    def __call__(self, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        """Cost O(out * in²) for the loop and O(in³) once a Gram matrix; memory 3 * out * in floats."""
        gram = stats[Gram]
        if isinstance(fmt, Entropy):
            return gptq_at_rate(w, gram, fmt, self.damp, self.act_order, self.fisher)
        if not fmt.block.follows_rows and not (fmt.block.kind == "tensor" and self.static_groups):
            raise FormatError(f"gptq needs blocks along rows, {fmt.name} has {fmt.block}", where=w.name)
        order, L = feedback(gram, self.damp, self.act_order, w.name)
        importance = gram.mean_square() if self.clip else None
        params = fmt.fit(w.matrix, importance, self.clip, w.ranges)
        if self.static_groups or fmt.block.kind != "group":
            codes, _ = round_columns(w.matrix, L, order, fmt, params, self.block)
            return fmt.assemble(codes, params)
        return _dynamic(w.matrix, L, fmt, importance, self)


def _dynamic(W: Matrix, L: Tensor, fmt: Format, importance: Tensor | None, options: Gptq) -> QTensor:
    """Groups fitted when reached: the errors of a whole group are applied before the next one is looked at."""
    (group,) = fmt.block.size
    pull = torch.zeros_like(W)  # what earlier errors add to a column's aim, while those between go unrounded
    codes = torch.empty(tuple(W.shape), dtype=torch.uint8, device=W.device)
    fitted = []
    for start in range(0, W.shape[1], group):
        here = slice(start, min(start + group, W.shape[1]))
        later = slice(here.stop, W.shape[1])
        # A group is fitted where it would go if none of it were rounded, each column making up for what it can.
        settled = torch.linalg.solve_triangular(
            L[here, here].t(), pull[:, here], upper=True, left=False, unitriangular=True
        )
        params = fmt.fit(W[:, here] + settled, None if importance is None else importance[here], options.clip)
        natural = torch.arange(settled.shape[1], device=W.device)
        codes[:, here], D = round_columns(
            W[:, here], L[here, here], natural, fmt, params, options.block, W[:, here] + pull[:, here]
        )
        pull[:, later] += D.t() @ L[later, here].t()
        fitted.append(params)
    return fmt.assemble(codes, fmt.join(fitted))


METHOD = Gptq
