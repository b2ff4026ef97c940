"""The node of entropy-coded matrices: whole numbers of any size, coded by how often each one occurs.

There are no groups and no clipping: a column has one step, a row at most one gain, and what is stored is the stream of
:mod:`lowbit.codec.stream`, in which frequent numbers take fewer bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.codec import stream as coder
from lowbit.errors import LowbitError
from lowbit.formats.blocks import ALL
from lowbit.formats.pack import Codes, reachable
from lowbit.formats.tree import QTensor

_LARGEST = 120.0  # octaves of a step: its products with whole numbers of 16 bits stay finite in float32


@dataclass(frozen=True, eq=False)
class Coded(QTensor):
    """``W[:, order] = diag(gain) · N · diag(step[order])`` with N the coded whole numbers.

    Steps and gains lie on logarithmic scales: ``step = 2^(base + step_octaves * steps)`` a column and
    ``gain = 2^(gain_octaves * gains)`` a row; without ``steps`` or ``gains`` their indices are all zero. ``order`` is
    that of rising step indices, equal ones as they are: columns whose numbers are spread alike lie side by side, where
    they share a table, and nothing about the order is stored.
    """

    stream: Tensor  # bytes
    steps: Codes | None  # (1, in)
    gains: Codes | None  # (1, out)
    base: float
    step_octaves: float
    gain_octaves: float

    @property
    def order(self) -> Int[Tensor, "in"]:
        """The column of W that each column of N belongs to."""
        if self.steps is None:
            return torch.arange(self.shape[1], device=self.stream.device)
        return torch.argsort(self.steps.unpack()[0], stable=True)

    @property
    def step(self) -> Float[Tensor, "in"]:
        """The step of each column of W."""
        return _octaves(self.steps, self.step_octaves, self.base, self.shape[1], self.stream.device)

    @property
    def gain(self) -> Float[Tensor, "out"]:
        """The gain of each row."""
        return _octaves(self.gains, self.gain_octaves, 0.0, self.shape[0], self.stream.device)

    def numbers(self, rows: slice = ALL) -> Int[Tensor, "rows in"]:
        """N, with its columns as stored."""
        return coder.decode(self.stream.cpu(), rows).to(self.stream.device)

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        return self.values(self.numbers(rows), rows).to(dtype)

    def values(self, numbers: Int[Tensor, "rows in"], rows: slice = ALL) -> Float[Tensor, "rows in"]:
        """What numbers decode to on ``rows``."""
        ordered = numbers.to(torch.float32).mul_(self.gain[rows].unsqueeze(1))
        out = torch.empty_like(ordered)
        out[:, self.order] = ordered
        return out.mul_(self.step)

    def enter(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """What N meets: inputs in the order of its columns, times their steps. ``y = gain * (enter(x) @ N.T)``."""
        order = self.order
        return x[..., order] * self.step[order].to(x.dtype)

    def problem(self) -> str:
        rows, columns = self.shape
        if self.stream.dtype != torch.uint8 or self.stream.dim() != 1:
            return f"a stream of {self.stream.dtype} {tuple(self.stream.shape)}"
        try:
            found = coder.shape(self.stream.cpu())
        except LowbitError as error:
            return f"the stream cannot be decoded: {error.what}"
        if tuple(found) != (rows, columns):
            return f"a stream of {tuple(found)} numbers"
        for name, index, n in (("steps", self.steps, columns), ("gains", self.gains, rows)):
            if index is not None and (problem := index.problem(1, n)):
                return f"{name}: {problem}"
        reach = _reach(self.steps, self.step_octaves) + _reach(self.gains, self.gain_octaves) + abs(self.base)
        return "" if math.isfinite(reach) and reach <= _LARGEST else f"steps of {reach} octaves"


def _reach(index: Codes | None, octaves: float) -> float:
    """The most octaves that stored indices can add."""
    return 0.0 if index is None else (reachable(index.levels) - 1) * abs(octaves)


def _octaves(index: Codes | None, octaves: float, base: float, n: int, device: torch.device) -> Tensor:
    """``2^(base + octaves * index)``, in float64 so that every machine rounds it to the same float32."""
    exponent = torch.zeros(n, dtype=torch.float64, device=device) if index is None else index.unpack()[0].double()
    return torch.exp2(exponent.mul_(octaves).add_(base)).to(torch.float32)
