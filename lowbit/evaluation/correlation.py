"""Perplexity as a proxy: how far it foretells each task over the low-bit versions of a sweep, and where it does not.

Over 3- and 4-bit models the mean |r| of perplexity and task scores was 0.79 in arXiv:2402.16775, but 0.22 for
summaries, and of the wrong sign for bias. So the table is part of any sweep that ranks by perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special, stats

from lowbit.errors import EvidenceError
from lowbit.evaluation.statistics import Interval

WEAK = 0.6
"""Below this |r| a task is not foretold: perplexity explains a third of its variance at most."""


LEAST = 4
"""Versions below which there is no correlation to speak of."""
_DRAWS = 2000


class Correlation(NamedTuple):
    """Of log-perplexity and one task's score over the versions of a sweep."""

    task: str
    pearson: Interval
    """With Fisher's interval; it describes versions like these, which were not drawn at random."""
    spearman: float
    """Of the ranks: what counts where versions are only ordered."""
    warning: str
    """Empty where perplexity foretells this task."""


def proxy(
    log_perplexity: Float[np.ndarray, " versions"], scores: Mapping[str, Float[np.ndarray, " versions"]],
    *, weak: float = WEAK, level: float = 0.95,
) -> list[Correlation]:  # fmt: skip
    """How well log-perplexity foretells each task (higher scores are better), the weakest first.

    Raises EvidenceError for fewer than four versions or columns of another length or with NaN. A task whose score
    never changes has no correlation; it comes first, as NaN with a warning.
    """
    found = [_correlation(task, log_perplexity, score, weak, level) for task, score in scores.items()]
    return sorted(found, key=lambda c: abs(c.pearson.estimate) if math.isfinite(c.pearson.estimate) else -1)


def _correlation(
    task: str, x: Float[np.ndarray, " versions"], y: Float[np.ndarray, " versions"], weak: float, level: float
) -> Correlation:
    n = len(x)
    if n < LEAST or y.shape != x.shape or not np.isfinite([x, y]).all():
        raise EvidenceError(
            f"{n} perplexities and {len(y)} scores, or NaN among them", where=task,
            why="a correlation needs four versions at least", fix="a sweep of twelve or more",
        )  # fmt: skip
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        nothing = Interval(math.nan, -1.0, 1.0, math.nan, n, n, "no spread")
        return Correlation(task, nothing, math.nan, "does not change over these versions: nothing to foretell")
    r, rank = float(stats.pearsonr(x, y).statistic), float(stats.spearmanr(x, y).statistic)
    se = 1 / math.sqrt(n - 3)
    z, half = math.atanh(max(min(r, 1 - 1e-15), -1 + 1e-15)), float(special.ndtri((1 + level) / 2)) * se
    interval = Interval(r, math.tanh(z - half), math.tanh(z + half), se * (1 - r * r), n, n, "Fisher z")
    if abs(r) < weak:
        warning = f"|r| {abs(r):.2f} is below {weak:g}: perplexity does not foretell this task, measure it"
    elif r > 0:
        warning = "rises with perplexity: what is worse by perplexity is better here, measure it"
    elif min(abs(interval.low), abs(interval.high)) < weak or interval.low * interval.high < 0:
        warning = f"|r| may be below {weak:g} (interval {interval.low:.2f} to {interval.high:.2f}): more versions"
    else:
        warning = ""
    return Correlation(task, interval, rank, warning)


def p_weak(found: Correlation, weak: float = WEAK, *, shown: bool = False) -> float:
    """The p-value of "perplexity foretells this task with |r| of ``weak`` or more": small shows that it does not.

    With ``shown`` that of the opposite: small shows that it does, and in the right direction (scores fall). Normal, by
    Fisher's z. 1 where there is no correlation.
    """
    r, n = found.pearson.estimate, found.pearson.n
    if not math.isfinite(r):
        return 1.0
    size = -r if shown else abs(r)
    z = (math.atanh(max(min(size, 1 - 1e-15), -1 + 1e-15)) - math.atanh(weak)) * math.sqrt(n - 3)
    return float(special.ndtr(-z if shown else z))


def mean_foretold(
    log_perplexity: Float[np.ndarray, " versions"], scores: Mapping[str, Float[np.ndarray, " versions"]],
    *, level: float = 0.95, seed: int = 0,
) -> Interval:  # fmt: skip
    """The mean over tasks of -r, with percentiles of versions drawn anew (tasks share their versions).

    Signs count: a mean of |r| is above 0 for noise. Tasks without spread in a draw count as 0 there. Raises
    EvidenceError for fewer than four versions or no task.
    """
    n = len(log_perplexity)
    if n < LEAST or not scores:
        raise EvidenceError(
            f"{n} versions and {len(scores)} tasks", where="mean of correlations", fix="four versions, one task"
        )
    table = np.array([log_perplexity, *scores.values()])
    rng = np.random.default_rng(seed)
    drawn = np.array([_mean_r(table[:, rng.integers(0, n, n)]) for _ in range(_DRAWS)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(_mean_r(table), float(low), float(high), float(drawn.std(ddof=1)), n, n, f"{_DRAWS} times")


def _mean_r(table: Float[np.ndarray, "rows versions"]) -> float:
    """Minus the mean correlation of the first row with the others."""
    centred = table - table.mean(axis=1, keepdims=True)
    norm = np.sqrt((centred**2).sum(axis=1))
    product = centred[1:] @ centred[0]
    scale = norm[1:] * norm[0]
    return -float(np.mean(np.divide(product, scale, out=np.zeros_like(product), where=scale > 1e-12)))
