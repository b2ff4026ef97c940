"""lowbit study: a grid of models, recipes and measures that resumes, and its report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from lowbit.cli.options import Jobs, Json, StoreFolder, Style, emit, quiet, say

app = typer.Typer(help="Grids of models x recipes x measures: resumable, in one process or many.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="What to make and to measure.")]


@app.command()
def run(
    file: File,
    store: StoreFolder = None,
    jobs: Jobs = 1,
    executor: Annotated[
        Literal["local", "ray", "slurm"],
        typer.Option("-x", "--executor", help="Where cells run: here, on a Ray cluster (RAY_ADDRESS), as Slurm jobs."),
    ] = "local",
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="The HTML report. Default: report.html in the store."),
    ] = None,
    output: Style = "auto",
    as_json: Json = False,
) -> None:
    """Compute every cell that is not there yet, print the table, write the report.

    Killed at any moment, the same command goes on. A cell that fails stops only what needs it.
    """
    quiet()
    from lowbit.cli.run import run_grids
    from lowbit.cli.tables import show_reports

    opened = open_study(file, store)
    failed = run_grids(opened.folder, opened.study.name, opened.study.model_dump(), opened.grids, jobs, executor)
    html = report or opened.folder / "report.html"
    asked = opened.study.analyses
    show_reports(opened.folder, opened.study.name, opened.grids, "json" if as_json else output, html, asked)
    if failed:
        raise typer.Exit(1)


@app.command()
def show(
    file: File,
    store: StoreFolder = None,
    output: Style = "auto",
    sql: Annotated[
        str | None, typer.Option("--sql", metavar="SELECT", help="Ask the views cells, findings and tokens instead.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the table of what is done, what failed, and how much is left; computes nothing."""
    quiet()
    from lowbit.cli.run import blocked_by, indented
    from lowbit.cli.tables import show_reports
    from lowbit.study.store import Store

    if sql is not None:
        _answer(file, store, sql, as_json)
        return
    opened = open_study(file, store)
    cells = [cell for grid in opened.grids for cell in grid.cells]
    with Store(opened.folder, create=False) as held:
        rows = held.lookup([cell.key for cell in cells])
        old = held.superseded(opened.study.name, [cell.key for cell in cells])
    if old:
        say(f"{old} done cells of this study are of another version of lowbit or of its file, and do not count")
    say(f"{sum(row.status == 'done' for row in rows.values())} of {len(cells)} cells are done")
    for cell in cells:
        row = rows.get(cell.key)
        if row is not None and row.status == "failed":
            error = row.error or ""
            say(f"{cell.label}: {blocked_by(error) if error.startswith('not run:') else f'FAILED: {indented(error)}'}")
    asked = opened.study.analyses
    show_reports(opened.folder, opened.study.name, opened.grids, "json" if as_json else output, None, asked)


@app.command()
def report(
    file: File,
    store: StoreFolder = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="The HTML file. Default: report.html in the store."),
    ] = None,
) -> None:
    """Write the HTML report of what is done; the same as `lowbit report`."""
    from lowbit.cli.report import write_report

    quiet()
    write_report(open_study(file, store), out)


class Opened(NamedTuple):
    """A ``Study``, its ``Grid``s and its folder; the types' modules import torch, too slow for help."""

    study: Any
    grids: list[Any]
    folder: Path
    command: str
    """What makes its results."""


def open_study(file: Path, store: Path | None) -> Opened:
    """What a study file says, and where its store lies."""
    from lowbit.study import grid, spec

    study = spec.load(file)
    command = ["lowbit", "study", "run", str(file), *([] if store is None else ["--store", str(store)])]
    return Opened(study, grid.of_study(study, say), _folder(study.name, store), shlex.join(command))


def _folder(name: str, store: Path | None) -> Path:
    return store or Path("runs") / name


def _answer(file: Path, store: Path | None, sql: str, as_json: bool) -> None:
    """Print what DuckDB answers, as columns or as a JSON list of rows."""
    from lowbit.cli.columns import print_columns
    from lowbit.report.text import MISSING
    from lowbit.study import spec
    from lowbit.study.query import query
    from lowbit.study.store import Store

    name = spec.load(file).name
    with Store(_folder(name, store), create=False) as held:
        table = query(held, name, sql)
    rows = table.to_pylist()
    if as_json:
        emit(rows)
        return
    words = [column for column in table.column_names if any(isinstance(row[column], str) for row in rows)]
    spelled = [[MISSING if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()]
               for row in rows]  # fmt: skip
    print_columns(table.column_names, spelled, words)
