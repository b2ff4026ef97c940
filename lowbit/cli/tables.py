"""What a study found, for people: tables on the screen, JSON, HTML. Imports torch: commands import it when they run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lowbit.cli.options import emit, say
from lowbit.report import terminal, write
from lowbit.report.model import Report, StudyReport
from lowbit.study import assemble
from lowbit.study.grid import Grid
from lowbit.study.store import Store

Output = Literal["auto", "plain", "md", "json", "none"]


def show_reports(
    folder: Path, name: str, grids: Sequence[Grid], output: Output, html: Path | None = None,
    analyses: Sequence[str] = (),
) -> None:  # fmt: skip
    """Print a table a model and what the ``analyses`` found, then the path of the report (beside JSON: to stderr).

    A model whose original is not scored yet is named on standard error; where no model's is, that is all.
    """
    with Store(folder, create=False) as store:
        found = assemble.study(store, name, grids, analyses, command=shlex.join(["lowbit", *sys.argv[1:]]), say=say)
    if found is None:
        return
    if output == "json":
        emit(json.loads(terminal.to_json(found)))
    elif output != "none":
        _print(found, output, titled=len(grids) > 1)
    if html is not None:
        write(found, html)
        (say if output == "json" else print)(str(html))


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
