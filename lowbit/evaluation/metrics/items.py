"""Items: what one model did on one task, an entry a question. Every task metric is a pure function of it.

Choice tasks hold the log-likelihood of every choice; generation tasks what was written. Ragged columns are flat, with
``starts``: the choices of item i are ``starts[i]:starts[i + 1]``, the tokens it wrote ``written_starts[i]:...``.
Two models are compared item by item: ``require_paired`` says whether that is allowed.

    items.parquet    one row an item (lists for the ragged columns), zstd, with the ItemsProvenance as metadata
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, Int32, Int64, Shaped

from lowbit.errors import EvidenceError

ITEMS = "items.parquet"
_METADATA = b"lowbit-items"

NO_ROLE, BIASED, COUNTER, UNRELATED = 0, 1, 2, 3
"""Roles of choices in tests of bias: the answer a stereotype would give, its opposite, and one of neither kind
(BBQ's "cannot be known", StereoSet's meaningless word)."""


@dataclass(frozen=True)
class ItemsProvenance:
    """Where items come from; identities are digests, ``task`` and ``dtype`` are for people."""

    model: str
    """``Scorer.identity`` of the model that answered: weights, dtype, kernels, cache."""
    reference: str
    """The same of the model whose answers this one was held against; equal to ``model`` for the reference itself."""
    task: str
    task_digest: str
    """Of the records, the prompts' definition and the limit: equal digests mean the same questions, asked alike."""
    tokenizer: str
    """Digest of the vocabulary and of how it encodes."""
    dtype: str

    def require_comparable(self, other: ItemsProvenance) -> None:
        """Raises EvidenceError unless both answered the same questions, tokenized alike, beside one reference."""
        for field in ("task", "task_digest", "tokenizer", "reference"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise EvidenceError(
                    f"{field} differs: {mine} and {theirs}", where=self.task,
                    why="only answers to the same questions pair", fix="run the task on both models again",
                )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Items:
    """One model's answers to one task, in the order of the task's records.

    Raises EvidenceError for no items, columns of unequal length, starts that do not rise from 0 to the end, an id
    twice, a ``pred`` or ``gold`` that is no choice, or numbers that are NaN or infinite.
    """

    id: Shaped[np.ndarray, " n"]
    """Name of the record, unique in the task (strings)."""
    group: Shaped[np.ndarray, " n"]
    """The task's own label: MMLU's subject, BBQ's context condition, the depth of a needle; "" where it has none."""
    cluster: Int32[np.ndarray, " n"]
    """Items that are not independent of each other share a number: a passage, a template, a seed."""
    doc_hash: Shaped[np.ndarray, " n"]
    """Digest of the record (strings, 16 hex digits)."""
    prompt_hash: Shaped[np.ndarray, " n"]
    """Digest of all text that the model was shown, choices included (strings, 16 hex digits)."""
    starts: Int64[np.ndarray, " n+1"]
    """Where the choices of each item begin; equal neighbours mean that it has none."""
    logprob: Float32[np.ndarray, " m"]
    """Sum over the choice's tokens of log p(token | context), in nats. A sentence without context follows the
    tokenizer's begin (or end) token. Cloze tasks have one choice, the target; in dialogue it is what the reference
    wrote, and other generation has none."""
    tokens: Int32[np.ndarray, " m"]
    """Tokens that ``logprob`` is over."""
    chars: Int32[np.ndarray, " m"]
    """Characters of the choice, without its leading space."""
    true: Bool[np.ndarray, " m"]
    """Whether the choice is right; several may be (TruthfulQA mc2), none is where nothing is (pairs of sentences)."""
    role: Int8[np.ndarray, " m"]
    """NO_ROLE, BIASED, COUNTER or UNRELATED."""
    pred: Int32[np.ndarray, " n"]
    """Index, within the item, of the likeliest choice (the first of equals); -1 in generation tasks. In cloze tasks 0
    where the greedy continuation is the target, else -1."""
    gold: Int32[np.ndarray, " n"]
    """Index of the right choice; -1 where there is none, or more than one."""
    score: Float32[np.ndarray, " n"]
    """The task's own number for the item, higher is better in [0, 1]: 1 right, 0 wrong; mass on the true choices for
    mc2; 1 where the stereotyped sentence is likelier for pairs (there neither is better); the share of the
    reference's answer kept for dialogue."""
    margin: Float32[np.ndarray, " n"]
    """How sure: the probability of the first choice less that of the second, where the probabilities of an item's
    choices are made to sum to 1; for cloze the probability of the target; in generation the smallest margin between
    the first two tokens of the vocabulary among the tokens written."""
    length: Int32[np.ndarray, " n"]
    """Tokens written; 0 in choice tasks."""
    stop_reason: Shaped[np.ndarray, " n"]
    """Why writing ended (strings): "stop" a stop text, "eos" the end token, "length" it was cut; "" in choice tasks."""
    parse_ok: Bool[np.ndarray, " n"]
    """Whether an answer was found in what was written; True in choice tasks."""
    answer: Shaped[np.ndarray, " n"]
    """The answer found in what was written (strings); "" in choice tasks and where none was found."""
    text: Shaped[np.ndarray, " n"]
    """What was written, stop text left out (strings)."""
    written_starts: Int64[np.ndarray, " n+1"]
    written: Int32[np.ndarray, " t"]
    """Token ids that were written, flat."""

    def __post_init__(self) -> None:
        n = len(self.id)
        if n == 0:
            raise EvidenceError("no items", where="items", fix="a task with at least two records")
        for name in _PER_ITEM:
            _require(getattr(self, name).shape == (n,), f"{name}: {getattr(self, name).shape} beside {n} items")
        for name in _PER_CHOICE:
            shape = getattr(self, name).shape
            _require(shape == self.logprob.shape, f"{name}: {shape} beside {len(self.logprob)} choices")
        _require_starts("starts", self.starts, n, len(self.logprob))
        _require_starts("written_starts", self.written_starts, n, len(self.written))
        for name in ("logprob", "score", "margin"):
            bad = int(np.count_nonzero(~np.isfinite(getattr(self, name))))
            if bad:
                raise EvidenceError(
                    f"{bad} values are NaN or infinite", where=f"items.{name}",
                    why="a mean over the others would flatter the model",
                    fix="look for the first layer whose output is not finite",
                )  # fmt: skip
        counts = np.diff(self.starts)
        for name in ("pred", "gold"):
            column = getattr(self, name)
            _require(bool(((column >= -1) & (column < np.maximum(counts, 0))).all()), f"{name} is no choice")
        unique, seen = np.unique(self.id, return_counts=True)
        _require(len(unique) == n, f"the id {unique[seen.argmax()]!r} stands {seen.max()} times")

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Items:
        """From named columns (lists or arrays), cast to the stated types; a missing one raises EvidenceError."""
        names = [f.name for f in fields(cls)]
        missing = [name for name in names if name not in columns]
        if missing:
            raise EvidenceError(f"no column {', '.join(missing)}", where="items", fix="run the task again")
        cast = {name: np.asarray(columns[name]).astype(_DTYPES.get(name, np.str_)) for name in names}
        return cls(**cast)

    def __len__(self) -> int:
        return len(self.id)

    @property
    def is_choice(self) -> bool:
        """Whether every item has two choices or more."""
        return bool((np.diff(self.starts) >= 2).all())

    @property
    def owner(self) -> Int64[np.ndarray, " m"]:
        """For each choice the index of its item."""
        return np.repeat(np.arange(len(self), dtype=np.int64), np.diff(self.starts))

    def probabilities(self, per: str = "sum") -> Float[np.ndarray, " m"]:
        """Softmax over each item's choices of their log-likelihoods, flat as ``logprob``.

        ``per``: "sum", or the log-likelihood for each "token" or "char" of the choice. Raises EvidenceError for
        another word. O(m).
        """
        value = self.normalised(per)
        highest = np.full(len(self), -np.inf)
        np.maximum.at(highest, self.owner, value)
        weight = np.exp(value - highest[self.owner])
        total: Float[np.ndarray, " n"] = np.bincount(self.owner, weight, minlength=len(self))
        shares: Float[np.ndarray, " m"] = weight / total[self.owner]
        return shares

    def normalised(self, per: str) -> Float[np.ndarray, " m"]:
        """Log-likelihoods in float64: their "sum", or divided by the choice's "token" or "char" count."""
        if per not in ("sum", "token", "char"):
            raise EvidenceError(f"no normalisation {per!r}", where="items", fix="sum, token or char")
        value = self.logprob.astype(np.float64)
        return value if per == "sum" else value / np.maximum(self.tokens if per == "token" else self.chars, 1)

    def choice(self, per: str = "sum") -> Int32[np.ndarray, " n"]:
        """Index, within each item, of the choice that is likeliest by that normalisation; -1 without choices."""
        value = self.normalised(per)
        found = np.full(len(self), -1, dtype=np.int32)
        for i in np.flatnonzero(np.diff(self.starts)):
            found[i] = int(value[self.starts[i] : self.starts[i + 1]].argmax())
        return found

    def correct(self, per: str = "sum") -> Float[np.ndarray, " n"]:
        """1 where ``choice(per)`` is a true one, else 0: plain and length-normalised accuracy."""
        chosen = self.choice(per)
        right = np.zeros(len(self))
        has = chosen >= 0
        right[has] = self.true[self.starts[:-1][has] + chosen[has]]
        return right

    def true_mass(self, per: str = "sum") -> Float[np.ndarray, " n"]:
        """Probability of the true choices among all of the item's: p(true)."""
        return np.bincount(self.owner, self.probabilities(per) * self.true, minlength=len(self))

    def wrote(self, i: int) -> Int32[np.ndarray, " w"]:
        """Token ids that item ``i`` wrote."""
        return self.written[self.written_starts[i] : self.written_starts[i + 1]]

    def take(self, rows: Int64[np.ndarray, " k"]) -> Items:
        """The items of these indices, in this order."""
        columns: dict[str, Any] = {name: getattr(self, name)[rows] for name in _PER_ITEM}
        for name, starts in (("starts", self.starts), ("written_starts", self.written_starts)):
            counts = np.diff(starts)[rows]
            flat = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in rows] or [np.zeros(0, np.int64)])
            columns[name] = np.concatenate([[0], np.cumsum(counts)])
            for column in _PER_CHOICE if name == "starts" else ("written",):
                columns[column] = getattr(self, column)[flat.astype(np.int64)]
        return Items.of(columns)

    def require_paired(self, other: Items) -> None:
        """Raises EvidenceError, naming the first item, unless both hold the same records and prompts, in one order."""
        if len(self) != len(other):
            raise EvidenceError(f"{len(self)} items beside {len(other)}", where="items", fix="the same task and limit")
        for name in ("id", "doc_hash", "prompt_hash", "cluster", "gold"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for i in np.flatnonzero(mine != theirs)[:1]:
                raise EvidenceError(
                    f"{name} differs: {mine[i]} and {theirs[i]}", where=f"item {i}, {self.id[i]}",
                    why="only answers to the same question pair", fix="run the task on both models again",
                )  # fmt: skip


def write_items(folder: Path, items: Items, provenance: ItemsProvenance) -> None:
    """Write ``items.parquet`` into an existing folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {name: pa.array(getattr(items, name)) for name in _PER_ITEM}
    for name in _PER_CHOICE:
        columns[name] = pa.LargeListArray.from_arrays(pa.array(items.starts), pa.array(getattr(items, name)))
    columns["written"] = pa.LargeListArray.from_arrays(pa.array(items.written_starts), pa.array(items.written))
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(asdict(provenance)).encode()})
    pq.write_table(table, folder / ITEMS, compression="zstd")


def read_items(folder: Path) -> tuple[Items, ItemsProvenance]:
    """What ``write_items`` wrote. Raises EvidenceError for a file that is not such evidence."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / ITEMS
    try:
        table = pq.read_table(path)
        provenance = ItemsProvenance(**json.loads((table.schema.metadata or {})[_METADATA]))
        columns: dict[str, Any] = {name: table[name].to_numpy() for name in _PER_ITEM}
        for name in (*_PER_CHOICE, "written"):
            lists = table[name].combine_chunks()
            columns[name] = lists.values.to_numpy(zero_copy_only=False)
            columns["written_starts" if name == "written" else "starts"] = lists.offsets.to_numpy()
        return Items.of(columns), provenance
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, AttributeError, ValueError) as error:
        raise EvidenceError(f"is no evidence of a task: {error}", where=str(path)) from error


def _require(ok: bool | np.bool_, what: str) -> None:
    if not ok:
        raise EvidenceError(what, where="items", fix="run the task again")


def _require_starts(name: str, starts: Int64[np.ndarray, " k"], n: int, total: int) -> None:
    rising = len(starts) == n + 1 and starts[0] == 0 and starts[-1] == total and bool((np.diff(starts) >= 0).all())
    _require(rising, f"{name} does not rise from 0 to {total} in {n} steps")


_PER_CHOICE = ("logprob", "tokens", "chars", "true", "role")
_DTYPES: dict[str, Any] = {
    "cluster": np.int32, "starts": np.int64, "logprob": np.float32, "tokens": np.int32, "chars": np.int32,
    "true": np.bool_, "role": np.int8, "pred": np.int32, "gold": np.int32, "score": np.float32, "margin": np.float32,
    "length": np.int32, "parse_ok": np.bool_, "written_starts": np.int64, "written": np.int32,
}  # fmt: skip
_RAGGED = (*_PER_CHOICE, "starts", "written_starts", "written")
_PER_ITEM = tuple(f.name for f in fields(Items) if f.name not in _RAGGED)
