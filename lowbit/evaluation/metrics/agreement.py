"""Do candidate and reference choose the same token, and what became right or wrong where they do not?

Accuracy hides flips that cancel (Dutta et al. 2024, arXiv:2407.09141), so the flips are counted and listed.
All intervals are shares in [0, 1]; the ``Metric`` records are shown in percent.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int8

from lowbit.evaluation.metrics.base import Metric, Tokens, quantile_group
from lowbit.evaluation.statistics import Interval, clopper_pearson, cluster_ratio, paired_mean

TOP1_KEPT = Metric("top1_kept", "%", "higher", "tokens where both have the same first choice", ideal=100.0)
TOP1_ACCURACY = Metric("top1_accuracy", "%", "higher", "tokens where the candidate's first choice is the text's")
DELTA_TOP1_ACCURACY = Metric(
    "delta_top1_accuracy", "pp", "higher", "top-1 accuracy of the candidate less that of the reference, paired"
)

Kind = Literal["lost", "gained", "other"]


class Flips(NamedTuple):
    """How many tokens changed their first choice, by what that did to correctness."""

    lost: int
    """Right before, wrong now."""
    gained: int
    """Wrong before, right now."""
    other: int
    """Wrong before and wrong now, in another way."""


class FlipRow(NamedTuple):
    """One changed choice, for a person to read."""

    row: int
    """Index into the ``Tokens``."""
    doc: int
    chunk: int
    pos: int
    token: int
    top1_ref: int
    top1: int
    margin_ref: float
    kind: Kind


def top1_kept(tokens: Tokens, level: float = 0.95) -> Interval:
    """Share of tokens whose first choice is the reference's, clustered.

    Where all (or none) are kept no spread is seen, and the interval is Clopper-Pearson's for independent tokens.
    """
    return _share(tokens.top1 == tokens.top1_ref, tokens, level)


def top1_accuracy(tokens: Tokens, level: float = 0.95) -> Interval:
    """Share of tokens whose first choice is the text's, clustered; a level, to be compared only by ``delta``."""
    return _share(tokens.top1 == tokens.token, tokens, level)


def flips(tokens: Tokens) -> Flips:
    """Counts of changed first choices; their sum is the number of tokens not kept."""
    change = accuracy_change(tokens)
    lost, gained = int(np.sum(change < 0)), int(np.sum(change > 0))
    return Flips(lost, gained, int(np.sum(tokens.top1 != tokens.top1_ref)) - lost - gained)


def accuracy_change(tokens: Tokens) -> Int8[np.ndarray, " n"]:
    """-1 where a right choice was lost, +1 where one was gained, else 0."""
    now, before = tokens.top1 == tokens.token, tokens.top1_ref == tokens.token
    change: Int8[np.ndarray, " n"] = now.astype(np.int8) - before.astype(np.int8)
    return change


def delta_accuracy(tokens: Tokens, level: float = 0.95) -> Interval:
    """Share gained less share lost, paired and clustered; negative is worse.

    With neither, no spread is seen: the half width is Clopper-Pearson's limit on the share of flips.
    """
    change = accuracy_change(tokens).astype(np.float64)
    interval = paired_mean(change, tokens.cluster, level)
    if change.any():
        return interval
    limit = clopper_pearson(0, len(tokens), level)
    return interval._replace(low=-limit.high, high=limit.high, method=f"no flips, {limit.method}")


def flips_in_lowest_margin(tokens: Tokens, bins: int = 5, level: float = 0.95) -> Interval | None:
    """Share of the changed choices that fall where the reference was least sure (lowest of ``bins`` by margin).

    Above 1/bins, flips are near-ties rather than damage. None where fewer than two clusters changed anything.
    """
    flipped = tokens.top1 != tokens.top1_ref
    if len(np.unique(tokens.cluster[flipped])) < 2:
        return None
    low = flipped & (quantile_group(tokens.margin_ref.astype(np.float64), bins) == 0)
    return cluster_ratio(_float(low), _float(flipped), tokens.cluster, level)


def flip_rows(tokens: Tokens, k: int | None = None) -> list[FlipRow]:
    """The changed choices (the first ``k``), the most surprising first: by the reference's margin, descending."""
    rows = np.flatnonzero(tokens.top1 != tokens.top1_ref)
    rows = rows[np.argsort(-tokens.margin_ref[rows], kind="stable")][:k]
    change = accuracy_change(tokens)
    kinds: dict[int, Kind] = {-1: "lost", 1: "gained", 0: "other"}
    return [
        FlipRow(
            row=int(i),
            doc=int(tokens.doc[i]),
            chunk=int(tokens.chunk[i]),
            pos=int(tokens.pos[i]),
            token=int(tokens.token[i]),
            top1_ref=int(tokens.top1_ref[i]),
            top1=int(tokens.top1[i]),
            margin_ref=float(tokens.margin_ref[i]),
            kind=kinds[int(change[i])],
        )
        for i in rows
    ]


def _share(mask: Bool[np.ndarray, " n"], tokens: Tokens, level: float) -> Interval:
    interval = paired_mean(_float(mask), tokens.cluster, level)
    if interval.estimate in (0.0, 1.0):
        exact = clopper_pearson(int(mask.sum()), len(mask), level)
        return exact._replace(clusters=interval.clusters)
    return interval._replace(low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def _float(mask: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return mask.astype(np.float64)
