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
from lowbit.report.model import Report
from lowbit.study import assemble
from lowbit.study.grid import Grid
from lowbit.study.store import Store

Output = Literal["auto", "plain", "md", "json", "none"]


def show_reports(folder: Path, name: str, grids: Sequence[Grid], output: Output, html: Path | None = None) -> None:
    """Print a table a model, then the paths of the reports, one a model too (to standard error beside JSON).

    A model whose original is not scored yet has neither, and is named on standard error.
    """
    command = shlex.join(["lowbit", *sys.argv[1:]])
    with Store(folder, create=False) as store:
        ready = [grid for grid in grids if _ready(store, grid)]
        found = [(grid, assemble.report(store, name, grid, command=command)) for grid in ready]
    if output == "json":
        emit([json.loads(terminal.to_json(report)) for _, report in found])
    elif output != "none":
        for _, report in found:
            _print(report, output, titled=len(grids) > 1)
    if html is None:
        return
    for grid, report in found:
        path = html if len(grids) == 1 else html.with_stem(f"{html.stem}-{grid.model.strip('/').replace('/', '-')}")
        write(report, path)
        (say if output == "json" else print)(str(path))


def _ready(store: Store, grid: Grid) -> bool:
    if assemble.ready(store, grid):
        return True
    say(f"{grid.model}: no table, because {grid.reference.label!r} is not done")
    return False


def _print(report: Report, output: Literal["auto", "plain", "md"], titled: bool) -> None:
    if titled and not (output == "auto" and sys.stdout.isatty()):  # the table of a terminal has a title
        print(f"{'## ' if output == 'md' else ''}{report.title}\n")
    terminal.show(report, output)
    if titled:
        print()
