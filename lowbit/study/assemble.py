"""From a store to a report: evidence becomes findings, curves and rows; no model is run."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lowbit import digest
from lowbit.errors import StudyError
from lowbit.evaluation import evidence
from lowbit.evaluation.findings import Finding, adjust, findings, to_json
from lowbit.evaluation.metrics import agreement, kl
from lowbit.evaluation.metrics.base import Tokens
from lowbit.report import model as view
from lowbit.study import stages
from lowbit.study.grid import Entry, Grid
from lowbit.study.rows import CellRow
from lowbit.study.store import Store

_CONTEXT = 16  # tokens shown before a flip
_FLIPS = 12
_PACKAGES = ("lowbit", "torch", "transformers", "numpy", "scipy")


def report(store: Store, name: str, grid: Grid, rule: str = "holm") -> view.Report:
    """The report of one model of a study. Candidates whose cells are not done are left out.

    Raises StudyError when not even the reference is done.
    """
    base = _row(store, grid.reference.key)
    if base is None:
        raise StudyError("the reference has not been scored", where=name, fix="lowbit study run")
    output = _output(base)
    ref_tokens, ref_provenance = evidence.read_tokens(store.evidence_folder(base.key))
    floor = _floor(store, grid)
    scored: dict[str, tuple[Entry, CellRow, Tokens]] = {}
    for entry in grid.entries:
        if (row := _row(store, entry.score.key)) is not None:
            tokens, provenance = evidence.read_tokens(store.evidence_folder(row.key))
            provenance.require_comparable(ref_provenance)
            scored[entry.label] = entry, row, tokens
    table = adjust({label: findings(tokens, floor) for label, (_, _, tokens) in scored.items()}, rule)
    for label, found in table.items():
        store.put_findings(scored[label][1].key, {f.metric: json.loads(to_json(f)) for f in found})
    tokenizer = _tokenizer(Path(grid.reference.params["model"]))
    candidates = [_candidate(store, grid.model, *scored[label], table[label], tokenizer) for label in scored]
    return view.Report(
        title=f"{grid.model}: {len(candidates)} low-bit versions",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["lowbit", *sys.argv[1:]]),
        study_name=name,
        reference=_reference(grid.model, output, base),
        candidates=tuple(candidates),
        noise_floor=None if floor is None else float(floor.kl.mean()),
        protocol=view.ScoringProtocol(
            text=f"{output['text']} ({output['protocol']})", digest=output["text_digest"], windows=output["windows"],
            length=output["length"], tokens=output["tokens"], clusters=len(np.unique(ref_tokens.cluster)),
            dtype=output["dtype"],
        ),  # fmt: skip
        environment=view.Environment(tuple((p, version(p)) for p in _PACKAGES), _machine()),
        multiplicity_rule=rule,
        configuration=_configuration(grid),
        digests=_digests(store, grid, output),
    )


def _reference(model: str, output: Mapping[str, Any], row: CellRow) -> view.Candidate:
    return view.Candidate(
        label=f"{model} (original)", model_label=model, recipe="none", digest=output["model_digest"],
        bytes_total=output["bytes_total"], bits_per_weight=16.0, seconds=0.0, peak_bytes=0, is_reference=True,
    )  # fmt: skip


def _candidate(
    store: Store, model: str, entry: Entry, row: CellRow, tokens: Tokens, found: list[Finding], tokenizer: Tokenizer
) -> view.Candidate:
    made = _row(store, entry.make.key) if entry.make is not None else None
    described = _described(store, entry)
    bands = kl.by_position(tokens, _edges(tokens))
    return view.Candidate(
        label=entry.label, model_label=model, recipe=entry.recipe, digest=described["digest"],
        bytes_total=described["bytes_total"], bits_per_weight=described["bits_per_weight"],
        seconds=described["seconds"], peak_bytes=made.peak_bytes or 0 if made else 0, findings=tuple(found),
        kl_by_position=tuple(
            view.Band(int(b.low), int(b.high) + 1, b.interval.estimate, b.interval.low, b.interval.high, b.interval.n)
            for b in bands
        ),
        kl_by_block=_blocks(store, entry),
        flips=_flips(tokens, tokenizer),
    )  # fmt: skip


def _described(store: Store, entry: Entry) -> dict[str, Any]:
    path = entry.path if entry.make is None else store.checkpoint_folder(entry.make.key)
    assert path is not None
    from lowbit.io import native

    if native.is_native(path):
        return stages.describe(path)
    size = sum(p.stat().st_size for p in path.glob("*.safetensors"))
    return {"digest": entry.score.params["candidate_digest"], "bytes_total": size, "bits_per_weight": 16.0,
            "seconds": 0.0}  # fmt: skip


def _blocks(store: Store, entry: Entry) -> tuple[view.BlockKL, ...]:
    row = None if entry.attribute is None else _row(store, entry.attribute.key)
    if row is None:
        return ()
    rows = json.loads((store.evidence_folder(row.key) / stages.BLOCKS).read_text())
    return tuple(view.BlockKL(r["block"], r["value"], r["low"], r["high"]) for r in rows)


def _flips(tokens: Tokens, tokenizer: Tokenizer) -> tuple[view.FlipRow, ...]:
    """The most surprising disagreements, with the text before them."""
    rows = []
    for flip in agreement.flip_rows(tokens, _FLIPS):
        before = (tokens.chunk == flip.chunk) & (tokens.pos < flip.pos) & (tokens.pos >= flip.pos - _CONTEXT)
        rows.append(
            view.FlipRow(
                context=tokenizer.decode(tokens.token[before].tolist()), target=tokenizer.decode([flip.token]),
                reference_choice=tokenizer.decode([flip.top1_ref]), candidate_choice=tokenizer.decode([flip.top1]),
                margin_ref=flip.margin_ref, kind=flip.kind,
            )
        )  # fmt: skip
    return tuple(rows)


def _edges(tokens: Tokens) -> list[int]:
    """Positions in powers of two: early tokens have little context and change fast."""
    last, edges = int(tokens.pos.max()), [int(tokens.pos.min())]
    edge = 8
    while edge <= last:
        if edge > edges[0]:
            edges.append(edge)
        edge *= 2
    return edges


def _floor(store: Store, grid: Grid) -> Tokens | None:
    row = _row(store, grid.floor.key)
    return None if row is None else evidence.read_tokens(store.evidence_folder(row.key))[0]


def _row(store: Store, key: str) -> CellRow | None:
    row = store.lookup([key]).get(key)
    return row if row is not None and row.status == "done" else None


def _output(row: CellRow) -> Mapping[str, Any]:
    assert row.output is not None
    return row.output


def _tokenizer(root: Path) -> Tokenizer:
    return Tokenizer.from_file(str(root / "tokenizer.json"))


def _configuration(grid: Grid) -> tuple[tuple[str, str], ...]:
    p = grid.reference.params
    rows = [("model", Path(p["model"]).name), ("evaluation", f"{p['text']}, {p['protocol']}, batch {p['batch']}")]
    for entry in grid.entries:
        if entry.make is not None and "calibration_digest" in entry.make.params:
            c = entry.make.params["recipe"]["calibration"]
            rows.append((entry.label, f"calibration {c['text']}, {c['samples']} x {c['length']}, seed {c['seed']}"))
    return tuple(rows)


def _digests(store: Store, grid: Grid, output: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    rows = [("model", output["model_digest"]), ("scorer", output["identity"]), ("text", output["text_digest"])]
    for entry in grid.entries:
        if (row := _row(store, entry.score.key)) is not None:
            rows.append((f"scorer of {entry.label}", _output(row)["identity"]))
    return tuple((name, digest.short(value)) for name, value in rows)


def _machine() -> str:
    import os

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} threads, {platform.system()}, Python {platform.python_version()}"
