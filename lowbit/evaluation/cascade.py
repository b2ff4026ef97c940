"""A cascade before it is built: what a margin costs, and what it buys, from evidence on both models.

The low-bit model answers first; where its margin is below t, the 16-bit model does. The threshold is chosen on one
half of the clusters and reported on the other, since the best of many thresholds looks better than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics import disagreement
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.metrics.confidence import Answers
from lowbit.evaluation.metrics.influence import share
from lowbit.evaluation.statistics import Interval


class Gated(NamedTuple):
    """What a cascade would do on every item: a question, or a token of a text."""

    margin: Float[np.ndarray, " n"]
    """Of the low-bit model: probability of its first choice less that of its second."""
    low: Float[np.ndarray, " n"]
    """1 where its answer is as wanted: equal to the 16-bit model's, or right."""
    high: Float[np.ndarray, " n"]
    """The same of the 16-bit model; all 1 where equality is what is wanted."""
    cluster: Int[np.ndarray, " n"]


class Point(NamedTuple):
    """A cascade with one threshold."""

    margin: float
    escalated: Interval
    """Share of items that the 16-bit model answers."""
    outcome: Interval
    """Share of items whose answer is as wanted."""

    def cost(self, low: float, high: float) -> float:
        """Cost an item, where the two models cost ``low`` and ``high`` each (bytes read, seconds)."""
        return low + self.escalated.estimate * high


def agreement(reference: Answers, candidate: Answers) -> Gated:
    """A cascade that wants the reference's answers."""
    same = (~disagreement.disagrees(reference, candidate)).astype(np.float64)
    return Gated(-disagreement.margin(candidate.p), same, np.ones(len(same)), reference.cluster)


def accuracy(reference: Answers, candidate: Answers) -> Gated:
    """A cascade that wants right answers."""
    reference.require_paired(candidate)
    return Gated(-disagreement.margin(candidate.p), candidate.correct, reference.correct, reference.cluster)


def of_tokens(tokens: Tokens) -> Gated:
    """A cascade that wants the reference's first choices, token by token, each after the text's own beginning.

    Raises EvidenceError for evidence that does not hold the candidate's margin.
    """
    if tokens.margin is None:
        raise EvidenceError(
            "the evidence does not hold the candidate's own margin", where="cascade",
            why="the candidate's margin is what a cascade goes by", fix="score the candidate again",
        )  # fmt: skip
    same = (tokens.top1 == tokens.top1_ref).astype(np.float64)
    return Gated(tokens.margin.astype(np.float64), same, np.ones(len(same)), tokens.cluster)


def at(gated: Gated, margin: float, level: float = 0.95) -> Point:
    """What the threshold ``margin`` does; an item escalates where its margin is below it."""
    escalated = gated.margin < margin
    outcome = np.where(escalated, gated.high, gated.low)
    return Point(
        margin, share(escalated.astype(np.float64), gated.cluster, level), share(outcome, gated.cluster, level)
    )


def curve(gated: Gated, shares: Sequence[float] = (0, 0.05, 0.1, 0.2, 0.3, 0.5, 1)) -> list[Point]:
    """A point for each share of items that escalates, as near as ties allow."""
    return [at(gated, _threshold(gated.margin, s)) for s in shares]


class Choice(NamedTuple):
    """A threshold, and what it does."""

    chosen: Point
    """Where it was chosen: too good, being the best of many."""
    reported: Point
    """On clusters that had no say in it."""


def choose(gated: Gated, outcome: float, *, seed: int = 0, level: float = 0.95) -> Choice:
    """The least margin that reaches ``outcome`` on half of the clusters, and what it does on the other half.

    Raises EvidenceError with fewer than four clusters, and where even escalating all items does not reach it.
    """
    labels = np.unique(gated.cluster)
    if len(labels) < 4:
        raise EvidenceError(f"{len(labels)} clusters", where="cascade", why="each half needs two", fix="more items")
    half = np.random.default_rng(seed).permutation(labels)[: len(labels) // 2]
    mine = np.isin(gated.cluster, half)
    learn, test = (_part(gated, rows) for rows in (mine, ~mine))
    order = np.argsort(learn.margin, kind="stable")
    margin, low, high = learn.margin[order], learn.low[order], learn.high[order]
    # after the first k of the order have escalated; only between unequal margins is there a threshold
    reached = (np.concatenate([[0], high.cumsum()]) + low.sum() - np.concatenate([[0], low.cumsum()])) / len(low)
    possible = np.concatenate([[True], margin[1:] > margin[:-1], [True]])
    good = np.flatnonzero(possible & (reached >= outcome - 1e-12))
    if not len(good):
        raise EvidenceError(
            f"no margin reaches {outcome:.3%}, the best is {reached[possible].max():.3%}", where="cascade",
            fix="a smaller outcome",
        )  # fmt: skip
    threshold = 0.0 if good[0] == 0 else _above(margin, int(good[0]))
    return Choice(at(learn, threshold, level), at(test, threshold, level))


def _threshold(margin: Float[np.ndarray, " n"], escalated: float) -> float:
    count = round(escalated * len(margin))
    return 0.0 if count == 0 else _above(np.sort(margin), count)


def _above(ordered: Float[np.ndarray, " n"], count: int) -> float:
    """A threshold above the first ``count`` margins and, ties aside, below the next."""
    below = float(ordered[count - 1])
    return float(np.nextafter(1.0, 2.0)) if count == len(ordered) else (below + float(ordered[count])) / 2


def _part(gated: Gated, rows: Bool[np.ndarray, " n"]) -> Gated:
    return Gated(*(column[rows] for column in gated))
