"""What a metric is called, and what happened at every scored token.

Metrics are pure functions of ``Tokens``: a new metric needs no new forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int32, Shaped

from lowbit.errors import EvidenceError
from lowbit.evaluation.statistics import MANY_CLUSTERS, Interval


@dataclass(frozen=True)
class Metric:
    """A metric's name, the unit it is shown in, and which way is better."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    description: str
    ideal: float = 0.0
    """The value, in ``unit``, of a candidate that equals the reference."""


class Bucket(NamedTuple):
    """A metric over the tokens whose key (position, margin, ...) runs from ``low`` to ``high``, both included."""

    low: float
    high: float
    interval: Interval


@dataclass(frozen=True, eq=False)
class Tokens:
    """One candidate beside its reference, one entry a scored token; ``_ref`` marks the reference's columns.

    Raises EvidenceError for no tokens, columns of unequal length, or values that are NaN or infinite.
    """

    doc: Int32[np.ndarray, " n"]
    """Document."""
    chunk: Int32[np.ndarray, " n"]
    """Window, numbered over the whole evidence (not within a document)."""
    pos: Int32[np.ndarray, " n"]
    """Position of the target in its window."""
    token: Int32[np.ndarray, " n"]
    """The target: the token that the text has here."""
    nll: Float32[np.ndarray, " n"]
    """-log p(target) in nats."""
    nll_ref: Float32[np.ndarray, " n"]
    kl: Float32[np.ndarray, " n"]
    """KL(reference || candidate) over the whole vocabulary, in nats."""
    top1: Int32[np.ndarray, " n"]
    """The most likely token."""
    top1_ref: Int32[np.ndarray, " n"]
    margin_ref: Float32[np.ndarray, " n"]
    """Probability of the reference's first choice less that of its second."""
    top1_p: Float32[np.ndarray, " n"]
    """Probability of the candidate's first choice."""
    entropy_ref: Float32[np.ndarray, " n"]
    """Entropy of the reference's prediction in nats."""
    margin: Float32[np.ndarray, " n"] | None = None
    """Probability of the candidate's first choice less that of its second; None where it was not kept."""

    def __post_init__(self) -> None:
        n = len(self.doc)
        _require_length(self.columns())
        for name, column in self.columns().items():
            bad = int(np.count_nonzero(~np.isfinite(column)))
            if bad:
                raise EvidenceError(
                    f"{bad} of {n} values are NaN or infinite",
                    where=f"tokens.{name}",
                    why="A mean over the other tokens would flatter the model.",
                    fix="look for the first layer whose output is not finite",
                )

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Tokens:
        """From named columns of any numeric array type (a Parquet table's, say), cast to the stated types.

        Further columns are ignored; a missing one raises EvidenceError, but for ``margin``.
        """
        missing = [name for name in _DTYPES if name not in columns and name not in _OPTIONAL]
        if missing:
            raise EvidenceError(f"no column {', '.join(missing)}", where="tokens", fix="score the candidate again")
        cast = {name: np.asarray(columns[name]).astype(dtype) for name, dtype in _DTYPES.items() if name in columns}
        _require_length(cast)
        return cls(**cast)

    def columns(self) -> dict[str, Shaped[np.ndarray, " n"]]:
        """Every column that is there by name, in the order of the fields."""
        held = {name: getattr(self, name) for name in _DTYPES}
        return {name: column for name, column in held.items() if column is not None}

    def __len__(self) -> int:
        return len(self.doc)

    @cached_property
    def cluster(self) -> Int32[np.ndarray, " n"]:
        """What is independent: the coarser of document and window that still gives 30 clusters, else the finer.

        Windows of one document resemble each other, and so do documents packed into one window; but a text
        that is one document leaves only its windows.
        """
        docs, chunks = len(np.unique(self.doc)), len(np.unique(self.chunk))
        coarse, fine = (self.doc, self.chunk) if docs <= chunks else (self.chunk, self.doc)
        return coarse if min(docs, chunks) >= MANY_CLUSTERS else fine

    @cached_property
    def identical(self) -> bool:
        """Whether candidate and reference agree bit for bit wherever they were looked at."""
        same = not self.kl.any() and np.array_equal(self.nll, self.nll_ref)
        return same and np.array_equal(self.top1, self.top1_ref)

    def require_same_positions(self, other: Tokens) -> None:
        """Raises EvidenceError unless both hold the same targets at the same places, in the same order."""
        for name in ("doc", "chunk", "pos", "token"):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise EvidenceError(
                    f"the two pieces of evidence differ in {name!r} ({len(self)} and {len(other)} tokens)",
                    where="tokens",
                    why="A paired comparison needs the same tokens in the same windows on both sides.",
                    fix="score both with one text, window length and tokenizer",
                )


def _require_length(columns: Mapping[str, Shaped[np.ndarray, ...]]) -> None:
    n = len(columns["doc"])
    for name, column in columns.items():
        if column.shape != (n,) or n == 0:
            raise EvidenceError(f"values of shape {column.shape} beside {n} tokens", where=f"tokens.{name}")


_INTEGER = frozenset({"doc", "chunk", "pos", "token", "top1", "top1_ref"})
_OPTIONAL = frozenset({"margin"})
_DTYPES = {f.name: np.int32 if f.name in _INTEGER else np.float32 for f in fields(Tokens)}


def quantile_group(values: Float[np.ndarray, " n"], bins: int) -> Int[np.ndarray, " n"]:
    """For each value its group 0..bins-1 by rank, ties in order of appearance; sizes differ by at most one."""
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    return rank * bins // len(values)
