"""What an analysis sees of a study: its models, their reports, and the evidence of every cell. Reads only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lowbit.evaluation import evidence
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.metrics.items import Items, read_items
from lowbit.evaluation.tasks.registry import Chosen
from lowbit.report.model import Candidate, Report
from lowbit.study.engine import Cell
from lowbit.study.grid import Entry, Grid
from lowbit.study.store import Store

T = TypeVar("T")


class Pair(NamedTuple):
    """One candidate's answers to one task beside the reference's, item by item."""

    task: Chosen
    label: str
    reference: Items
    candidate: Items


@dataclass(frozen=True)
class Model:
    """One model of a study that has a report: its cells, and what they gave."""

    store: Store
    grid: Grid
    report: Report
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.grid.model

    @property
    def parameters(self) -> int:
        """Of the original."""
        found: int = self.output(self.grid.reference)["parameters"]  # type: ignore[index]
        return found

    def candidates(self) -> Iterator[tuple[Entry, Candidate]]:
        """The versions that are scored, in the order of the study file."""
        shown = {c.label: c for c in self.report.candidates}
        for entry in self.grid.entries:
            if entry.label in shown:
                yield entry, shown[entry.label]

    def output(self, cell: Cell) -> Mapping[str, Any] | None:
        """What a cell returned, or None while it is not done."""
        row = self.store.lookup([cell.key]).get(cell.key)
        return row.output if row is not None and row.status == "done" else None

    def folder(self, cell: Cell) -> Path | None:
        """Where a cell's evidence lies, or None while it is not done."""
        return None if self.output(cell) is None else self.store.evidence_folder(cell.key)

    def tokens(self, cell: Cell) -> Tokens | None:
        """Token evidence of a reference, floor or score cell; read once."""
        return self._once(cell, lambda folder: evidence.read_tokens(folder)[0])

    def items(self, cell: Cell) -> Items | None:
        """Item evidence of a cell of a task; read once."""
        return self._once(cell, lambda folder: read_items(folder)[0])

    def pairs(self) -> Iterator[Pair]:
        """Every task that both the reference and a candidate have answered, candidates in the study's order."""
        if self.grid.tasks is None:
            return
        for version in self.grid.tasks.versions:
            for chosen in self.grid.tasks.tasks:
                name = chosen.task.name
                base, after = self.items(self.grid.tasks.reference[name]), self.items(version.cells[name])
                if base is not None and after is not None:
                    base.require_paired(after)
                    yield Pair(chosen, version.label, base, after)

    def _once(self, cell: Cell, read: Callable[[Path], T]) -> T | None:
        if cell.key not in self._kept:
            folder = self.folder(cell)
            self._kept[cell.key] = None if folder is None else read(folder)
        kept: T | None = self._kept[cell.key]
        return kept


@dataclass(frozen=True)
class View:
    """A study: its name and its models, those that have a report."""

    name: str
    models: Sequence[Model]

    def titled(self, title: str, model: Model) -> str:
        """A title that names the model where the study has several."""
        return f"{title}: {model.name}" if len(self.models) > 1 else title
