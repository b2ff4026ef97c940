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
    if n < 4 or y.shape != x.shape or not np.isfinite([x, y]).all():
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
