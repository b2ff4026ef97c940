"""Grids: the finite sets of values that a code may stand for, before a scale multiplies them.

``IntGrid`` is evenly spaced and decoded by arithmetic; every other grid is a ``Table`` from code to value.
Codes of floating-point tables are the bit patterns themselves, so that hardware formats need no translation.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import RecipeError, nearest


@dataclass(frozen=True)
class IntGrid:
    """Integers of ``bits`` bits. Asymmetric: code ``q`` means ``q - zero``. Symmetric: ``q - 2^(bits-1)``.

    A symmetric scale maps the largest magnitude to ``2^(bits-1) - 1``, so that min-max uses an odd number of
    levels; the spare lowest level stays available to methods that push values outward.
    """

    bits: int
    symmetric: bool

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
        return float((1 << (self.bits - 1)) - 1)


@dataclass(frozen=True)
class Table:
    """A named grid given by its values in code order; NaN marks codes that are never produced."""

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
        return _sorted(self.name, x.device).codes[self._rank(x)]

    def round(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The nearest value, as ``lookup(nearest(x))`` and faster."""
        return _sorted(self.name, x.device).values[self._rank(x)]

    def _rank(self, x: Tensor) -> Tensor:
        if self.name == "dynamic8":
            x = ((x + 1) * 0.5 * 65535 + 0.5).to(torch.int32) / 65535 * 2 - 1
        return torch.bucketize(x, _sorted(self.name, x.device).bounds)

    def lookup(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The values of codes."""
        return _tensor(self.name, codes.device)[codes]


Grid = IntGrid | Table
_FLOAT = r"e([1-8])m([0-7])"


# NormalFloat: 8 positive and 7 negative quantiles of N(0, 1) and an exact zero (QLoRA, arXiv 2305.14314), as published:
# the float32 values that every reader of nf4 uses. The formula gives them to 1.1e-7.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.cache
def table_values(name: str) -> tuple[float, ...]:
    """The values of a named table in code order.

    Names: ``nf4``, ``fp4`` (bitsandbytes'), ``dynamic8``, ``ternary``, ``e8m0``, and ``e{E}m{M}`` for floats with
    a sign, E exponent and M mantissa bits (``e4m3`` has one NaN code a sign, ``e5m2`` has infinities, as OCP says).
    """
    if name in _NAMED:
        return _NAMED[name]()
    if match := re.fullmatch(_FLOAT, name):
        exponent, mantissa = int(match[1]), int(match[2])
        if 1 + exponent + mantissa <= 8:
            return _minifloat(exponent, mantissa)
    raise RecipeError(f"unknown table {name!r}", fix=nearest(name, [*_NAMED, "e2m1", "e4m3", "e5m2"]))


def _fp4() -> tuple[float, ...]:
    """bitsandbytes' 4-bit float in its code order: not OCP E2M1, which has 1/12 where this has 1/192.

    Code 8 is a second +0, which takes what lies above zero.
    """
    magnitudes = [m / 12 for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
    return (*magnitudes, 0.0, *(-m for m in magnitudes[1:]))


def _dynamic8() -> tuple[float, ...]:
    """The 8-bit dynamic-exponent map (arXiv 2110.02861): per decade, linear cells whose count doubles."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, (1 << i) + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += [*middles, *(-m for m in middles)]
    return tuple(sorted(values))


def _ternary() -> tuple[float, ...]:
    return (-1.0, 0.0, 1.0)


def _e8m0() -> tuple[float, ...]:
    """Powers of two 2^-127..2^127; code 255 is NaN (OCP microscaling)."""
    return (*(2.0 ** (e - 127) for e in range(255)), math.nan)


def _minifloat(exponent: int, mantissa: int) -> tuple[float, ...]:
    """Every bit pattern of a small float: bias 2^(E-1)-1, subnormals, OCP's rules for the top exponent."""
    bias, values = (1 << (exponent - 1)) - 1, []
    for code in range(1 << (1 + exponent + mantissa)):
        sign = -1.0 if code >> (exponent + mantissa) else 1.0
        e, m = (code >> mantissa) & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
        if e == (1 << exponent) - 1 and ((exponent, mantissa) == (5, 2) or (exponent, mantissa, m) == (4, 3, 7)):
            values.append(math.nan)  # the top exponent of e5m2 as IEEE has it, the single NaN of e4m3
        elif e == 0:
            values.append(sign * m / (1 << mantissa) * 2.0 ** (1 - bias))
        else:
            values.append(sign * (1 + m / (1 << mantissa)) * 2.0 ** (e - bias))
    return tuple(values)


_NAMED = {"nf4": lambda: _NF4, "fp4": _fp4, "dynamic8": _dynamic8, "ternary": _ternary, "e8m0": _e8m0}


class _Sorted(NamedTuple):
    """The codes of a table in order of value, those values, and the largest number that goes to each but the last."""

    codes: Int[Tensor, "n"]
    values: Float[Tensor, "n"]
    bounds: Float[Tensor, "n_1"]


@functools.cache
def _sorted(name: str, device: torch.device) -> _Sorted:
    # -0.0 sorts below +0.0, so that small negatives keep their sign and an exact zero does not gain one.
    finite = sorted((v, math.copysign(1.0, v), c) for c, v in enumerate(table_values(name)) if not math.isnan(v))
    values = torch.tensor([v for v, _, _ in finite], dtype=torch.float32)
    bounds = (values[:-1] + values[1:]) / 2
    for i, (a, b) in enumerate(itertools.pairwise(finite)):
        if a[:2] == (0.0, -1.0) and b[0] == 0.0:
            bounds[i] = -torch.finfo(torch.float32).tiny
        elif re.fullmatch(_FLOAT, name) and a[2] % 2:  # a tie goes up, to the even code
            bounds[i] = bounds[i].nextafter(torch.tensor(-math.inf))
    return _Sorted(torch.tensor([c for _, _, c in finite], device=device), values.to(device), bounds.to(device))


@functools.cache
def _tensor(name: str, device: torch.device) -> Float[Tensor, "levels"]:
    return torch.tensor(table_values(name), dtype=torch.float32, device=device)
