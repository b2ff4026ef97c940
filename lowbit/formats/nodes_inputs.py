"""Nodes whose matrix acts on changed inputs: ``x @ W.T == enter(x) @ inner.T``.

A linear that rounds its inputs rounds ``enter(x)``, which is made to round well; decoding gives W itself, for which
nothing around the linear needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Tensor
from lowbit.formats.blocks import ALL
from lowbit.formats.hadamard import hadamard, sign_values
from lowbit.formats.pack import Codes
from lowbit.formats.tree import QTensor, outside


@dataclass(frozen=True, eq=False)
class Rotated(QTensor):
    """``W = inner · Rᵀ``, R being a signed Hadamard rotation in blocks of ``size`` (:mod:`lowbit.formats.hadamard`)."""

    signs: Codes
    inner: QTensor
    size: int

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        return hadamard(self.inner.decode(rows=rows), self.size).mul_(sign_values(self.signs)).to(dtype)

    def enter(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """``x · R``, in the dtype of ``x``. Cost O(x log size)."""
        return hadamard(x * sign_values(self.signs).to(x.dtype), self.size)

    def problem(self) -> str:
        width = self.shape[1]
        if self.inner.shape != self.shape:
            return f"a rotated matrix of shape {self.inner.shape}"
        if self.size < 1 or self.size & (self.size - 1) or width % self.size:
            return f"size {self.size} is no power of two that divides {width}"
        return f"signs of {self.signs.levels} levels" if self.signs.levels != 2 else self.signs.problem(1, width)


@dataclass(frozen=True, eq=False)
class Gathered(QTensor):
    """``W = inner · Pᵀ``: column j of ``inner`` meets ``scale[j, 0] * x[index[j, 0]] + scale[j, 1] * x[index[j, 1]]``.

    A channel split into T copies has scale (1/T, 0) in each; two channels that share one column, the mean of them,
    (1/2, 1/2). So QLLM's disassembly and assembly (arXiv 2310.08041) are one node.
    """

    index: Tensor  # (k, 2) integers
    scale: QTensor  # (k, 2)
    inner: QTensor  # (out, k)

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        inner, scale, index = self.inner.decode(rows=rows), self.scale.decode(), self.index.long()
        out = inner.new_zeros(inner.shape[0], self.shape[1])
        for slot in (0, 1):
            out.index_add_(1, index[:, slot], inner * scale[:, slot])
        return out.to(dtype)

    def enter(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch k"]:
        """The picked and scaled inputs, in the dtype of ``x``. Cost O(batch * k)."""
        scale, index = self.scale.decode(x.dtype), self.index.long()
        return x[..., index[:, 0]] * scale[:, 0] + x[..., index[:, 1]] * scale[:, 1]

    def problem(self) -> str:
        k = self.inner.shape[1]
        if self.inner.shape[0] != self.shape[0] or tuple(self.index.shape) != (k, 2) or self.scale.shape != (k, 2):
            shapes = f"{tuple(self.index.shape)} and {self.scale.shape}"
            return f"index and scale have shapes {shapes} for a matrix of shape {self.inner.shape}"
        return outside(self.index, self.shape[1])
