"""Evidence of what a model wrote: texts, gaps to the reference and costs, on disk.

texts.parquet    one row a text: its setting, prompt and seed, and lists of tokens and likelihoods; zstd, with the
                 Provenance as metadata
gaps.parquet     one row a setting and prompt: means over the positions of one text of the reference; candidates only
costs.json       bytes, and seconds of single texts, the reference's beside each
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics.generations import Texts
from lowbit.evaluation.sampler import Cost, Gap, Setting

TEXTS, GAPS, COSTS = "texts.parquet", "gaps.parquet", "costs.json"
_METADATA = b"lowbit-texts"
_LISTS = ("token", "nll", "nll_ref")

Texted = Mapping[Setting, Texts]
Gaps = Mapping[Setting, Gap]
"""By setting, a mean a prompt."""


@dataclass(frozen=True)
class Provenance:
    """Where texts come from; identities are digests, ``dtype`` and ``text`` are for people."""

    model: str
    """``Scorer.identity`` of the model that wrote: weights, dtype, kernels, cache."""
    reference: str
    """The same of the model that read the texts; equal to ``model`` for the reference's own."""
    prompts: str
    """Digest of the prompts' tokens."""
    text: str
    text_digest: str
    dtype: str

    def require_comparable(self, other: Provenance) -> None:
        """Raises EvidenceError unless both wrote from the same prompts and were read by one reference."""
        for field in ("reference", "prompts", "text_digest"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise EvidenceError(
                    f"{field} differs: {mine} and {theirs}", where="texts",
                    why="only texts from the same prompts pair", fix="let both write again",
                )  # fmt: skip


@dataclass(frozen=True)
class Round:
    """One text written by a candidate and, right before or after it, by the reference."""

    candidate: Cost
    reference: Cost


@dataclass(frozen=True)
class Costs:
    """What a model takes to run. Rates are of one text at a time, by the kernels that ``lowbit generate`` runs."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dtype: str
    threads: Annotated[int, Field(ge=1)]
    kernels: Mapping[str, int]
    """Linears by the kernel that multiplies one token; empty for a model that is not low-bit."""
    static_bytes: Annotated[int, Field(ge=0)]
    """Weights and buffers as they lie in memory, packed ones packed."""
    grown_bytes: int
    """How far this process grew from before the model was loaded to the most that was seen while it wrote."""
    rounds: Annotated[tuple[Round, ...], Field(min_length=2)]


_COSTS = TypeAdapter(Costs)


def write_texts(folder: Path, texts: Texted, provenance: Provenance) -> None:
    """Write ``texts.parquet`` into an existing folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = _settings({setting: len(t.prompt) for setting, t in texts.items()})
    for name in ("prompt", "seed", "stopped"):
        columns[name] = np.concatenate([getattr(t, name) for t in texts.values()])
    for name in _LISTS:
        rows = np.concatenate([getattr(t, name) for t in texts.values()])
        starts = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
        columns[name] = pa.ListArray.from_arrays(pa.array(starts), pa.array(rows.ravel()))
    table = pa.table(columns, schema=_schema(TEXTS).with_metadata({_METADATA: json.dumps(asdict(provenance)).encode()}))
    pq.write_table(table, folder / TEXTS, compression="zstd")


def read_texts(folder: Path) -> tuple[dict[Setting, Texts], Provenance]:
    """What ``write_texts`` wrote, by setting. Raises EvidenceError for a file that is not such evidence."""
    path = folder / TEXTS
    table = _table(path)
    try:
        provenance = Provenance(**json.loads((table.schema.metadata or {})[_METADATA]))
        columns = {name: table[name].to_numpy() for name in ("prompt", "seed", "stopped")}
        for name in _LISTS:
            lists = table[name].combine_chunks()
            widths = np.unique(np.diff(lists.offsets.to_numpy()))
            if len(widths) != 1 or lists.values.null_count:
                raise ValueError(f"lists of {len(widths)} lengths, or with gaps, in {name}")
            columns[name] = lists.flatten().to_numpy().reshape(len(lists), -1)
        found = {s: Texts(**{k: v[rows] for k, v in columns.items()}) for s, rows in _rows(table).items()}
    except (KeyError, TypeError, ValueError, EvidenceError) as error:
        raise EvidenceError(f"are no texts: {error}", where=str(path), fix="let the model write again") from error
    first = next(iter(found.values()))
    for texts in found.values():
        first.require_paired(texts)
    return found, provenance


def write_gaps(folder: Path, gaps: Gaps) -> None:
    """Write ``gaps.parquet`` into an existing folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = _settings({setting: len(gap.kl) for setting, gap in gaps.items()})
    columns["prompt"] = np.concatenate([np.arange(len(gap.kl), dtype=np.int32) for gap in gaps.values()])
    for name in Gap._fields:
        columns[name] = np.concatenate([getattr(gap, name) for gap in gaps.values()])
    pq.write_table(pa.table(columns, schema=_schema(GAPS)), folder / GAPS, compression="zstd")


def read_gaps(folder: Path) -> dict[Setting, Gap]:
    """What ``write_gaps`` wrote. Raises EvidenceError for a file that is not such evidence."""
    path = folder / GAPS
    table = _table(path)
    columns = {name: table[name].to_numpy() for name in ("prompt", *Gap._fields)}
    rows = _rows(table)
    n = len(next(iter(rows.values())))
    ordered = all(np.array_equal(columns["prompt"][at], np.arange(n)) for at in rows.values())
    if not ordered or not all(np.isfinite(columns[f]).all() and columns[f].min() >= 0 for f in Gap._fields):
        raise EvidenceError("are no gaps: one row a setting and prompt, finite and from 0", where=str(path))
    return {setting: Gap(*(columns[name][at] for name in Gap._fields)) for setting, at in rows.items()}


def write_costs(folder: Path, costs: Costs) -> None:
    """Write ``costs.json`` into an existing folder."""
    (folder / COSTS).write_bytes(_COSTS.dump_json(costs, indent=1))


def read_costs(folder: Path) -> Costs:
    """What ``write_costs`` wrote. Raises EvidenceError for a file that is not such evidence."""
    try:
        costs = _COSTS.validate_json((folder / COSTS).read_bytes())
    except (OSError, ValidationError) as error:
        raise EvidenceError(f"are no costs: {error}", where=str(folder / COSTS)) from error
    for cost in (c for r in costs.rounds for c in (r.candidate, r.reference)):
        if min(cost.prompt_tokens, cost.decode_tokens) < 1 or min(cost.prefill_seconds, cost.decode_seconds) <= 0:
            raise EvidenceError("a round that took no time or made no token", where=str(folder / COSTS))
    return costs


def _schema(file: str) -> Any:
    import pyarrow as pa

    own = {
        TEXTS: [("seed", pa.int32()), ("stopped", pa.bool_()), ("token", pa.list_(pa.int32())),
                ("nll", pa.list_(pa.float32())), ("nll_ref", pa.list_(pa.float32()))],
        GAPS: [(name, pa.float64()) for name in Gap._fields],
    }[file]  # fmt: skip
    return pa.schema([("temperature", pa.float64()), ("top_k", pa.int32()), ("prompt", pa.int32()), *own])


def _settings(rows: Mapping[Setting, int]) -> dict[str, Any]:
    """The columns that say of what setting a row is; a top-k of 0 stands for all tokens."""
    counts = list(rows.values())
    return {
        "temperature": np.repeat([float(s.temperature) for s in rows], counts),
        "top_k": np.repeat(np.asarray([s.top_k or 0 for s in rows], np.int32), counts),
    }


def _rows(table: Any) -> dict[Setting, Any]:
    """Row numbers by setting, settings in order of appearance."""
    found: dict[Setting, list[int]] = {}
    for i, (t, k) in enumerate(zip(table["temperature"].to_pylist(), table["top_k"].to_pylist(), strict=True)):
        found.setdefault(Setting(t, k or None), []).append(i)
    return {setting: np.asarray(at) for setting, at in found.items()}


def _table(path: Path) -> Any:
    """A file of one of the two schemas, with rows and without nulls."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise EvidenceError(f"cannot be read: {error}", where=str(path), fix="let the model write again") from error
    schema = _schema(path.name)
    if not table.schema.remove_metadata().equals(schema) or not len(table) or any(c.null_count for c in table.columns):
        raise EvidenceError(
            "no rows, nulls, or columns other than those of this evidence", where=str(path),
            fix="let the model write again",
        )  # fmt: skip
    return table
