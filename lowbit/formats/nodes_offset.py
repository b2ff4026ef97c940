"""The node of blocks that store their least value instead of a zero point, as ggml's formats with a minimum do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Tensor
from lowbit.formats.blocks import ALL, Block
from lowbit.formats.nodes import scale_problem
from lowbit.formats.pack import Codes
from lowbit.formats.tree import QTensor


@dataclass(frozen=True, eq=False)
class Offset(QTensor):
    """``w = scale * q + offset``: the product is rounded to float32, then the sum, as ggml rounds them.

    An ``Affine`` with the zero ``-offset / scale`` is the same in exact arithmetic, but that quotient is not a number
    of 16 bits, and where a block is constant its scale is zero. Scale and offset may be coded themselves (K-quants).
    """

    codes: Codes
    scale: QTensor
    offset: QTensor
    block: Block

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        block_rows = rows if self.block.follows_rows else ALL
        q = self.codes.unpack(rows).to(torch.float32)
        scale, offset = self.scale.decode(rows=block_rows), self.offset.decode(rows=block_rows)
        if self.block.kind == "group" and self.shape[1] % self.block.size[0] == 0:
            grouped = q.view(q.shape[0], -1, self.block.size[0])  # (rows, groups, n)
            return grouped.mul_(scale.unsqueeze(-1)).add_(offset.unsqueeze(-1)).view(q.shape).to(dtype)
        spread = (self.block.spread(values, self.shape, rows) for values in (scale, offset))
        return q.mul_(next(spread)).add_(next(spread)).to(dtype)

    def problem(self) -> str:
        return (
            self.codes.problem(*self.shape)
            or scale_problem(self.scale, self.block, self.shape)
            or scale_problem(self.offset, self.block, self.shape, "offsets")
        )
