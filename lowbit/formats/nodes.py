"""The nodes that formats are made of: stored values, coded values, sums, and single columns.

A scale is itself a QTensor, so double quantization, MX and NVFP4 are an ``Affine`` or ``Lookup`` whose scale is coded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Tensor
from lowbit.errors import RecipeError
from lowbit.formats.blocks import ALL, Block
from lowbit.formats.grids import table_values
from lowbit.formats.pack import Codes, reachable
from lowbit.formats.tree import QTensor, outside


@dataclass(frozen=True, eq=False)
class Raw(QTensor):
    """Values as stored; data of size 1 in a dimension stands for the whole of it."""

    data: Tensor

    @classmethod
    def of(cls, data: Tensor) -> Raw:
        return cls(tuple(data.shape), data)

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Tensor:
        return self.data.expand(self.shape)[rows].to(dtype)

    def problem(self) -> str:
        fits = self.data.dim() == 2 and all(n in (1, m) for n, m in zip(self.data.shape, self.shape, strict=True))
        return "" if fits else f"data has shape {tuple(self.data.shape)}"


@dataclass(frozen=True, eq=False)
class Affine(QTensor):
    """``w = scale * (q - zero)``; without stored zeros, ``zero = levels / 2`` (a symmetric grid).

    A zero is an integer of the codes' own levels (``Codes``, one row over all blocks), or any number (a QTensor with
    one value a block, as a scale is).
    """

    codes: Codes
    scale: QTensor
    zero: Codes | QTensor | None
    block: Block

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        return self.values(self.codes.unpack(rows).to(torch.float32), rows).to(dtype)

    def values(self, q: Float[Tensor, "rows in"], rows: slice = ALL) -> Float[Tensor, "rows in"]:
        """What other codes than the stored ones would decode to on ``rows``; overwrites ``q``."""
        block_rows = rows if self.block.follows_rows else ALL
        scale = self.scale.decode(rows=block_rows)  # (block rows, block columns)
        if self.zero is None:
            return _apply(self.block, self.shape, rows, q.sub_(self.codes.levels // 2), scale, None)
        if isinstance(self.zero, Codes):
            zero = self.zero.unpack().view(self.block.count(self.shape))[block_rows].to(torch.float32)
        else:
            zero = self.zero.decode(rows=block_rows)
        return _apply(self.block, self.shape, rows, q, scale, zero)

    def problem(self) -> str:
        if problem := self.codes.problem(*self.shape) or scale_problem(self.scale, self.block, self.shape):
            return problem
        if self.zero is None:
            return ""
        if isinstance(self.zero, QTensor):
            return scale_problem(self.zero, self.block, self.shape, "zeros")
        if self.zero.levels != self.codes.levels:
            return f"zeros of {self.zero.levels} levels, codes of {self.codes.levels}"
        return self.zero.problem(1, math.prod(self.block.count(self.shape)))


@dataclass(frozen=True, eq=False)
class Lookup(QTensor):
    """``w = scale * table[q]``; a table is named, or stored with the tensor; no scale means one."""

    codes: Codes
    table: str | Tensor
    scale: QTensor | None
    block: Block

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        table = self.table if isinstance(self.table, Tensor) else torch.tensor(table_values(self.table))
        values = table.to(self.codes.data.device, torch.float32)[self.codes.unpack(rows).to(torch.int32)]
        if self.scale is None:
            return values.to(dtype)
        scale = self.scale.decode(rows=rows if self.block.follows_rows else ALL)
        return _apply(self.block, self.shape, rows, values, scale, None).to(dtype)

    def problem(self) -> str:
        if isinstance(self.table, Tensor) and self.table.dim() != 1:
            return f"table has shape {tuple(self.table.shape)}"
        try:
            values = len(table_values(self.table) if isinstance(self.table, str) else self.table)
        except RecipeError as error:
            return str(error)
        if values < (reach := reachable(self.codes.levels)):
            return f"packed codes reach {reach} values, the table has {values}"
        scale = "" if self.scale is None else scale_problem(self.scale, self.block, self.shape)
        return scale or self.codes.problem(*self.shape)


@dataclass(frozen=True, eq=False)
class Sum(QTensor):
    """The sum of its terms, added in float32 in order."""

    terms: tuple[QTensor, ...]

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        total = self.terms[0].decode(rows=rows)
        for term in self.terms[1:]:
            total = total + term.decode(rows=rows)
        return total.to(dtype)

    def problem(self) -> str:
        shapes = [term.shape for term in self.terms]
        return "" if shapes and all(s == self.shape for s in shapes) else f"terms have shapes {shapes}"


@dataclass(frozen=True, eq=False)
class Columns(QTensor):
    """``inner`` holds the columns ``index`` of a matrix that is zero elsewhere."""

    index: Tensor  # (k) integers
    inner: QTensor

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        inner = self.inner.decode(dtype, rows)
        out = inner.new_zeros(inner.shape[0], self.shape[1])
        out[:, self.index.long()] = inner
        return out

    def problem(self) -> str:
        count = self.index.numel()
        if self.index.dim() != 1 or self.inner.shape != (self.shape[0], count):
            return f"{count} columns hold a matrix of shape {self.inner.shape}"
        return outside(self.index, self.shape[1])


def scale_problem(scale: QTensor, block: Block, shape: tuple[int, ...], what: str = "scales") -> str:
    blocks = block.count(shape)
    return "" if scale.shape == blocks else f"{what} of shape {scale.shape} for {blocks} blocks"


def _apply(block: Block, shape: tuple[int, ...], rows: slice, q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """``(q - zero) * scale``, in place on ``q``; whole groups broadcast, ragged ones are spread."""
    if block.kind == "group" and shape[1] % block.size[0] == 0:
        grouped = q.view(q.shape[0], -1, block.size[0])  # (rows, groups, n)
        if zero is not None:
            grouped.sub_(zero.unsqueeze(-1))
        return grouped.mul_(scale.unsqueeze(-1)).view(q.shape)
    if zero is not None:
        q.sub_(block.spread(zero, shape, rows))
    return q.mul_(block.spread(scale, shape, rows))
