"""Entropy-coded formats ``ecB``: whole numbers of any size, stored in B bits a weight on average.

At equal bits this has about half the error of integers in groups, which are 0.7 to 0.8 bits above the least that any
code could do (0.25 here; docs/decisions/0017). How large a step gives B bits is not known before the numbers are: a
method rounds, counts, and tries again (:mod:`lowbit.methods.columns.rate`). So a format of this kind has no ``fit`` and
no ``snap``; what it has is :class:`Lattice`, the grid up to one common factor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch

from lowbit.arrays import Float, Tensor
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.blocks import Block
from lowbit.formats.format import Format
from lowbit.formats.grids import IntGrid
from lowbit.formats.nodes_coded import Coded
from lowbit.formats.pack import Codes

LOWEST, HIGHEST = 1.0, 8.0
STEPS, GAINS = 32, 16
"""Levels of the logarithmic scales. 32 steps over the range of a layer's columns cost 0.002 bits a weight in error and
5 bits a column; twice as many cost more than they save where a matrix has few rows."""


@dataclass(frozen=True)
class Entropy(Format):
    """``bits`` a weight, all that is stored for a matrix counted; None (``ec``): what a budget of bytes leaves it."""

    bits: float | None = None

    @classmethod
    def of(cls, bits: float | None) -> Entropy:
        """The format of a rate; raises RecipeError for one that is not in [1, 8]."""
        if bits is not None and not LOWEST <= bits <= HIGHEST:
            raise RecipeError(f"{bits:g} bits a weight are not in [{LOWEST:g}, {HIGHEST:g}]", where="ec", fix="ec3")
        name = "ec" if bits is None else f"ec{bits:.10g}"
        return cls(name, IntGrid(8, True), Block("row"), None, bits=bits)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """The most that a matrix will take: methods come within 0.1 % of it, and never above."""
        self.check(shape)
        return int((self.bits or 0.0) * shape[0] * shape[1] / 8)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises FormatError for a tensor that is no matrix, and for ``ec`` that no budget has given a rate."""
        super().check(shape)
        if self.bits is None:
            raise FormatError("ec has no rate of its own", fix="a rate, as in ec3.5, or lowbit quantize --bytes SIZE")

    def fit(self, *_: object, **__: object) -> NoReturn:  # type: ignore[override]
        """Raises FormatError: there are no blocks to fit."""
        raise self._no_grid()

    def snap(self, *_: object, **__: object) -> NoReturn:
        """Raises FormatError."""
        raise self._no_grid()

    def snapper(self, *_: object, **__: object) -> NoReturn:
        """Raises FormatError."""
        raise self._no_grid()

    def _no_grid(self) -> FormatError:
        return FormatError(
            "has no grid before its numbers are known", where=self.name,
            why="its step is found by rounding a whole matrix and counting", fix="gptq, rtn or tune with it",
        )  # fmt: skip


def entropy(name: str) -> Entropy | None:
    """The format of a spelling ``ec`` or ``ecB``; None for another. Raises RecipeError for a rate out of range."""
    if name == "ec":
        return Entropy.of(None)
    match = re.fullmatch(r"ec(\d{1,2}(?:\.\d{1,10})?)", name)
    return Entropy.of(float(match[1])) if match else None


class Levels(NamedTuple):
    """Positive numbers on a logarithmic scale: ``2^(low + octaves * codes)``."""

    codes: Codes | None
    low: float
    octaves: float

    @classmethod
    def of(cls, values: Float[Tensor, "n"], levels: int) -> Levels:
        """The nearest of ``levels`` evenly spaced exponents; no index where all values are (nearly) one."""
        exponent = values.to(torch.float64).log2()
        low, high = float(exponent.min()), float(exponent.max())
        octaves = _short((high - low) / (levels - 1))
        if octaves == 0:
            return cls(None, float(exponent.mean()), 0.0)
        index = ((exponent - low) / octaves).round_().clamp_(0, levels - 1)
        return cls(Codes.of(index.view(1, -1), levels), low, octaves)


class Lattice(NamedTuple):
    """The grid of a matrix up to one factor 2^octave: a step a column and a gain a row, as they will be stored."""

    steps: Levels
    gains: Levels

    @classmethod
    def of(cls, step: Float[Tensor, "in"], gain: Float[Tensor, "out"] | None = None) -> Lattice:
        """For relative steps and gains (None: all one), whose common factors mean nothing."""
        gains = Levels(None, 0.0, 0.0) if gain is None else Levels.of(gain, GAINS)
        return cls(Levels.of(step, STEPS), gains)

    def tree(self, stream: Tensor, shape: tuple[int, ...], octave: float) -> Coded:
        """The tensor of coded numbers whose smallest step is 2^octave."""
        return Coded(
            shape, stream, self.steps.codes, self.gains.codes, _short(octave), self.steps.octaves, self.gains.octaves
        )

    @property
    def nbytes(self) -> int:
        """Bytes beside the stream."""
        return sum(levels.codes.data.numel() for levels in self if levels.codes is not None)


def _short(octaves: float) -> float:
    """To four decimals: a rate answers to an octave by at most a bit, and a file spells these numbers."""
    return round(octaves, 4)
