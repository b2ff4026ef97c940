"""Ticks for logarithmic and symmetric-logarithmic axes, where Vega's own are too many or none."""

from __future__ import annotations

import math
from collections.abc import Sequence


def log_domain(values: Sequence[float]) -> tuple[float, float]:
    """The range of the positive values, a little wider; (0.1, 1) where there is none."""
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    return (min(positive) / 1.25, max(positive) * 1.25) if positive else (0.1, 1.0)


def log_ticks(low: float, high: float) -> list[float]:
    """Round values in [low, high], both positive, at most nine: the fewer the decades, the more of each."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 4, 5, 7) if decades <= 1 else (1, 2, 5) if decades <= 2.2 else (1,)
    every = max(1, math.ceil((last - first) / 8))
    ticks = [m * 10.0**k for k in range(first, last + 1, every) for m in steps]
    return [t for t in map(_clean, ticks) if low <= t <= high]


def symlog(value: float, constant: float) -> float:
    """sign(v) log(1 + |v| / c): linear near zero, logarithmic beyond ``constant``; as d3's scaleSymlog."""
    return math.copysign(math.log1p(abs(value) / constant), value)


def symlog_constant(values: Sequence[float]) -> float:
    """Where a symmetric-logarithmic axis turns linear: the power of ten below the smallest size of a value.

    Never more than four decades under the largest, so that one value near zero does not stretch the axis.
    """
    sizes = [abs(v) for v in values if v and math.isfinite(v)]
    if not sizes:
        return 0.01
    return float(10.0 ** max(math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes))) - 4))


def symlog_domain(values: Sequence[float], constant: float) -> tuple[float, float]:
    """The range of the values and zero, a little wider; zero never lies on the edge."""
    finite = [v for v in values if math.isfinite(v)]
    return min(1.25 * min(finite, default=0.0), -constant / 2), max(1.25 * max(finite, default=0.0), constant / 2)


def symlog_ticks(low: float, high: float, constant: float) -> list[float]:
    """Zero and the powers of ten from ``constant`` on, of both signs, within [low, high]."""
    decades = [constant * 10.0**k for k in range(12)]
    ticks = sorted({0.0, *map(_clean, decades), *(-_clean(d) for d in decades)})
    return [t for t in ticks if low <= t <= high]


def _clean(value: float) -> float:
    return float(f"{value:.3g}")
