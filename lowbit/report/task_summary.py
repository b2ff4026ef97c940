"""What the versions can still do: the rows of tasks, for the page and the terminal, and what qualifies them."""

from __future__ import annotations

import math
from typing import NamedTuple

from lowbit.evaluation.task_findings import TaskFinding, p_text
from lowbit.report import text
from lowbit.report.model import Candidate, Report
from lowbit.report.summary import by_size
from lowbit.report.table import Cell, Column, Row, Table


class Asked(NamedTuple):
    """One measure of one task, and what each candidate that answered it showed."""

    task: str
    measure: str
    found: dict[str, TaskFinding]

    @property
    def one(self) -> TaskFinding:
        """Any of the findings: items and reference are the same in all."""
        return next(iter(self.found.values()))


def asked(report: Report) -> list[Asked]:
    """Every measure of every task, in the order in which the tasks were run; candidates from small to large."""
    rows: dict[tuple[str, str], Asked] = {}
    for candidate in by_size(report):
        for f in candidate.task_findings:
            rows.setdefault((f.task, f.measure), Asked(f.task, f.measure, {})).found[candidate.label] = f
    order = list(dict.fromkeys(row.task for row in rows.values()))
    return sorted(rows.values(), key=lambda row: order.index(row.task))


def answered(report: Report) -> list[Candidate]:
    """The candidates with at least one finding on a task, from small to large."""
    return [c for c in by_size(report) if c.task_findings]


def task_table(report: Report) -> Table | None:
    """A line for each measure and candidate; None where no task is done."""
    rows = [
        Row(
            (
                Cell(row.task), Cell(row.measure), Cell(label), Cell(f"{f.n:,}", f"{f.clusters:,} clusters"),
                Cell(level(f)), difference(f), Cell(flips(f)), Cell(p_text(f.p_adjusted)), Cell(f.verdict, f.note),
            ),
            f.verdict,
            is_reference=False,
        )
        for row in asked(report)
        for label, f in row.found.items()
    ]  # fmt: skip
    if not rows:
        return None
    columns = (
        Column("Task", numeric=False),
        Column("Measure", numeric=False),
        Column("Candidate", numeric=False),
        Column("Items"),
        Column("Reference"),
        Column("Δ", "95 % CI"),
        Column("Flips", "lost/gained/other"),
        Column("p", "adjusted"),
        Column("Verdict", numeric=False),
    )
    return Table(columns, tuple(rows))


def level(f: TaskFinding) -> str:
    """The reference's own value, with its unit."""
    value = text.number(f.reference) if abs(f.reference) < 10 else f"{f.reference:.1f}".replace("-", "−")
    return f"{value} {f.unit}"


def difference(f: TaskFinding) -> Cell:
    """Candidate less reference, and its interval; differences of percentages are in points."""
    value, interval = text.estimate(f.delta, f.low, f.high, signed=True)
    return Cell(f"{value} {_unit(f)}", interval)


def flips(f: TaskFinding) -> str:
    """``lost/gained/other`` as counts of items; a dash for measures that are not right or wrong."""
    return text.MISSING if f.flips is None else f"{f.flips.lost}/{f.flips.gained}/{f.flips.other}"


def task_notes(report: Report) -> list[str]:
    """How the tasks were judged, the noise floor, what could have been found, and what was left out; none without."""
    rows = asked(report)
    if not rows:
        return []
    findings = [f for row in rows for f in row.found.values()]
    lines = [
        "Paired on the same questions; intervals are 95 % and clustered; p values adjusted over all tasks and "
        f"candidates by {findings[0].rule}. Lost: only the reference was right; gained: only the candidate."
    ]
    floors = [f for f in findings if f.floor is not None]
    if floors:
        most = max(floors, key=lambda f: f.floor or 0.0)
        share = f"up to {text.number(most.floor)} % of items change ({most.task})" if most.floor else "no item changes"
        lines.append(f"Noise floor of the tasks: {share} when the reference runs in other batches.")
    effects: dict[str, str] = {}
    for row in rows:
        largest = max((f.mde for f in row.found.values() if math.isfinite(f.mde)), default=0.0)
        if largest > 0:
            effects.setdefault(row.task, f"{row.task} {text.number(largest)} {_unit(row.one)}")
    if effects:
        lines.append(
            f"Minimum detectable effect on tasks (80 % power at 5 %, before adjustment): {', '.join(effects.values())}."
        )
    return [*lines, *report.task_notes]


def _unit(f: TaskFinding) -> str:
    return "pp" if f.unit == "%" else f.unit
