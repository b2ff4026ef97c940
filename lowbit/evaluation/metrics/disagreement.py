"""Disagreement: the inputs on which a low-bit model answers differently, and which uncertainty foretells them.

Scores are of the original's probabilities (arXiv:2204.04220): margin, least confidence, entropy, Gini. Each is an
uncertainty, so larger means more likely to change; the AUC says how well it ranks the changed inputs first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special
from scipy.stats import rankdata

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics.confidence import Answers
from lowbit.evaluation.metrics.influence import interval, share
from lowbit.evaluation.statistics import Interval, clopper_pearson


def margin(p: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Second largest probability less the largest: 0 at a tie, -1 when certain."""
    top = np.partition(p, -2, axis=1)[:, -2:]
    value: Float[np.ndarray, " n"] = top[:, 0] - top[:, 1]
    return value


def least_confidence(p: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """1 less the largest probability."""
    value: Float[np.ndarray, " n"] = 1 - p.max(1)
    return value


def entropy(p: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """In nats."""
    total: Float[np.ndarray, " n"] = special.entr(p).sum(1)
    return total


def gini(p: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Probability that two draws differ, 1 - Σ p²."""
    value: Float[np.ndarray, " n"] = 1 - np.square(p).sum(1)
    return value


SCORES: Mapping[str, Callable[[Float[np.ndarray, "n k"]], Float[np.ndarray, " n"]]] = {
    "margin": margin, "least confidence": least_confidence, "entropy": entropy, "gini": gini,
}  # fmt: skip


def disagrees(reference: Answers, candidate: Answers) -> Bool[np.ndarray, " n"]:
    """Where the two choose differently."""
    reference.require_paired(candidate)
    changed: Bool[np.ndarray, " n"] = reference.chosen != candidate.chosen
    return changed


def rate(changed: Bool[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], level: float = 0.95) -> Interval:
    """Share of items that changed, clustered."""
    return share(changed.astype(np.float64), cluster, level)


def auc(
    score: Float[np.ndarray, " n"], changed: Bool[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], level: float = 0.95
) -> Interval:
    """Probability that a changed item scores above an unchanged one, ties counting half.

    The error is DeLong's (1988), summed by cluster (Obuchowski 1997), on the logit scale, where it stays within
    [0, 1] and covers for small shares of changes too. Raises EvidenceError without items of both kinds. O(n log n).
    """
    found = _auc(score, changed, cluster, level)
    value = found.estimate
    if not 0 < value < 1:
        # no spread is seen; the pairs of the rarer kind bound what was missed
        limit = clopper_pearson(0, int(min(changed.sum(), (~changed).sum())), level).high
        low, high = (0.0, limit) if value == 0 else (1 - limit, 1.0)
        return found._replace(low=low, high=high, method="Clopper-Pearson on the rarer kind")
    half = (found.high - value) / (value * (1 - value))
    low, high = (float(special.expit(special.logit(value) + x)) for x in (-half, half))
    return found._replace(low=low, high=high)


def auc_shift(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], changed: Bool[np.ndarray, " n"],
    cluster: Int[np.ndarray, " n"], level: float = 0.95,
) -> Interval:  # fmt: skip
    """AUC of score ``b`` less that of ``a`` on the same items: DeLong's paired comparison, clustered."""
    (one, of_one), (other, of_other) = _influence(a, changed), _influence(b, changed)
    return interval(other - one, of_other - of_one, cluster, level, "DeLong")


class Ranked(NamedTuple):
    """How well one uncertainty ranks the changed items first."""

    score: str
    auc: Interval
    beside_margin: Interval
    """Its AUC less that of the margin."""


def ranking(reference: Answers, changed: Bool[np.ndarray, " n"], level: float = 0.95) -> list[Ranked]:
    """Every score of ``SCORES``, the best first."""
    scores = {name: score(reference.p) for name, score in SCORES.items()}
    found = [
        Ranked(
            name, auc(value, changed, reference.cluster, level),
            auc_shift(scores["margin"], value, changed, reference.cluster, level),
        )
        for name, value in scores.items()
    ]  # fmt: skip
    return sorted(found, key=lambda r: -r.auc.estimate)


def riskiest(score: Float[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
    """The ``k`` items with the largest uncertainty, the largest first: the inputs to look at."""
    return np.argsort(-score, kind="stable")[:k]


def _auc(
    score: Float[np.ndarray, " n"], changed: Bool[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], level: float
) -> Interval:
    value, influence = _influence(score, changed)
    return interval(value, influence, cluster, level, "DeLong")


def _influence(
    score: Float[np.ndarray, " n"], changed: Bool[np.ndarray, " n"]
) -> tuple[float, Float[np.ndarray, " n"]]:
    """The AUC, and for each item its placement among those of the other kind, less the AUC."""
    m, n = int(changed.sum()), int((~changed).sum())
    if not m or not n:
        raise EvidenceError(
            f"{m} changed and {n} unchanged items", where="AUC", why="ranking needs some of both", fix="more items"
        )
    ranks, within = rankdata(score), np.empty(len(score))
    within[changed], within[~changed] = rankdata(score[changed]), rankdata(score[~changed])
    above = ranks - within  # items of the other kind below this one, ties counting half
    value = float(above[changed].sum() / (m * n))
    influence = np.where(changed, (above / n - value) / m, ((m - above) / m - value) / n)
    return value, influence
