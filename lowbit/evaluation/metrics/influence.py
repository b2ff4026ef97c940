"""Intervals of estimates that are no plain means, from what each item adds to their error.

An estimate with influences ψ moves by Σ ψ_i when the data move a little; its variance is that of the sum, taken over
clusters as for a mean. Means, ratios, areas under curves and regression lines all have the same interval this way, and
the difference of two models on the same items is the interval of the difference of their influences.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from lowbit.evaluation.statistics import Interval, paired_mean


def interval(
    estimate: float, influence: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], level: float, method: str
) -> Interval:
    """``estimate`` ± t · se with the cluster-robust (CR1) error of ``influence``, whose sum is 0.

    Raises EvidenceError as ``paired_mean``.
    """
    found = paired_mean(len(influence) * influence, cluster, level)
    half = found.high - found.estimate
    return found._replace(
        estimate=estimate, low=estimate - half, high=estimate + half, method=f"{method}, {found.method}"
    )


def share(hit: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], level: float = 0.95) -> Interval:
    """A share of items that are 0 or 1: quantiles of a Beta with a uniform prior at the effective number of items.

    That number is n over the design effect of the clusters, at least 1, and less where the clusters are few (Korn &
    Graubard 1998), so the interval stays within [0, 1] and covers for shares near 0 and 1 and in small groups. Where
    all items are alike, or there is one cluster, each cluster counts as one item.
    """
    n, clusters, estimate = len(hit), len(np.unique(cluster)), float(hit.mean())
    effective = float(min(n, clusters))
    if clusters >= 2 and 0 < estimate < 1:
        design = (paired_mean(hit, cluster).se ** 2) / (estimate * (1 - estimate) / n)
        few = float(special.stdtrit(n - 1, (1 + level) / 2) / special.stdtrit(clusters - 1, (1 + level) / 2))
        effective = n / max(design, 1.0) * few**2
    a, b = 1 + estimate * effective, 1 + (1 - estimate) * effective
    low, high = (float(special.betaincinv(a, b, x)) for x in ((1 - level) / 2, (1 + level) / 2))
    se = math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)))
    return Interval(estimate, min(low, estimate), max(high, estimate), se, n, clusters, "Beta at the effective n")
