"""What a study found, for people: tables on the screen, JSON, HTML. Imports torch: commands import it when they run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lowbit.cli.options import emit, say
from lowbit.cli.task_table import show as show_task_table
from lowbit.errors import StudyError
from lowbit.report import terminal, write
from lowbit.report.model import Candidate, LostItem, Report, ScoringProtocol, StudyReport
from lowbit.study import assemble, task_table
from lowbit.study.analyse import analyse
from lowbit.study.grid import Grid
from lowbit.study.progress import work
from lowbit.study.store import Store
from lowbit.study.task_table import TaskTable
from lowbit.study.tasks import TaskGrid
from lowbit.study.view import Model, View

Output = Literal["auto", "plain", "md", "json", "none"]


def show_reports(
    folder: Path, name: str, grids: Sequence[Grid], output: Output, html: Path | None = None,
    analyses: Sequence[str] = (), command: str = "", more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Print a table a model and what the ``analyses`` found, then the path of the report (beside JSON: to stderr).

    A model whose original is not scored yet is named on standard error; where no model's is, the report only says how
    far the cells are. ``command`` is shown as what made the report, else this one; ``more`` stands beside it in JSON.
    """
    with Store(folder, create=False) as store:
        found = found_so_far(store, name, grids, analyses, command or _command())
    if not found.reports:
        if html is None:
            return
    elif output == "json":
        emit(json.loads(terminal.to_json(found)) | dict(more or {}))
    elif output != "none":
        for report in found.reports:
            _print_model(report, output, titled=len(grids) > 1)
        _print_panels(found, output)
    _write(found, html, output)


def show_answers(
    folder: Path, name: str, grid: Grid, output: Output, html: Path | None = None, analyses: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """The same of versions that only answered the tasks of ``grid``; their table is that of ``cli.task_table``.

    Its tokens need not be scored, but analyses read them where they are.
    """
    if grid.tasks is None:
        raise StudyError("no task is asked", where=name, fix="a comparison with --tasks")
    with Store(folder, create=False) as store:
        table = task_table.table(store, grid.tasks)
        report = _of_answers(name, grid, grid.tasks, table, task_table.lost(store, grid.tasks, assemble.LOST))
        panels = analyse(View(name, [Model(store, grid, report)]), analyses)
        left = work(store, grid.tasks.cells)
    found = StudyReport(name, report.created, report.command, (report,), tuple(panels), left)
    if output == "json":
        held = json.loads(terminal.to_json(found))["panels"]
        emit(task_table.to_json(table) | dict(more or {}) | {"panels": held})
    elif output != "none":
        show_task_table(table)
        _print_panels(found, output)
    _write(found, html, output)


def _of_answers(
    name: str, grid: Grid, asked: TaskGrid, table: TaskTable, lost: Mapping[str, tuple[LostItem, ...]]
) -> Report:
    """A report without tokens: what the versions answered."""
    reference = _version(f"{grid.model} (original)", grid.model, asked.described, is_reference=True)
    candidates = []
    for version in table.versions:
        one = _version(version.label, grid.model, version.described)
        rows, items = tuple(table.rows[version.label]), lost[version.label]
        candidates.append(replace(one, task_findings=rows, lost_items=items))
    dtype = next(iter(asked.reference.values())).params["dtype"]
    return Report(
        title=f"{grid.model}: {len(candidates)} version{'s' if len(candidates) != 1 else ''} beside the original",
        created=assemble.now(), command=_command(), study_name=name,
        reference=reference, candidates=tuple(candidates), noise_floor=None,
        protocol=ScoringProtocol("", "", 0, 0, 0, 0, dtype),
        environment=assemble.environment(),
        multiplicity_rule="holm", task_notes=table.notes,
        families=tuple((chosen.task.name, chosen.task.family) for chosen in asked.tasks),
    )  # fmt: skip


def _version(label: str, model: str, described: Mapping[str, Any], is_reference: bool = False) -> Candidate:
    return Candidate(
        label, model, described["recipe"], described["digest"], described["bytes_total"], described["bits_per_weight"],
        described["seconds"], 0, is_reference=is_reference,
    )  # fmt: skip


def found_so_far(
    store: Store, name: str, grids: Sequence[Grid], analyses: Sequence[str], command: str,
    tell: Callable[[str], object] = say,
) -> StudyReport:  # fmt: skip
    """What a study has shown by now; where nothing is scored, only how far it is."""
    found = assemble.study(store, name, grids, analyses, command, tell)
    if found is not None:
        return found
    return assemble.unscored(name, work(store, [cell for grid in grids for cell in grid.cells]), command)


def _command() -> str:
    return shlex.join(["lowbit", *sys.argv[1:]])


def _write(found: StudyReport, html: Path | None, output: Output) -> None:
    if html is not None:
        write(found, html)
        (say if output == "json" else print)(str(html))


def _print_panels(found: StudyReport, output: Literal["auto", "plain", "md"]) -> None:
    for panel in found.panels:
        print()
        terminal.show_panel(panel, output)


def _print_model(report: Report, output: Literal["auto", "plain", "md"], titled: bool) -> None:
    if titled and not (output == "auto" and sys.stdout.isatty()):  # the table of a terminal has a title
        print(f"{'## ' if output == 'md' else ''}{report.title}\n")
    terminal.show(report, output)
    if titled:
        print()
