"""Grids: the finite sets of values that a code may stand for, before a scale multiplies them.

``IntGrid`` is evenly spaced and decoded by arithmetic; every other grid is a ``Table`` from code to value.
Codes of floating-point tables are the bit patterns themselves, so that hardware formats need no translation.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch
from scipy.stats import norm

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
        """The code of the nearest value; ties go down, and zero keeps a positive sign."""
        order, middles = _boundaries(self.name)
        return order.to(x.device)[torch.bucketize(x, middles.to(x.device))]


Grid = IntGrid | Table


@functools.cache
def table_values(name: str) -> tuple[float, ...]:
    """The values of a named table in code order.

    Names: ``nf4``, ``fp4`` (bitsandbytes'), ``dynamic8``, ``ternary``, ``e8m0``, and ``e{E}m{M}`` for floats with
    a sign, E exponent and M mantissa bits (``e4m3`` has one NaN code a sign, ``e5m2`` has infinities, as OCP says).
    """
    if name in _NAMED:
        return _NAMED[name]()
    if match := re.fullmatch(r"e([1-8])m([0-7])", name):
        exponent, mantissa = int(match[1]), int(match[2])
        if 1 + exponent + mantissa <= 8:
            return _minifloat(exponent, mantissa)
    raise RecipeError(f"unknown table {name!r}", fix=nearest(name, [*_NAMED, "e2m1", "e4m3", "e5m2"]))


def _nf4() -> tuple[float, ...]:
    """NormalFloat: 8 positive and 7 negative quantiles of N(0, 1) and an exact zero (QLoRA, arXiv 2305.14314)."""
    offset = 1 - (1 / 30 + 1 / 32) / 2
    positive = [norm.ppf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-norm.ppf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    return tuple(sorted(float(v / positive[0]) for v in [*negative, 0.0, *positive]))


def _fp4() -> tuple[float, ...]:
    """bitsandbytes' 4-bit float in its code order: not OCP E2M1, which has 1/12 where this has 1/192."""
    magnitudes = [m / 12 for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
    return (*magnitudes, *(-m for m in magnitudes))


def _dynamic8() -> tuple[float, ...]:
    """The 8-bit dynamic-exponent map (arXiv 2110.02861): per decade, linear cells whose count doubles."""
    values = [0.0, 1.0]
    for i in range(7):
        cells = 1 << i
        for c in range(cells):
            middle = 0.1 + 0.9 * (c + 0.5) / cells
            values += [middle * 10.0 ** (i - 6), -middle * 10.0 ** (i - 6)]
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
        top = e == (1 << exponent) - 1
        if (exponent, mantissa) == (5, 2) and top:  # IEEE style: infinities and NaNs
            values.append(math.nan)
        elif (exponent, mantissa) == (4, 3) and top and m == 7:  # the single NaN of e4m3
            values.append(math.nan)
        elif e == 0:
            values.append(sign * m / (1 << mantissa) * 2.0 ** (1 - bias))
        else:
            values.append(sign * (1 + m / (1 << mantissa)) * 2.0 ** (e - bias))
    return tuple(values)


_NAMED = {"nf4": _nf4, "fp4": _fp4, "dynamic8": _dynamic8, "ternary": _ternary, "e8m0": _e8m0}


@functools.cache
def _boundaries(name: str) -> tuple[Tensor, Tensor]:
    """Codes in order of value, and the midpoints between neighbours."""
    values = table_values(name)
    # -0.0 sorts below +0.0, so that small negatives keep their sign and an exact zero does not gain one.
    finite = sorted((v, math.copysign(1.0, v), c) for c, v in enumerate(values) if not math.isnan(v))
    order = torch.tensor([c for _, _, c in finite], dtype=torch.int64)
    middles = [(a + b) / 2 if (a, b) != (0.0, 0.0) else -torch.finfo(torch.float32).tiny for (a, _, _), (b, _, _) in
               zip(finite, finite[1:], strict=False)]
    return order, torch.tensor(middles, dtype=torch.float64).to(torch.float32)
