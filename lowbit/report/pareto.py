"""Which candidates are worth their bytes, and which differences are real."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

SIZE_TOLERANCE = 1.001
"""Sizes within 0.1 % count as equal: a few bytes of header win no place on the front."""


class Standing(StrEnum):
    """A candidate's place among all of them, on one metric against size."""

    FRONT = "on the front"
    TIED = "tied with the front"
    DOMINATED = "dominated"


class Point(NamedTuple):
    """One candidate on one metric; lower is better. An interval that was not measured is NaN."""

    label: str
    size: int
    value: float
    low: float
    high: float


def standings(points: Sequence[Point]) -> dict[str, Standing]:
    """Label -> standing, smaller size and smaller value being better.

    On the front: nothing is at least as small and at least as good, and better in one of the two. Tied: others
    dominate it by their estimates, but its interval overlaps the interval of every one of them. The intervals
    are each against the reference, so overlap is a cautious test: a direct paired comparison of two candidates
    is sharper. Without intervals nothing is tied. O(n²) for n points.
    """
    return {p.label: _standing(p, points) for p in points}


def _standing(point: Point, points: Sequence[Point]) -> Standing:
    better = [q for q in points if _dominates(q, point)]
    if not better:
        return Standing.FRONT
    known = not any(math.isnan(x) for q in (point, *better) for x in (q.low, q.high))
    overlaps = known and all(point.low <= q.high for q in better)
    return Standing.TIED if overlaps else Standing.DOMINATED


def _dominates(a: Point, b: Point) -> bool:
    smaller = a.size * SIZE_TOLERANCE < b.size
    return a.size <= b.size * SIZE_TOLERANCE and a.value <= b.value and (smaller or a.value < b.value)
