"""The step that makes a matrix as large as it may be: rounded, coded, counted, and rounded again.

An octave more of step saves one bit a weight where bits are many and less where they are few, so a few secant steps
reach any size. The first are taken on a sample of rows, whose cost is estimated from counts; then the whole matrix is
rounded and really coded, until its bytes are just below what is asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lowbit.arrays import Int, Matrix, Tensor
from lowbit.calibration.stats import Gram
from lowbit.codec import stream as coder
from lowbit.errors import FormatError
from lowbit.formats.ec import Entropy, Lattice
from lowbit.formats.nodes_coded import Coded

_PANEL = 64  # columns, of which a table serves a multiple
_SAMPLE = 1 << 16  # weights that the search begins with
_TOLERANCE = 1 / 2000  # of the bytes asked for, by which the result may be smaller
_TRIES = 12
_APART = 0.02  # octaves between two tries that a slope is taken from
_FAR = 100.0  # octaves that no step is beyond
_CENTRE = 2.05  # bits of a Gaussian's whole numbers where the step is its standard deviation: log2 sqrt(2 pi e)

Rounder = Callable[[Matrix, Tensor], Tensor]
"""``(W, step)``: the whole numbers of W, columns in their own order, for a step of each column."""


def code(W: Matrix, fmt: Entropy, lattice: Lattice, rounder: Rounder, gram: Gram | None, where: str) -> Coded:
    """W in at most ``fmt.nbytes`` bytes, and at least 99.95 % of them (or all but 32, of a small matrix).

    After rounding, all steps are scaled together to where the output error is least (the plain error without a
    ``gram``); it is below one, since what is rounded to zero leaves the rest too large. Cost: two or three roundings
    of the whole matrix, and a few of 65,536 weights.

    Raises FormatError for a matrix whose rows and columns alone (scales and tables) take more.
    """
    shape = (W.shape[0], W.shape[1])
    search = _Search(W, lattice, rounder)
    budget = fmt.nbytes(shape) - lattice.nbytes
    octave, numbers, stream = search.run(budget, fmt.bits or 0.0, where)
    q = lattice.tree(stream, shape, octave)
    shrink = _least_squares(W, q.values(numbers.to(W.device)), gram)
    q = lattice.tree(stream, shape, octave + math.log2(shrink)) if shrink > 0 else q
    if problem := q.problem():  # before it is written: a reader would refuse it
        raise FormatError(
            problem, where=where, why="its columns or rows differ too much", fix="int8-row for this linear"
        )
    return q


@dataclass
class _Search:
    W: Matrix
    lattice: Lattice
    rounder: Rounder

    def run(self, budget: int, bits: float, where: str) -> tuple[float, Tensor, Tensor]:
        """The octave, numbers and stream of the largest result within ``budget`` bytes."""
        empty = self.lattice.tree(torch.empty(0, dtype=torch.uint8, device=self.W.device), tuple(self.W.shape), 0.0)
        self.step, self.order = empty.step, empty.order
        self.V = self.W / empty.gain.unsqueeze(1)
        octave = self._start(bits)
        tolerance = max(int(_TOLERANCE * budget), 32)
        best: tuple[float, Tensor, Tensor] | None = None
        low, high = -math.inf, math.inf  # octaves known to be too fine, and coarse enough
        slope = -1.0
        before: tuple[float, int] | None = None
        for _ in range(_TRIES):
            octave = round(min(max(octave, -_FAR), _FAR), 4)
            numbers = self._numbers(self.V, octave)
            stream = coder.encode(numbers, panels(numbers))
            used = stream.numel()
            if used <= budget:
                high = min(high, octave)
                if best is None or used > best[2].numel():
                    best = octave, numbers, stream
                if used >= budget - tolerance:
                    break
            else:
                low = max(low, octave)
            if before is not None and abs(octave - before[0]) > _APART:  # closer ones differ by chance
                bits_per_octave = 8 * (used - before[1]) / self.V.numel() / (octave - before[0])
                slope = min(max(bits_per_octave, -1.5), -0.25)
            before = octave, used
            octave += (8 * (budget - tolerance // 2 - used) / self.V.numel()) / slope
            if not low < octave < high:
                octave = (low + high) / 2 if math.isfinite(low + high) else octave
            if high - low < 2e-4:
                break
        if best is None:
            raise FormatError(
                f"cannot be coded in {budget} bytes", where=where, why="scales and tables alone take as much",
                fix="more bits, or 16 bit for a matrix as small as this",
            )  # fmt: skip
        octave, numbers, stream = best
        return octave, numbers, stream.to(self.W.device)

    def _numbers(self, V: Matrix, octave: float) -> Tensor:
        """Numbers of rows of V with their columns as they will be stored."""
        return self.rounder(V, self.step * 2.0**octave)[:, self.order].cpu()

    def _start(self, bits: float) -> float:
        """About the octave of the rate: the guess for Gaussian weights, corrected on a sample of rows."""
        every = max(1, self.V.numel() // _SAMPLE)
        sample = self.V[::every].contiguous()
        spread = (sample / self.step).square().mean(0).clamp_min(torch.finfo(torch.float32).tiny).log2().mean() / 2
        octave = float(spread) + _CENTRE - bits
        for _ in range(3):
            found = bits_of(self._numbers(sample, octave))
            octave += found - bits
            if abs(found - bits) < 0.02:
                break
        return octave


def bits_of(numbers: Int[Tensor, "rows columns"]) -> float:
    """Bits a weight of numbers that panels of columns share tables of, without the tables."""
    counts = _counts(numbers)
    return float(sum(_entropy(panel) for panel in counts)) / numbers.numel()


def panels(numbers: Int[Tensor, "rows columns"]) -> list[int]:
    """Widths of runs of columns that should have a table of their own: neighbours are merged while that saves bytes.

    Cost: one count of all numbers, and four times as many prices of a histogram as there are panels of 64 columns.
    """
    runs = [_Run(counts, coder.cost(counts), _PANEL) for counts in _counts(numbers)]
    runs[-1] = runs[-1]._replace(width=numbers.shape[1] - _PANEL * (len(runs) - 1))
    merged = [a.with_next(b) for a, b in itertools.pairwise(runs)]
    while merged:
        saved = [a.nbytes + b.nbytes - m.nbytes for (a, b), m in zip(itertools.pairwise(runs), merged, strict=True)]
        i = int(np.argmax(saved))
        if saved[i] < 0:
            break
        runs[i : i + 2] = [merged[i]]
        del merged[i]
        for k in (i - 1, i):
            if 0 <= k < len(merged):
                merged[k] = runs[k].with_next(runs[k + 1])
    return [run.width for run in runs]


class _Run(NamedTuple):
    """Neighbouring columns that share a table: how often each number occurs, and what all of them take."""

    counts: np.ndarray
    nbytes: float
    width: int

    def with_next(self, other: _Run) -> _Run:
        counts = self.counts + other.counts
        return _Run(counts, coder.cost(counts), self.width + other.width)


def _counts(numbers: Int[Tensor, "rows columns"]) -> np.ndarray:
    """How often each number occurs in each panel of columns: (panels, symbols)."""
    low = int(numbers.min())
    span = int(numbers.max()) - low + 1
    panel = torch.arange(numbers.shape[1], device=numbers.device) // _PANEL * span - low
    counted = torch.bincount((numbers.to(torch.int32) + panel).flatten(), minlength=int(panel[-1]) + low + span)
    return counted.view(-1, span).cpu().numpy()


def _entropy(counts: np.ndarray) -> float:
    """Bits of all symbols of a histogram at their ideal lengths."""
    seen = counts[counts > 0]
    return float(-(seen * np.log2(seen / seen.sum())).sum())


def _least_squares(W: Matrix, Q: Matrix, gram: Gram | None) -> float:
    """The factor of Q that is closest to W, in output error where that is known."""
    H = Q if gram is None else Q @ gram.sum()
    norm = float((H * Q).sum())
    return float((H * W).sum()) / norm if norm > 0 else 1.0
