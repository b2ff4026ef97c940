"""Tables: named lists of values that codes stand for, in code order; NaN marks codes that are never produced.

Codes of floating-point tables are the bit patterns themselves, so that hardware formats need no translation.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import torch

from lowbit.errors import RecipeError, nearest

FLOAT = r"e([1-8])m([0-7])"


# NormalFloat: 8 positive and 7 negative quantiles of N(0, 1) and an exact zero (QLoRA, arXiv 2305.14314), as published:
# the float32 values that every reader of nf4 uses. The formula gives them to 1.1e-7.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# AbnormalFloat for blocks of 64 (arXiv 2306.06965): the least mean absolute error on a Gaussian divided by its block's
# largest magnitude, with -1, 0 and 1 given: every other value is the median of what rounds to it on its side of zero.
_AF4 = (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
)  # fmt: skip

# ggml's IQ4_NL and IQ4_XS: a fixed non-uniform grid in whole numbers, which scales of float16 multiply.
_IQ4NL = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip


@functools.cache
def table_values(name: str) -> tuple[float, ...]:
    """The values of a named table in code order.

    Names: ``nf4``, ``af4``, ``fp4`` (bitsandbytes'), ``dynamic{3..8}``, ``ternary``, ``e8m0``, ``iq4nl``
    (ggml's), and ``e{E}m{M}`` for
    floats with a sign, E exponent and M mantissa bits (``e4m3`` has one NaN code a sign, ``e5m2`` has infinities, as
    OCP says). Raises RecipeError with the nearest name.
    """
    if name in _NAMED:
        return _NAMED[name]()
    if match := re.fullmatch(FLOAT, name):
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


def _dynamic(bits: int) -> tuple[float, ...]:
    """The dynamic-exponent map (arXiv 2110.02861): per decade, linear cells whose count doubles.

    A sign, a run of zeros that is the decimal exponent, a bit that ends it, and a linear fraction of what is left:
    ``bits - 1`` decades with 1, 2, 4, ... values a sign; then 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(bits - 1):
        edges = torch.linspace(0.1, 1, (1 << i) + 1)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - (bits - 2))).tolist()
        values += [*middles, *(-m for m in middles)]
    return tuple(sorted(values))


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


_NAMED: dict[str, Callable[[], tuple[float, ...]]] = {
    "nf4": lambda: _NF4, "af4": lambda: _AF4, "fp4": _fp4, "ternary": lambda: (-1.0, 0.0, 1.0), "e8m0": _e8m0,
    "iq4nl": lambda: _IQ4NL,
    **{f"dynamic{bits}": functools.partial(_dynamic, bits) for bits in range(3, 9)},
}  # fmt: skip
