"""Statistics of paired, clustered comparisons: intervals, tests, power and multiplicity.

Items (tokens, questions) that share a document or a window are not independent, so every interval and test
here counts *clusters*. Two models are scored on the same items, so every function takes per-item *differences*.
The tests of this module are simulations: an interval must cover, a test must keep its level.

Sources: cluster-robust errors and pairing for evaluations, Miller 2024 (arXiv:2411.00640); CR1 and t with G-1
degrees of freedom, Cameron & Miller 2015 (section VI); few items, Bowyer et al. 2025 (arXiv:2503.01747).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from lowbit.errors import EvidenceError

Side = Literal["two-sided", "less", "greater"]

MANY_CLUSTERS = 30
MANY_ITEMS = 300
_EXACT_CLUSTERS = 20  # 2^20 sign patterns: 8 MiB and some milliseconds
_DRAWS_AT_ONCE = 500


class Interval(NamedTuple):
    """An estimate with its uncertainty; all four numbers are in the unit of the items."""

    estimate: float
    low: float
    high: float
    se: float
    """Standard error of the estimate, 0 where none can be told from the data (the method says so)."""
    n: int
    clusters: int
    method: str

    def scaled(self, factor: float) -> Interval:
        """The same interval in another unit; ``factor`` is positive (100 for percent)."""
        e, low, high, se = (x * factor for x in self[:4])
        return self._replace(estimate=e, low=low, high=high, se=se)


class PValue(NamedTuple):
    """A p-value and the name of the test that gave it."""

    p: float
    method: str


def paired_mean(d: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], level: float = 0.95) -> Interval:
    """Mean of per-item differences with a cluster-robust (CR1) error and Student's t on G-1 degrees of freedom.

    ``se = sqrt(G/(G-1) · Σ_c (Σ_{i in c} (d_i - mean))²) / n``. ``cluster`` holds any integer labels.
    Raises EvidenceError for no items, values that are not finite, or fewer than two clusters. O(n log n).
    """
    return cluster_ratio(d, np.ones(len(d)), cluster, level)


def cluster_ratio(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], level: float = 0.95
) -> Interval:
    """Ratio of sums ``Σa / Σb`` with a cluster-robust error by linearisation; ``paired_mean`` is the case b = 1.

    The error is that of the residuals ``a - ratio · b`` summed by cluster (Cochran 1977, section 6.3).
    Clusters whose ``b`` is all zero count for nothing. Raises EvidenceError as ``paired_mean``, and for Σb = 0.
    """
    top, weight = _cluster_sums(cluster, a, b)
    top, weight = top[weight != 0], weight[weight != 0]
    clusters = len(weight)
    if clusters < 2:
        raise EvidenceError(
            f"{clusters} cluster(s) in {len(a)} items",
            where="interval",
            why="Without a second independent cluster no standard error exists.",
            fix="score at least two windows or documents",
        )
    ratio = float(top.sum() / weight.sum())
    residual = top - ratio * weight
    se = float(np.sqrt(clusters / (clusters - 1) * (residual @ residual)) / abs(weight.sum()))
    half = float(special.stdtrit(clusters - 1, (1 + level) / 2)) * se
    return Interval(ratio, ratio - half, ratio + half, se, len(a), clusters, f"cluster t, {clusters - 1} df")


def cluster_quantile(
    d: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], q: float, level: float = 0.95
) -> Interval:
    """Quantile of ``d``: the smallest value that at least a share ``q`` of the items does not exceed.

    The share of items at or below that value has a clustered interval; the values at its two ends are the interval
    of the quantile (Woodruff 1952). Resampling whole clusters covers less (89 % against 95 % at p99 of 15 windows)
    and costs a thousand times more. Where too few items lie beyond, the high end is the largest value seen and the
    method says so. Raises EvidenceError as ``paired_mean``. O(n log n).
    """
    value = np.sort(d.astype(np.float64))
    estimate = _at(value, q)
    below = paired_mean((d <= estimate).astype(np.float64), cluster, level)
    half = (below.high - below.low) / 2
    low, high = _at(value, q - half), _at(value, q + half)
    t = float(special.stdtrit(below.clusters - 1, (1 + level) / 2))
    method = below.method if high < value[-1] else f"{below.method}; high end is the largest value seen"
    return Interval(estimate, low, high, (high - low) / (2 * t), below.n, below.clusters, method)


def _at(value: Float[np.ndarray, " n"], share: float) -> float:
    # the slack makes 0.9 of 10 items the ninth, whatever 0.9 * 10 rounds to
    rank = math.ceil(share * len(value) * (1 - 1e-12))
    return float(value[min(max(rank, 1), len(value)) - 1])


def p_value(interval: Interval, null: float = 0.0, side: Side = "two-sided") -> float:
    """Student's t on clusters-1 degrees of freedom against ``null``; "less" doubts that the truth is >= null.

    An interval with no spread at all (se = 0) gives 0 or 1: the estimate lies on the tested side or it does not.
    """
    gap = interval.estimate - null
    if side == "less":
        gap = -gap
    if interval.se == 0:
        return float(gap == 0 if side == "two-sided" else gap <= 0)
    t = gap / interval.se
    if side == "two-sided":
        return float(2 * special.stdtr(interval.clusters - 1, -abs(t)))
    return float(special.stdtr(interval.clusters - 1, -t))


def tost(interval: Interval, margin: float) -> float:
    """Equivalence: the p-value of the claim that the truth lies within ±``margin`` (two one-sided t tests).

    Schuirmann 1987. Small means "shown to be the same"; a large p shows nothing.
    """
    return max(p_value(interval, -margin, "greater"), p_value(interval, margin, "less"))


def sign_flip(d: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], *, draws: int = 9999, seed: int = 0) -> float:
    """Two-sided permutation p-value of "mean d is 0": each cluster's sum keeps or changes its sign.

    Exact over all 2^G patterns up to 20 clusters with a sum that is not 0, seeded Monte Carlo beyond, counting
    the data as one draw (Phipson & Smyth 2010). For 0/1 items and clusters of one it is the exact McNemar test.
    No p is below 2/2^G: five clusters can never reach 5 %. Assumes sums symmetric about 0 under the null.
    """
    (sums,) = _cluster_sums(cluster, d)
    sums = sums[sums != 0]
    least = abs(sums.sum()) * (1 - 1e-9)  # patterns that tie up to rounding count as ties
    if len(sums) <= _EXACT_CLUSTERS:
        total = np.zeros(1)
        for s in sums[1:]:  # by symmetry the first sign may be held
            total = np.concatenate([total - s, total + s])
        first = sums[0] if len(sums) else 0.0
        return float(np.mean(np.abs(total + first) >= least))
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, draws, _DRAWS_AT_ONCE):
        signs = rng.integers(0, 2, (min(_DRAWS_AT_ONCE, draws - start), len(sums)), dtype=np.int8) * 2.0 - 1
        hits += int(np.sum(np.abs(signs @ sums) >= least))
    return (1 + hits) / (1 + draws)


def paired_test(d: Float[np.ndarray, " n"], cluster: Int[np.ndarray, " n"]) -> PValue:
    """Is the mean difference 0? Student's t on clusters where sums are near normal, sign flips otherwise.

    Near normal means 30 clusters, or 300 items, whose difference is not 0: ten windows of a thousand tokens
    each do (the level is checked by simulation), five flips among a thousand windows do not.
    """
    if np.count_nonzero(d) >= MANY_ITEMS or np.count_nonzero(_cluster_sums(cluster, d)) >= MANY_CLUSTERS:
        interval = paired_mean(d, cluster)
        return PValue(p_value(interval), interval.method)
    return PValue(sign_flip(d, cluster), "sign flips of clusters")


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided McNemar p-value: are ``lost`` and ``gained`` items equally likely? 1 when there are none.

    Binomial(lost + gained, 1/2), for items that are independent of each other; use ``paired_test`` on clusters.
    """
    return min(1.0, 2 * float(special.bdtr(min(lost, gained), lost + gained, 0.5)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): below alpha, and the chance of any false claim stays below alpha."""
    p = np.asarray(ps, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return _unsorted(stepped, order)


def benjamini_hochberg(ps: Sequence[float]) -> list[float]:
    """Benjamini & Hochberg's adjustment (1995): claims below alpha hold at most a share alpha of false ones.

    For exploring sweeps; tests must be independent or positively dependent, as versions of one model are.
    """
    p = np.asarray(ps, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
    return _unsorted(stepped, order)


def _unsorted(stepped: Float[np.ndarray, " k"], order: Int[np.ndarray, " k"]) -> list[float]:
    adjusted = np.empty(len(stepped))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(x) for x in adjusted]


def minimum_detectable_effect(flip_share: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest accuracy difference (a share) that ``n`` independent paired items find with ``power``.

    ``(z_{1-alpha/2} + z_power) · sqrt(f/n)``, 2.80·sqrt(f/n) by default, where a share f of items changes.
    For planning a run; after one, ``detectable`` uses its clusters.
    """
    return float(special.ndtri(1 - alpha / 2) + special.ndtri(power)) * math.sqrt(flip_share / n)


def detectable(interval: Interval, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest effect that evidence with this error finds with ``power``: 2.80 · se for many clusters.

    Few clusters take quantiles of t with clusters-1 degrees of freedom. With no spread, the half width.
    """
    if interval.se == 0:
        return (interval.high - interval.low) / 2
    df = interval.clusters - 1
    return float(special.stdtrit(df, 1 - alpha / 2) + special.stdtrit(df, power)) * interval.se


def clopper_pearson(k: int, n: int, level: float = 0.95) -> Interval:
    """Exact interval for the share k/n of independent items (Clopper & Pearson 1934); covers at least ``level``."""
    _share_of(k, n)
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(special.betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(special.betaincinv(k + 1, n - k, 1 - tail))
    return Interval(k / n, low, high, math.sqrt(k * (n - k) / n**3), n, n, "Clopper-Pearson")


def beta_binomial(k: int, n: int, level: float = 0.95) -> Interval:
    """Interval for a share from few independent items: quantiles of Beta(1+k, 1+n-k), a uniform prior.

    Shorter than ``clopper_pearson`` and covers ``level`` on average over shares (Bowyer et al. 2025, section 3).
    The estimate stays k/n; ``se`` is the posterior standard deviation.
    """
    _share_of(k, n)
    a, b = 1 + k, 1 + n - k
    low, high = (float(special.betaincinv(a, b, x)) for x in ((1 - level) / 2, (1 + level) / 2))
    return Interval(k / n, low, high, math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))), n, n, "Beta-Binomial")


def _share_of(k: int, n: int) -> None:
    if not 0 <= k <= n or n == 0:
        raise EvidenceError(f"{k} of {n} items is no share", where="interval", fix="0 <= k <= n and n >= 1")


def _cluster_sums(cluster: Int[np.ndarray, " n"], *columns: Float[np.ndarray, " n"]) -> list[Float[np.ndarray, " g"]]:
    """Sums of each column by cluster, in float64; the one gate that all evidence passes."""
    for d in columns:
        bad = int(np.count_nonzero(~np.isfinite(d)))
        if bad or not len(d):
            raise EvidenceError(
                f"{bad} of {len(d)} values are NaN or infinite" if bad else "no items",
                where="statistics",
                why="A mean over them would mean nothing, and dropping them would flatter the model.",
                fix="look for the first layer whose output is not finite" if bad else "score at least two windows",
            )
    member = np.unique(cluster, return_inverse=True)[1]
    return [np.bincount(member, weights=d.astype(np.float64)) for d in columns]
