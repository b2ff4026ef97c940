"""Losses of many versions, and the error of any weighted sum of them: a difference, a point between two sizes, a mean.

    Shared    the same tokens, of models of one tokenizer: errors are those of token-by-token differences, by cluster
    Apart     a loss and its standard error each, of unlike texts: errors are independent

What versions share (a hard page is hard for all) cancels in a difference, but only where it is known: ``Shared`` is the
sharper by far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from scipy import special

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.statistics import Interval, cluster_ratio

NORMAL = 1_000_001  # clusters at which Student's t is the normal to six digits


@runtime_checkable
class Losses(Protocol):
    """The losses of some versions, in an order, with what is known of their errors."""

    def weighted(self, weights: Float[np.ndarray, " versions"], level: float = 0.95) -> Interval:
        """The sum of losses times ``weights``: +1 and -1 for a difference."""

    def drawn(self, count: int, seed: int) -> Float[np.ndarray, "draws versions"]:
        """The losses of all versions as another text might have given them, ``count`` times."""


@dataclass(frozen=True, eq=False)
class Shared:
    """Losses on the same tokens, summed by cluster. Raises EvidenceError for fewer than two clusters."""

    sums: Float[np.ndarray, "versions clusters"]
    tokens: Float[np.ndarray, " clusters"]

    def __post_init__(self) -> None:
        if len(self.tokens) < 2:
            raise EvidenceError(
                f"{len(self.tokens)} cluster", where="losses", why="an error needs a second one",
                fix="score at least two windows",
            )  # fmt: skip

    @classmethod
    def of(cls, versions: Sequence[Tokens]) -> Shared:
        """From token evidence of one or several models; raises EvidenceError unless all hold the same tokens."""
        for other in versions[1:]:
            versions[0].require_same_positions(other)
        member = np.unique(versions[0].cluster, return_inverse=True)[1]
        sums = np.array([np.bincount(member, t.nll.astype(np.float64)) for t in versions])
        return cls(sums, np.bincount(member).astype(np.float64))

    def weighted(self, weights: Float[np.ndarray, " versions"], level: float = 0.95) -> Interval:
        """With a cluster-robust error and Student's t: the paired test of ``lowbit compare`` for two versions."""
        clusters = np.arange(len(self.tokens))
        return cluster_ratio(weights @ self.sums, self.tokens, clusters, level)._replace(n=int(self.tokens.sum()))

    def drawn(self, count: int, seed: int) -> Float[np.ndarray, "draws versions"]:
        """Whole clusters drawn anew with replacement, the same for all versions (the bootstrap)."""
        groups = len(self.tokens)
        times = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=count)
        found: Float[np.ndarray, "draws versions"] = (times @ self.sums.T) / (times @ self.tokens)[:, None]
        return found


@dataclass(frozen=True, eq=False)
class Apart:
    """Losses with standard errors that have nothing in common."""

    loss: Float[np.ndarray, " versions"]
    se: Float[np.ndarray, " versions"]

    def weighted(self, weights: Float[np.ndarray, " versions"], level: float = 0.95) -> Interval:
        """With the normal's quantiles; ``n`` is the number of losses that count."""
        value, se = float(weights @ self.loss), float(np.sqrt(weights**2 @ self.se**2))
        half, n = float(special.ndtri((1 + level) / 2)) * se, int(np.count_nonzero(weights))
        return Interval(value, value - half, value + half, se, n, NORMAL, "normal, independent errors")

    def drawn(self, count: int, seed: int) -> Float[np.ndarray, "draws versions"]:
        """Each loss from its own normal."""
        noise = np.random.default_rng(seed).normal(size=(count, len(self.loss)))
        found: Float[np.ndarray, "draws versions"] = self.loss + self.se * noise
        return found
