"""Confidence: how sure a model is of its answers, and what low bits change in that.

Probabilities are the softmax over the log-likelihoods of an item's choices, and two models are compared item by item.
The questions are those of Proskurina et al. 2024 (arXiv:2405.00632). Whether confidence is right is in
:mod:`lowbit.evaluation.metrics.calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics.base import Bucket, Metric, quantile_group
from lowbit.evaluation.metrics.items import Items
from lowbit.evaluation.statistics import Interval, paired_mean


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model thinks of the choices of every item; raises EvidenceError for shapes or numbers that do not fit.

    Rows of ``p`` sum to 1; choices that an item does not have are 0 and stand last.
    """

    p: Float[np.ndarray, "n k"]
    gold: Int[np.ndarray, " n"]
    """Index of the right choice."""
    cluster: Int[np.ndarray, " n"]

    def __post_init__(self) -> None:
        n = len(self.p)
        fits = n and self.gold.shape == self.cluster.shape == (n,) and np.isfinite(self.p).all()
        if not (fits and np.allclose(self.p.sum(1), 1, atol=1e-4) and (self.p[np.arange(n), self.gold] >= 0).all()):
            raise EvidenceError(
                f"answers of shape {self.p.shape} with {self.gold.shape} right ones are no probabilities",
                where="confidence", fix="rows that sum to 1, one right choice each",
            )  # fmt: skip

    @classmethod
    def of(cls, items: Items, per: str = "sum") -> Answers:
        """From a choice task; ``per`` as in ``Items.probabilities``. Raises EvidenceError for items without choices,
        or without a single right one."""
        if not items.is_choice or (items.gold < 0).any():
            raise EvidenceError(
                "items without choices, or without one right choice", where="confidence",
                why="calibration needs to know which answer is right", fix="a task with one right choice an item",
            )  # fmt: skip
        counts = np.diff(items.starts)
        p = np.zeros((len(items), int(counts.max())))
        p[items.owner, np.arange(len(items.logprob)) - items.starts[items.owner]] = items.probabilities(per)
        return cls(p, items.gold, items.cluster)

    @cached_property
    def chosen(self) -> Int[np.ndarray, " n"]:
        """The likeliest choice, the first of equals."""
        value: Int[np.ndarray, " n"] = self.p.argmax(1)
        return value

    @cached_property
    def correct(self) -> Float[np.ndarray, " n"]:
        """1 where the likeliest choice is right, else 0."""
        value: Float[np.ndarray, " n"] = (self.chosen == self.gold).astype(np.float64)
        return value

    @cached_property
    def confidence(self) -> Float[np.ndarray, " n"]:
        """Probability of the likeliest choice."""
        value: Float[np.ndarray, " n"] = self.p.max(1)
        return value

    @cached_property
    def p_true(self) -> Float[np.ndarray, " n"]:
        """Probability of the right choice."""
        value: Float[np.ndarray, " n"] = self.p[np.arange(len(self.p)), self.gold]
        return value

    @cached_property
    def nll(self) -> Float[np.ndarray, " n"]:
        """-log p(right choice) in nats."""
        value: Float[np.ndarray, " n"] = -np.log(np.maximum(self.p_true, np.finfo(np.float64).tiny))
        return value

    @cached_property
    def brier(self) -> Float[np.ndarray, " n"]:
        """Squared distance from the truth, summed over the choices, 0 to 2 (Brier 1950)."""
        value: Float[np.ndarray, " n"] = np.square(self.p).sum(1) - 2 * self.p_true + 1
        return value

    @cached_property
    def entropy(self) -> Float[np.ndarray, " n"]:
        """Of the probabilities, in bits."""
        value: Float[np.ndarray, " n"] = special.entr(self.p).sum(1) / math.log(2)
        return value

    def require_paired(self, other: Answers) -> None:
        """Raises EvidenceError unless both answer the same items."""
        if not (np.array_equal(self.gold, other.gold) and np.array_equal(self.cluster, other.cluster)):
            raise EvidenceError("answers to different items do not pair", where="confidence", fix="one task, one order")


_Column = Callable[[Answers], Float[np.ndarray, " n"]]
PER_ITEM: Mapping[str, tuple[Metric, _Column]] = {
    m.name: (m, column)
    for m, column in (
        (Metric("accuracy", "%", "higher", "share of items whose likeliest choice is right"), lambda a: a.correct),
        (Metric("p_true", "%", "higher", "probability of the right choice"), lambda a: a.p_true),
        (Metric("answer_nll", "nat", "lower", "-log p(right choice)"), lambda a: a.nll),
        (Metric("brier", "", "lower", "squared distance of the probabilities from the truth"), lambda a: a.brier),
        (Metric("confidence", "%", "higher", "probability of the likeliest choice"), lambda a: a.confidence),
        (Metric("entropy", "bit", "lower", "entropy over the choices"), lambda a: a.entropy),
    )
}
"""Metrics that are means over items: their differences pair item by item."""


def level(metric: str, answers: Answers, confidence: float = 0.95) -> Interval:
    """Mean of a metric of ``PER_ITEM`` of one model, clustered; two levels are compared by ``shift`` alone."""
    return paired_mean(PER_ITEM[metric][1](answers), answers.cluster, confidence)


def shift(metric: str, reference: Answers, candidate: Answers, confidence: float = 0.95) -> Interval:
    """Mean paired difference, candidate less reference, of a metric of ``PER_ITEM``; in its raw unit (shares, nats)."""
    reference.require_paired(candidate)
    column = PER_ITEM[metric][1]
    return paired_mean(column(candidate) - column(reference), reference.cluster, confidence)


def shift_by_confidence(
    reference: Answers, candidate: Answers, bins: int = 10, *, absolute: bool = False, confidence: float = 0.95
) -> list[Bucket]:
    """Mean change of p(true), or of its size, in equal groups of items from the reference's least sure to its surest.

    Groups within a single cluster have no error and are left out. O(n log n).
    """
    reference.require_paired(candidate)
    change = candidate.p_true - reference.p_true
    change = np.abs(change) if absolute else change
    sure, group = reference.confidence, quantile_group(reference.confidence, bins)
    members = [group == k for k in range(bins)]
    return [
        Bucket(float(sure[m].min()), float(sure[m].max()), paired_mean(change[m], reference.cluster[m], confidence))
        for m in members
        if len(np.unique(reference.cluster[m])) >= 2
    ]
