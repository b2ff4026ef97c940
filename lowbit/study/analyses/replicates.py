"""Means over two things that were both drawn: the seeds of calibration windows, and the tokens that are scored.

A difference between calibration texts is uncertain twice: other windows of the same text would have given other
versions, and other tokens other losses. Both errors are estimated and their squares added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from lowbit.errors import EvidenceError
from lowbit.evaluation.statistics import Interval, paired_mean


def contrast(
    losses: Mapping[str, Float[np.ndarray, "seeds tokens"]],
    weights: Mapping[str, float],
    cluster: Int[np.ndarray, " tokens"],
    level: float = 0.95,
) -> Interval:
    """``Σ_t weights[t] · mean of losses[t]``, with an error that counts seeds and clusters of tokens.

    ``se² = Σ_t weights[t]² · s_t² / S_t + se_c²``: s_t is the standard deviation of the seeds' means of a text, se_c
    the cluster-robust error of the contrast averaged over seeds. What seed and token do only together is in both
    terms, so the interval is a little too wide, never too narrow, for crossed draws. Degrees of freedom by
    Welch-Satterthwaite, rounded down. Raises EvidenceError for a text with one seed: its spread cannot be told.
    """
    means = {t: losses[t].mean(1) for t in weights}
    if single := next((t for t, m in means.items() if len(m) < 2), None):
        raise EvidenceError(
            f"one seed of {single}", where="calibration", why="what the draw of the windows does is unknown then",
            fix="two seeds or more",
        )  # fmt: skip
    tokens = paired_mean(sum((w * losses[t].mean(0) for t, w in weights.items()), np.zeros(len(cluster))), cluster)
    parts = [(weights[t] ** 2 * float(m.var(ddof=1)) / len(m), len(m) - 1) for t, m in means.items()]
    parts.append((tokens.se**2, tokens.clusters - 1))
    variance = sum(v for v, _ in parts)
    df = max(1, math.floor(variance**2 / sum(v**2 / d for v, d in parts) + 1e-9)) if variance else parts[-1][1]
    half = float(special.stdtrit(df, (1 + level) / 2)) * math.sqrt(variance)
    e = tokens.estimate
    return Interval(
        e, e - half, e + half, math.sqrt(variance), len(cluster), df + 1, f"seeds and clusters, {df} df (Welch)"
    )


class Components(NamedTuple):
    """How much means differ between groups beyond what they differ inside them."""

    between: float
    """Standard deviation of the groups' true means, 0 where the seeds explain all."""
    within: float
    """Standard deviation of the seeds of one group, pooled."""
    low: float
    high: float
    """The 95 % interval of ``within``, for normal draws."""
    p: float
    """Of "the groups are one": the F test of the analysis of variance."""


def components(means: Sequence[Float[np.ndarray, "_"]]) -> Components:
    """One-way random effects of groups of seeds, whose numbers may differ (Searle 1971).

    Raises EvidenceError for fewer than two groups, or where none has two seeds.
    """
    sizes = np.array([len(m) for m in means], dtype=np.float64)
    total, groups = float(sizes.sum()), len(means)
    inside = int(total) - groups
    if groups < 2 or inside < 1:
        raise EvidenceError("two texts and two seeds at least", where="variance components", fix="more seeds")
    grand = float(np.concatenate(means).mean())
    squares = float(sum(((m - m.mean()) ** 2).sum() for m in means))
    ms_within = squares / inside
    ms_between = float(sum(len(m) * (m.mean() - grand) ** 2 for m in means)) / (groups - 1)
    size = (total - float((sizes**2).sum()) / total) / (groups - 1)
    p = float(special.fdtrc(groups - 1, inside, ms_between / ms_within)) if ms_within else float(ms_between == 0)
    low, high = (math.sqrt(squares / float(special.chdtri(inside, tail))) for tail in (0.025, 0.975))
    return Components(math.sqrt(max(0.0, (ms_between - ms_within) / size)), math.sqrt(ms_within), low, high, p)
