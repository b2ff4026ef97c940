"""Survival: how long a low-bit model's text stays that of its original.

Every text has the position of its first token that differs, 1 for the first of all, or none up to where it was
followed (a censored text). The curve is Kaplan & Meier's (1958), its error Greenwood's (1926) summed by cluster, since
the texts of one prompt are not independent. Candidates are compared on the same prompts, by their influences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics.influence import interval
from lowbit.evaluation.statistics import Interval, clopper_pearson


@dataclass(frozen=True, eq=False)
class Divergence:
    """When texts left their original; raises EvidenceError for no texts, unequal columns, or positions below 1."""

    position: Int[np.ndarray, " n"]
    """Of the first token that differs, counted from 1; where none does, the number of tokens that were compared."""
    diverged: Bool[np.ndarray, " n"]
    cluster: Int[np.ndarray, " n"]
    """The prompt."""

    def __post_init__(self) -> None:
        n = len(self.position)
        if not n or self.diverged.shape != (n,) or self.cluster.shape != (n,) or self.position.min() < 1:
            raise EvidenceError("no texts, unequal columns, or positions below 1", where="divergence")


class Step(NamedTuple):
    """The share of texts that are still their original's after ``position`` tokens."""

    position: int
    share: Interval
    at_risk: int
    """Texts that had not diverged before this token, and were followed to it."""
    diverged: int
    """Texts that diverge at this token."""


def curve(d: Divergence, level: float = 0.95) -> list[Step]:
    """The Kaplan-Meier curve, a step for every position at which a text diverges.

    Intervals are those of log(-log share), so they stay within [0, 1]; where the curve reaches 0 no spread is seen,
    and the high end is Clopper-Pearson's for the prompts. O(texts x positions).
    """
    km = _kaplan_meier(d, int(d.position.max()))
    steps = []
    for i in np.flatnonzero(km.events):
        share = float(km.share[i])
        found = interval(share, km.influence[:, i], d.cluster, level, "Greenwood")
        if share > 0:
            bend = math.exp((found.high - share) / (share * -math.log(share)))
            found = found._replace(low=share**bend, high=share ** (1 / bend))
        else:
            limit = clopper_pearson(0, found.clusters, level)
            found = found._replace(low=0.0, high=limit.high, method=limit.method)
        steps.append(Step(int(i) + 1, found, int(km.at_risk[i]), int(km.events[i])))
    return steps


def median(d: Divergence, level: float = 0.95) -> tuple[int | None, int | None, int | None]:
    """The position at which half of the texts have diverged, and the ends of its interval.

    The ends are where the curve's own interval lets half go (Brookmeyer & Crowley 1982); None where it never does.
    """
    steps = curve(d, level)

    def first(share: float, of: str) -> int | None:
        return next((s.position for s in steps if getattr(s.share, of) <= share), None)

    return first(0.5, "estimate"), first(0.5, "low"), first(0.5, "high")


def agreement_length(d: Divergence, horizon: int, level: float = 0.95) -> Interval:
    """Mean number of tokens before the first difference, counted up to ``horizon``: the area under the curve.

    Raises EvidenceError where no text was followed that far without diverging or diverged: the tail is unknown.
    """
    km = _kaplan_meier(d, horizon)
    return interval(float(km.share.sum()), km.influence.sum(1), d.cluster, level, "Kaplan-Meier")


def agreement_length_shift(a: Divergence, b: Divergence, horizon: int, level: float = 0.95) -> Interval:
    """Mean agreement length of ``b`` less that of ``a``, paired by text. Raises EvidenceError for other prompts."""
    if not np.array_equal(a.cluster, b.cluster):
        raise EvidenceError("texts of different prompts do not pair", where="divergence", fix="one set of prompts")
    one, other = _kaplan_meier(a, horizon), _kaplan_meier(b, horizon)
    influence = other.influence.sum(1) - one.influence.sum(1)
    return interval(float(other.share.sum() - one.share.sum()), influence, a.cluster, level, "Kaplan-Meier")


class _KaplanMeier(NamedTuple):
    share: Float[np.ndarray, " t"]
    at_risk: Int[np.ndarray, " t"]
    events: Int[np.ndarray, " t"]
    influence: Float[np.ndarray, "n t"]
    """What each text adds to the error of the share after each token; sums over texts are 0."""


def _kaplan_meier(d: Divergence, horizon: int) -> _KaplanMeier:
    at = np.arange(1, horizon + 1)
    risk = d.position[:, None] >= at
    event = d.diverged[:, None] & (d.position[:, None] == at)
    at_risk, events = risk.sum(0), event.sum(0)
    left = at_risk - events
    share = np.cumprod(np.where(at_risk > 0, left / np.maximum(at_risk, 1), 1.0))
    if at_risk[-1] == 0 and share[-1] > 0:
        last = int(at_risk.argmin())
        raise EvidenceError(
            f"no text was followed beyond token {last}", where=f"divergence up to {horizon}",
            why="where the curve has not reached 0, what comes after is unknown", fix=f"a horizon of {last}",
        )  # fmt: skip
    hazard = events / np.maximum(at_risk, 1)
    # d log(1 - e/r): (event - hazard) / left for texts at risk; after the last one the share is 0 whatever happened
    step = np.where(left > 0, (event - risk * hazard) / np.maximum(left, 1), 0.0)
    return _KaplanMeier(share, at_risk, events, -share * step.cumsum(1))
