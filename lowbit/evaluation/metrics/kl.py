"""KL divergence of the candidate from the reference, in nats a token: how much, for which tokens, where.

The direction is KL(reference || candidate), the information lost by predicting with the candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from lowbit.evaluation.metrics.base import Bucket, Metric, Tokens, quantile_group
from lowbit.evaluation.statistics import Interval, cluster_quantile, paired_mean

KL = Metric("kl", "nat", "lower", "mean KL(reference || candidate) of the next-token distributions")
QUANTILES = (0.5, 0.9, 0.99, 0.999)
EDGES = (0, 16, 64, 256, 1024, 4096, 16384)


def mean(tokens: Tokens, level: float = 0.95) -> Interval:
    """Mean over tokens, clustered. A lower end that rounding or a wide error puts below 0 is cut at 0."""
    return _mean(tokens, np.ones(len(tokens), dtype=np.bool_), level)


def quantiles(tokens: Tokens, shares: Sequence[float] = QUANTILES, level: float = 0.95) -> list[Interval]:
    """Quantiles over tokens: median, p90, p99, p99.9 unless told otherwise, clustered."""
    return [cluster_quantile(tokens.kl, tokens.cluster, q, level) for q in shares]


def by_position(tokens: Tokens, edges: Sequence[int] = EDGES, level: float = 0.95) -> list[Bucket]:
    """Mean for positions from each edge up to, not including, the next; the last edge is open ended.

    A bucket's ends are the first and last position that occur in it. Positions before the first edge are left
    out; positions that a single cluster reaches have no error and form no bucket.
    """
    which = np.searchsorted(np.asarray(edges), tokens.pos, side="right")
    groups = (which == k for k in range(1, len(edges) + 1))
    return _buckets(tokens, tokens.pos.astype(np.float64), groups, level)


def by_confidence(
    tokens: Tokens, key: Literal["margin", "entropy"] = "margin", bins: int = 5, level: float = 0.95
) -> list[Bucket]:
    """Mean for ``bins`` equal groups of tokens, from the reference's smallest margin (or entropy) to its largest.

    Ties are split by order of appearance, so that groups stay equal. A group within one cluster forms no bucket.
    """
    values = tokens.margin_ref if key == "margin" else tokens.entropy_ref
    group = quantile_group(values.astype(np.float64), bins)
    return _buckets(tokens, values.astype(np.float64), (group == k for k in range(bins)), level)


def _buckets(
    tokens: Tokens, key: Float[np.ndarray, " n"], groups: Iterable[Bool[np.ndarray, " n"]], level: float
) -> list[Bucket]:
    return [
        Bucket(float(key[g].min()), float(key[g].max()), _mean(tokens, g, level))
        for g in groups
        if len(np.unique(tokens.cluster[g])) >= 2
    ]


def _mean(tokens: Tokens, chosen: Bool[np.ndarray, " n"], level: float) -> Interval:
    interval = paired_mean(tokens.kl[chosen].astype(np.float64), tokens.cluster[chosen], level)
    return interval._replace(low=min(max(interval.low, 0.0), interval.estimate))
