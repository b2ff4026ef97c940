"""Terms that correct a coarse one in a sum: single weights in 16 bit, and a product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.arrays import Bool, Float, Matrix, Tensor
from lowbit.formats.blocks import ALL
from lowbit.formats.tree import QTensor, outside

_INT16_COLUMNS = 1 << 15


@dataclass(frozen=True, eq=False)
class Sparse(QTensor):
    """Single weights of a matrix that is zero elsewhere, row by row (the layout known as CSR).

    Row i holds ``data[starts[i]:starts[i + 1]]`` at the ascending columns ``index[starts[i]:starts[i + 1]]``.
    """

    starts: Tensor  # (out + 1) int32
    index: Tensor  # (n) integers
    data: Tensor  # (n)

    @classmethod
    def of(cls, w: Matrix, where: Bool[Tensor, "out in"], dtype: torch.dtype = torch.float16) -> Sparse:
        """The weights of ``w`` that ``where`` marks, stored in ``dtype``: 4 bytes each in float16, below 32768 columns.

        Cost O(out * in).
        """
        rows, columns = where.nonzero(as_tuple=True)  # row by row, columns ascending
        starts = torch.zeros(w.shape[0] + 1, dtype=torch.int32, device=w.device)
        starts[1:] = where.sum(1).cumsum(0)
        narrow = torch.int16 if w.shape[1] <= _INT16_COLUMNS else torch.int32
        return cls(tuple(w.shape), starts, columns.to(narrow), w[rows, columns].to(dtype))

    @property
    def count(self) -> int:
        """Weights held."""
        return self.data.numel()

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        start, stop, step = rows.indices(self.shape[0])
        starts = self.starts[start : max(start, stop) + 1].long()
        out = self.data.new_zeros(len(starts) - 1, self.shape[1])
        row = torch.repeat_interleave(torch.arange(len(out), device=out.device), starts.diff())
        held = slice(int(starts[0]), int(starts[-1]))
        out[row, self.index[held].long()] = self.data[held]
        return out[::step].to(dtype)

    def problem(self) -> str:
        out, n = self.shape[0], self.data.numel()
        shapes = [tuple(t.shape) for t in (self.starts, self.index, self.data)]
        if shapes != [(out + 1,), (n,), (n,)]:
            return f"starts, index and data have shapes {shapes}"
        if self.data.device.type != "cpu":
            return ""
        starts = self.starts.long()
        if int(starts[0]) != 0 or int(starts[-1]) != n or bool((starts.diff() < 0).any()):
            return f"starts do not ascend from 0 to {n}"
        if problem := outside(self.index, self.shape[1]):
            return problem
        row = torch.repeat_interleave(torch.arange(out), starts.diff())
        ascending = bool(((row * self.shape[1] + self.index).diff() > 0).all())
        return "" if ascending else "the index of a row does not ascend"


@dataclass(frozen=True, eq=False)
class LowRank(QTensor):
    """``a @ b``, of rank r. Decoded rows agree with the whole's up to the order of r float32 additions."""

    a: Tensor  # (out, r)
    b: Tensor  # (r, in)

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        return (self.a[rows].to(torch.float32) @ self.b.to(torch.float32)).to(dtype)

    def problem(self) -> str:
        a, b = tuple(self.a.shape), tuple(self.b.shape)
        fits = len(a) == len(b) == 2 and (a[0], b[1]) == self.shape and a[1] == b[0]
        return "" if fits else f"factors have shapes {a} and {b}"
