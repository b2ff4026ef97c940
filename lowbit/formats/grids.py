"""Grids: the finite sets of values that a code may stand for, before a scale multiplies them.

``IntGrid`` is evenly spaced and decoded by arithmetic; a ``Table`` is a named list of values; ``Quantile`` is a list
estimated from the very weight, and stored with it.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.formats.tables import FLOAT, table_values

__all__ = ["Codebook", "Grid", "IntGrid", "Quantile", "Table", "table_values"]


@dataclass(frozen=True)
class IntGrid:
    """Integers of ``bits`` bits. Asymmetric: code ``q`` means ``q - zero``. Symmetric: ``q - 2^(bits-1)``.

    A symmetric scale maps the largest magnitude to ``2^(bits-1) - 1``, so that min-max uses an odd number of
    levels; the spare lowest level stays available to methods that push values outward. Symmetric and ``signed``: it
    maps that magnitude to ``-2^(bits-1)``, with a negative scale where the value is positive, so that no level is
    spared (ggml's q4_0).
    """

    bits: int
    symmetric: bool
    signed: bool = False

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def offset(self) -> int:
        """The code of value 0 in a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> float:
        """The value that the largest magnitude of a block is scaled to (symmetric grids)."""
        return float((1 << (self.bits - 1)) - (not self.signed))


@dataclass(frozen=True, eq=False)
class Codebook:
    """A table on a device, ready to be searched: its values in code order, and sorted."""

    values: Float[Tensor, "levels"]
    codes: Int[Tensor, "n"]  # of the finite values, in order of value
    sorted: Float[Tensor, "n"]
    bounds: Float[Tensor, "n_1"]  # the largest number that goes to each but the last

    @classmethod
    def of(cls, values: Float[Tensor, "levels"]) -> Codebook:
        """A table of rising values; ties go to the lower one."""
        values = values.to(torch.float32)
        codes = torch.arange(len(values), device=values.device)
        return cls(values, codes, values, (values[:-1] + values[1:]) / 2)

    def nearest(self, x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The code of the nearest value; beyond the ends, of the end. Cost O(x log levels)."""
        return self.codes[torch.bucketize(x, self.bounds)]

    def round(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The nearest value, as ``lookup(nearest(x))`` and faster."""
        return self.sorted[torch.bucketize(x, self.bounds)]

    def lookup(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The values of codes."""
        return self.values[codes]


@dataclass(frozen=True)
class Table:
    """A named grid given by its values in code order (see :func:`~lowbit.formats.tables.table_values`)."""

    name: str

    @property
    def values(self) -> tuple[float, ...]:
        return table_values(self.name)

    @property
    def levels(self) -> int:
        return len(self.values)

    @property
    def top(self) -> float:
        """The largest magnitude of the grid."""
        return max(abs(v) for v in self.values if not math.isnan(v))

    @property
    def power_of_two_top(self) -> float:
        """2^e of the largest magnitude: what OCP microscaling divides a block's maximum exponent by."""
        return 2.0 ** math.floor(math.log2(self.top))

    def nearest(self, x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The code of the nearest value; beyond the ends, of the end.

        Floats break ties to the even code (IEEE 754), other tables to the lower value (bitsandbytes). ``dynamic8``
        takes values in [-1, 1] and looks them up on a lattice of 65536 points, as bitsandbytes does, so that a value
        within 1.5e-5 of a midpoint may go to the other side. Cost O(x log levels).
        """
        return codebook(self.name, x.device).nearest(self._on_lattice(x))

    def round(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The nearest value, as ``lookup(nearest(x))`` and faster."""
        return codebook(self.name, x.device).round(self._on_lattice(x))

    def lookup(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The values of codes."""
        return codebook(self.name, codes.device).lookup(codes)

    def _on_lattice(self, x: Tensor) -> Tensor:
        return ((x + 1) * 0.5 * 65535 + 0.5).to(torch.int32) / 65535 * 2 - 1 if self.name == "dynamic8" else x


@dataclass(frozen=True)
class Quantile:
    """Values that equal shares of the weight round to, so that codes carry the most information (arXiv 2212.09720).

    The table is estimated from the weight, divided block by block by its scale, and stored with it in float16.
    """

    bits: int

    top = 1.0  # blocks are scaled to [-1, 1]
    _SAMPLE = 1 << 22  # weights that are sorted at most, evenly spread over the matrix

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def estimate(self, scaled: Float[Tensor, "*shape"]) -> Float[Tensor, "levels"]:
        """The middles ``(Q(i/n) + Q((i+1)/n)) / 2`` of equal shares, n = 2^bits + 1 and i = 1..2^bits; rising.

        As for nf4, the value nearest to zero becomes zero, and the ends -1 and 1, to which every block's largest
        magnitude is scaled: on Gaussians in blocks of 64 that almost halves the squared error at 4 bits. Cost a sort of
        at most 4 M values.
        """
        flat = scaled.flatten()
        ordered = flat[:: math.ceil(flat.numel() / self._SAMPLE)].sort().values
        n = self.levels + 1
        at = torch.linspace(0, ordered.numel() - 1, n + 1, dtype=torch.float64).round().to(torch.int64)
        edges = ordered[at.to(flat.device)]
        values = ((edges[:-1] + edges[1:]) / 2)[1:]
        values[values.abs().argmin()] = 0
        low, high = -values.min(), values.max()
        values = torch.where(values > 0, values / high, values / torch.where(low > 0, low, 1))
        return values.to(torch.float16).to(torch.float32).sort().values


Grid = IntGrid | Table | Quantile


@functools.cache
def codebook(name: str, device: torch.device) -> Codebook:
    # -0.0 sorts below +0.0, so that small negatives keep their sign and an exact zero does not gain one.
    named = table_values(name)
    finite = sorted((v, math.copysign(1.0, v), c) for c, v in enumerate(named) if not math.isnan(v))
    values = torch.tensor([v for v, _, _ in finite], dtype=torch.float32)
    bounds = (values[:-1] + values[1:]) / 2
    for i, (a, b) in enumerate(itertools.pairwise(finite)):
        if a[:2] == (0.0, -1.0) and b[0] == 0.0:
            bounds[i] = -torch.finfo(torch.float32).tiny
        elif re.fullmatch(FLOAT, name) and a[2] % 2:  # a tie goes up, to the even code
            bounds[i] = bounds[i].nextafter(torch.tensor(-math.inf))
    codes = torch.tensor([c for _, _, c in finite], device=device)
    return Codebook(torch.tensor(named, device=device), codes, values.to(device), bounds.to(device))
