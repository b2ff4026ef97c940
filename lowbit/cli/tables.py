"""What a study found, for people: tables on the screen, JSON, HTML. Imports torch: commands import it when they run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lowbit.cli.options import emit, say
from lowbit.report import terminal, write
from lowbit.report.model import Report, StudyReport
from lowbit.study import assemble
from lowbit.study.grid import Grid
from lowbit.study.progress import work
from lowbit.study.store import Store

Output = Literal["auto", "plain", "md", "json", "none"]


def show_reports(
    folder: Path, name: str, grids: Sequence[Grid], output: Output, html: Path | None = None,
    analyses: Sequence[str] = (), command: str = "",
) -> None:  # fmt: skip
    """Print a table a model and what the ``analyses`` found, then the path of the report (beside JSON: to stderr).

    A model whose original is not scored yet is named on standard error; where no model's is, the report only says how
    far the cells are. ``command`` is shown as what made the report, else this one.
    """
    with Store(folder, create=False) as store:
        found = found_so_far(store, name, grids, analyses, command or shlex.join(["lowbit", *sys.argv[1:]]))
    if not found.reports:
        if html is None:
            return
    elif output == "json":
        emit(json.loads(terminal.to_json(found)))
    elif output != "none":
        _print(found, output, titled=len(grids) > 1)
    if html is not None:
        write(found, html)
        (say if output == "json" else print)(str(html))


def found_so_far(
    store: Store, name: str, grids: Sequence[Grid], analyses: Sequence[str], command: str,
    tell: Callable[[str], object] = say,
) -> StudyReport:  # fmt: skip
    """What a study has shown by now; where nothing is scored, only how far it is."""
    found = assemble.study(store, name, grids, analyses, command, tell)
    if found is not None:
        return found
    return assemble.unscored(name, work(store, [cell for grid in grids for cell in grid.cells]), command)


def _print(found: StudyReport, output: Literal["auto", "plain", "md"], titled: bool) -> None:
    for report in found.reports:
        _print_model(report, output, titled)
    for panel in found.panels:
        print()
        terminal.show_panel(panel, output)


def _print_model(report: Report, output: Literal["auto", "plain", "md"], titled: bool) -> None:
    if titled and not (output == "auto" and sys.stdout.isatty()):  # the table of a terminal has a title
        print(f"{'## ' if output == 'md' else ''}{report.title}\n")
    terminal.show(report, output)
    if titled:
        print()
