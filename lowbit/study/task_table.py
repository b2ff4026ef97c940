"""The table of tasks: from the items in a store to findings, items that were lost, and pairs of answers for a judge.

No model is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.evaluation import task_findings
from lowbit.evaluation.judge import Duel
from lowbit.evaluation.metrics.items import Items, ItemsProvenance, read_items
from lowbit.evaluation.task_findings import TaskFinding
from lowbit.evaluation.tasks import readers
from lowbit.evaluation.tasks.base import Question
from lowbit.evaluation.tasks.registry import Chosen
from lowbit.report.model import LostItem
from lowbit.study.engine import Cell
from lowbit.study.store import Store
from lowbit.study.tasks import TaskGrid, Version


@dataclass(frozen=True)
class TaskTable:
    """What the items of a grid say; ``rows`` by candidate. ``notes`` are for people."""

    model: str
    described: Mapping[str, Any]
    versions: tuple[Version, ...]
    rows: Mapping[str, Sequence[TaskFinding]]
    notes: tuple[str, ...]


def table(store: Store, grid: TaskGrid, rule: str = "holm") -> TaskTable:
    """The paired table of what is done; findings are stored with their cells. Runs no model.

    Raises EvidenceError for evidence that does not pair.
    """
    notes = []
    rows: dict[str, list[TaskFinding]] = {}
    held = _Evidence(store)
    for version in grid.versions:
        found: list[TaskFinding] = []
        pairs: dict[str, tuple[Items, Items]] = {}
        for chosen in grid.tasks:
            name = chosen.task.name
            base, after = held.get(grid.reference[name]), held.get(version.cells[name])
            if base is None or after is None:
                continue
            after[1].require_comparable(base[1])
            again = held.get(grid.floor[name]) if name in grid.floor else None
            pairs[name] = base[0], after[0]
            for measure in chosen.task.measures:
                one = task_findings.compare(name, measure, base[0], after[0], None if again is None else again[0])
                if one is None:
                    notes.append(f"{name}, {measure.name}: fewer than two clusters of items, not compared")
                else:
                    found.append(one)
        if "advglue" in pairs:
            whole = (
                task_findings.drop(pairs["advglue"], pairs["advglue_original"]) if "advglue_original" in pairs else None
            )
            if whole is None:
                notes.append("advglue: without the unchanged records (advglue_original) no adversarial drop")
            else:
                found.append(whole)
        rows[version.label] = found
    judged = task_findings.adjust(rows, rule)
    for version in grid.versions:
        for name, cell in version.cells.items():
            mine = {f.measure: f.to_json() for f in judged[version.label] if f.task == name}
            if mine:
                store.put_findings(cell.key, mine)
    for name, cell in grid.reference.items():
        if (output := held.output(cell)) and output["too_long"]:
            notes.append(f"{name}: {output['too_long']} questions are longer than the model reads and were left out")
    return TaskTable(grid.model, grid.described, grid.versions, judged, tuple(dict.fromkeys(notes)))


class _Evidence:
    """Items by cell, each read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, tuple[Items, ItemsProvenance] | None] = {}

    def output(self, cell: Cell) -> Mapping[str, Any] | None:
        row = self._store.lookup([cell.key]).get(cell.key)
        return row.output if row is not None and row.status == "done" else None

    def get(self, cell: Cell) -> tuple[Items, ItemsProvenance] | None:
        if cell.key not in self._read:
            done = self.output(cell) is not None
            self._read[cell.key] = read_items(self._store.evidence_folder(cell.key)) if done else None
        return self._read[cell.key]


def to_json(found: TaskTable) -> dict[str, Any]:
    """The table as plain values."""
    return {
        "model": found.model, "reference": dict(found.described),
        "candidates": [
            {"label": v.label, **v.described, "findings": [f.to_json() for f in found.rows[v.label]]}
            for v in found.versions
        ],
        "notes": list(found.notes),
    }  # fmt: skip


def lost(store: Store, grid: TaskGrid, most: int) -> dict[str, tuple[LostItem, ...]]:
    """By candidate the items that only the reference got right, at most ``most``, those first that it was surest of.

    Only tasks whose answers are right or wrong have such items; lm-eval's own are left out. O(records of the tasks).
    """
    held = _Evidence(store)
    found: dict[str, list[LostItem]] = {version.label: [] for version in grid.versions}
    for chosen in grid.tasks:
        name = chosen.task.name
        base = held.get(grid.reference[name])
        if base is None or not any(m.binary and m.better == "higher" for m in chosen.task.measures):
            continue
        asked = questions(chosen, grid.reference[name].params["limit"])
        for version in grid.versions:
            after = held.get(version.cells[name])
            if after is None:
                continue
            base[0].require_paired(after[0])
            for i in np.flatnonzero((base[0].score > 0.5) & (after[0].score < 0.5)):
                question = asked.get(str(base[0].id[i]))
                before, now = (_answer(items, int(i), question) for items in (base[0], after[0]))
                prompt = "" if question is None else prompt_of(question)
                margin = float(base[0].margin[i])
                found[version.label].append(LostItem(name, str(base[0].id[i]), prompt, before, now, margin))
    return {label: tuple(sorted(items, key=lambda item: -item.margin_ref)[:most]) for label, items in found.items()}


def questions(chosen: Chosen, limit: int | None) -> dict[str, Question]:
    """The questions of a task by id, without the examples before them; none where the records are generated."""
    if chosen.file is None:
        return {}
    asked = (chosen.task.ask(record.value, ()) for record in readers.read(chosen.file, chosen.task.schema, limit))
    return {question.id: question for question in asked}


def prompt_of(question: Question) -> str:
    """What is asked; of sentences with a gap, the part behind it, which all choices share."""
    if not question.options:
        return question.prompt
    contexts = {option.context for option in question.options}
    return question.options[0].context if len(contexts) == 1 else f"… {question.options[0].text.strip()}"


def _answer(items: Items, i: int, question: Question | None) -> str:
    """What a model answered: the choice, or what it wrote."""
    if items.text[i]:
        return str(items.text[i])
    if question is None or not question.options:
        return ""
    chosen = int(items.pred[i])
    if chosen < 0:
        return "(another text)"
    option = question.options[chosen]
    return option.text if len({o.context for o in question.options}) == 1 else option.context


def duels(store: Store, grid: TaskGrid, version: Version) -> list[Duel]:
    """Pairs of answers of the dialogues that are done, with the conversations that they answer."""
    held, found = _Evidence(store), []
    for chosen in grid.tasks:
        name = chosen.task.name
        base, after = held.get(grid.reference[name]), held.get(version.cells[name])
        if chosen.task.kind != "dialogue" or chosen.file is None or base is None or after is None:
            continue
        base[0].require_paired(after[0])
        turns = {r.value["id"]: r.value["turns"] for r in readers.read(chosen.file, chosen.task.schema)}
        for i, (item, said) in enumerate(zip(base[0].id, base[0].text, strict=True)):
            question, _, turn = str(item).rpartition("/")
            lines: list[str] = []
            for t in range(int(turn)):
                lines.append(f"User: {turns[question][t]}")
                if t + 1 < int(turn):  # the earlier answers that both were shown
                    lines.append(f"Assistant: {base[0].text[i - int(turn) + 1 + t]}")
            found.append(Duel("\n".join(lines), str(said), str(after[0].text[i]), int(base[0].cluster[i])))
    return found
