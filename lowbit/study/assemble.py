"""From a store to a report: evidence becomes findings, curves and rows; no model is run."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import digest
from lowbit.errors import StudyError
from lowbit.evaluation import evidence
from lowbit.evaluation.findings import Finding, adjust, findings, to_json
from lowbit.evaluation.metrics import agreement, kl
from lowbit.evaluation.metrics.base import Tokens
from lowbit.models.source import of_directory
from lowbit.report import model as view
from lowbit.report.work import Work
from lowbit.study import stages, task_table
from lowbit.study.analyse import analyse
from lowbit.study.grid import Entry, Grid
from lowbit.study.progress import work
from lowbit.study.rows import CellRow
from lowbit.study.store import Store
from lowbit.study.tasks import TaskGrid
from lowbit.study.view import Model, View

_CONTEXT = 16  # tokens shown before a flip
_FLIPS = 12
LOST = 20  # items of tasks that are shown of each candidate
_PACKAGES = ("lowbit", "torch", "transformers", "safetensors", "numpy", "scipy")


def report(store: Store, name: str, grid: Grid, rule: str = "holm", command: str = "") -> view.Report:
    """The report of one model of a study; its findings, adjusted by ``rule`` over the table, are stored as well.

    Candidates whose cells are not done are left out. ``command`` is shown as what made it. Runs no model.
    Raises StudyError when not even the reference is done, EvidenceError for evidence that does not compare.
    """
    base = _row(store, grid.reference.key)
    if base is None:
        raise StudyError(
            f"{grid.reference.label!r} is not done yet", where=f"study {name!r}",
            why="every number is a difference from the reference", fix="lowbit study run, which goes on where it was",
        )  # fmt: skip
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
    tokenizer = of_directory(Path(grid.reference.params["model"])).tokenizer
    candidates = tuple(_candidate(store, grid.model, *scored[label], table[label], tokenizer) for label in scored)
    task_notes: tuple[str, ...] = ()
    if grid.tasks is not None:
        candidates, task_notes = _with_tasks(store, grid.tasks, candidates, rule)
    return view.Report(
        title=f"{grid.model}: {len(scored)} version{'s' if len(scored) != 1 else ''} beside the original",
        created=now(),
        command=command,
        study_name=name,
        reference=_reference(grid.model, output),
        candidates=candidates,
        noise_floor=None if floor is None else float(floor.kl.mean()),
        protocol=view.ScoringProtocol(
            text=f"{output['text']} ({output['protocol']})",
            digest=output["text_digest"],
            windows=output["windows"],
            length=output["length"],
            tokens=output["tokens"],
            clusters=len(np.unique(ref_tokens.cluster)),
            dtype=output["dtype"],
        ),
        environment=environment(),
        multiplicity_rule=rule,
        configuration=_configuration(grid, output, [entry for entry, _, _ in scored.values()]),
        digests=_digests(output, {label: _output(row) for label, (_, row, _) in scored.items()}),
        task_notes=task_notes,
        families=() if grid.tasks is None else tuple((c.task.name, c.task.family) for c in grid.tasks.tasks),
    )


def study(
    store: Store, name: str, grids: Sequence[Grid], analyses: Sequence[str] = (), command: str = "",
    say: Callable[[str], object] = lambda _: None,
) -> view.StudyReport | None:  # fmt: skip
    """The report of a whole study, with what its ``analyses`` found. Runs no model.

    A model whose original is not scored yet is left out and ``say`` is told; None where all are. How far the cells
    are stands in the report.
    """
    models = []
    for grid in grids:
        if _row(store, grid.reference.key) is None:
            say(f"{grid.model}: no table, because {grid.reference.label!r} is not done")
        else:
            models.append(Model(store, grid, report(store, name, grid, command=command)))
    if not models:
        return None
    panels = analyse(View(name, models), analyses)
    reports, left = tuple(m.report for m in models), work(store, [cell for grid in grids for cell in grid.cells])
    return view.StudyReport(name, now(), command, reports, tuple(panels), left)


def unscored(name: str, left: Work, command: str = "") -> view.StudyReport:
    """The report of a study of which nothing is scored yet: how far it is, and nothing else."""
    return view.StudyReport(name, now(), command, (), (), left)


def environment() -> view.Environment:
    """The packages that numbers depend on, and the machine that a report is made on."""
    return view.Environment(tuple((p, version(p)) for p in _PACKAGES), _machine())


def now() -> str:
    """The moment that a report is made, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _reference(model: str, output: Mapping[str, Any]) -> view.Candidate:
    return view.Candidate(
        label=f"{model} (original)", model_label=model, recipe="none", digest=output["digest"],
        bytes_total=output["bytes_total"], bits_per_weight=output["bits_per_weight"], seconds=0.0, peak_bytes=0,
        is_reference=True,
    )  # fmt: skip


def _candidate(
    store: Store, model: str, entry: Entry, row: CellRow, tokens: Tokens, found: list[Finding], tokenizer: Any
) -> view.Candidate:
    made = _row(store, entry.make.key) if entry.make is not None else None
    output = _output(row)
    return view.Candidate(
        label=entry.label, model_label=model, recipe=entry.recipe, digest=output["digest"],
        bytes_total=output["bytes_total"], bits_per_weight=output["bits_per_weight"], seconds=output["seconds"],
        peak_bytes=made.peak_bytes or 0 if made else 0, findings=tuple(found),
        kl_by_position=tuple(
            view.Band(int(b.low), int(b.high) + 1, b.interval.estimate, b.interval.low, b.interval.high, b.interval.n)
            for b in kl.by_position(tokens, _edges(tokens))
        ),
        kl_by_block=_blocks(store, entry),
        flips=_flips(tokens, tokenizer),
    )  # fmt: skip


def _with_tasks(
    store: Store, asked: TaskGrid, candidates: tuple[view.Candidate, ...], rule: str
) -> tuple[tuple[view.Candidate, ...], tuple[str, ...]]:
    """The candidates with what they answered, and notes; adjusted over the candidates that stand in the report."""
    shown = {c.label for c in candidates}
    asked = replace(asked, versions=tuple(v for v in asked.versions if v.label in shown))
    found, lost = task_table.table(store, asked, rule), task_table.lost(store, asked, LOST)
    told = tuple(replace(c, task_findings=tuple(found.rows[c.label]), lost_items=lost[c.label]) for c in candidates)
    return told, found.notes


def _blocks(store: Store, entry: Entry) -> tuple[view.BlockKL, ...]:
    row = None if entry.attribute is None else _row(store, entry.attribute.key)
    if row is None:
        return ()
    rows = json.loads((store.evidence_folder(row.key) / stages.BLOCKS).read_text())
    return tuple(view.BlockKL(r["block"], r["value"], r["low"], r["high"]) for r in rows)


def _flips(tokens: Tokens, tokenizer: Any) -> tuple[view.FlipRow, ...]:
    """The most surprising disagreements, with the text before them."""
    rows = []
    for flip in agreement.flip_rows(tokens, _FLIPS):
        place = (tokens.chunk == flip.chunk) & (tokens.pos < flip.pos) & (tokens.pos >= flip.pos - _CONTEXT)
        before = tokens.token[place].tolist()
        target, first, now = (_piece(tokenizer, before, token) for token in (flip.token, flip.top1_ref, flip.top1))
        rows.append(view.FlipRow(tokenizer.decode(before), target, first, now, flip.margin_ref, flip.kind))
    return tuple(rows)


def _piece(tokenizer: Any, before: Sequence[int], token: int) -> str:
    """What a token adds to a text; alone, some tokenizers would decode it without its space."""
    context, whole = tokenizer.decode(before), tokenizer.decode([*before, token])
    piece: str = whole[len(context) :]
    if not piece or not whole.startswith(context) or "\N{REPLACEMENT CHARACTER}" in piece:
        return str(tokenizer.convert_ids_to_tokens(token))  # a part of a character
    return piece


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


def _configuration(grid: Grid, output: Mapping[str, Any], entries: Sequence[Entry]) -> tuple[tuple[str, str], ...]:
    """How candidates were made and scored; what is the same for all stands in one row."""
    p = grid.reference.params
    rows = [("model", grid.model), ("evaluation", f"{output['text']}, {p['protocol']}, batch {p['batch']}")]
    if output["bytes_stored"] > 1.5 * output["bytes_total"]:
        rows.append(("size of the original", f"counted in 16 bit; its files take {output['bytes_stored']:,} bytes"))
    made = [(entry, entry.make.params["recipe"]) for entry in entries if entry.make is not None]
    calibrations = {entry.label: _spell(r["calibration"]) for entry, r in made if _calibrated(entry)}
    if len(set(calibrations.values())) == 1:
        rows.append((f"calibration of {', '.join(calibrations)}", next(iter(calibrations.values()))))
    else:
        rows += [(f"calibration of {label}", spelled) for label, spelled in calibrations.items()]
    for entry, recipe in made:
        rows += [(f"{entry.label}: {rule['sites']}", _spell_rule(rule)) for rule in recipe["override"]]
    return tuple(rows)


def _calibrated(entry: Entry) -> bool:
    return entry.make is not None and "calibration_digest" in entry.make.params


def _spell(calibration: Mapping[str, Any]) -> str:
    c = calibration
    drawn = "the first" if c["seed"] is None else f"seed {c['seed']}"
    return (
        f"{Path(c['text']).name}, {c['samples']} windows of {c['length']} tokens, {drawn}, {c['propagate']} propagated"
    )


def _spell_rule(rule: Mapping[str, Any]) -> str:
    """An override in words: why its sites are kept, or what changes there."""
    if rule["keep"] is not None:
        return f"kept in 16 bit: {rule['keep']}"
    return ", ".join(f"{key} {rule[key]}" for key in ("method", "format", "options") if rule[key])


def _digests(output: Mapping[str, Any], scored: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Identities of what was scored and of how; those of the weights stand with the versions."""
    rows = [("text", output["text_digest"]), ("scoring of the original", output["identity"])]
    rows += [(f"scoring of {label}", found["identity"]) for label, found in scored.items()]
    return tuple((name, digest.short(value)) for name, value in rows)


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} threads, {platform.system()}, Python {platform.python_version()}"
