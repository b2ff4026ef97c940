"""lowbit study: a grid of models, recipes and measures that resumes, and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Jobs, Json, StoreFolder, emit, quiet, say

app = typer.Typer(help="Grids of models x recipes x measures: resumable, in one process or many.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(help="A study file (TOML).")]
Format = Annotated[str, typer.Option("-o", "--output", help="auto, plain or md (paste it into an issue).")]


@app.command()
def run(
    file: File,
    store: StoreFolder = None,
    jobs: Jobs = 1,
    report: Annotated[Path | None, typer.Option("--report", help="Write the HTML report here too.")] = None,
    as_json: Json = False,
) -> None:
    """Compute every cell that is not there yet, print the table, write the report."""
    from lowbit.cli.run import run_grids
    from lowbit.study import grid, spec

    quiet()
    study = spec.load(file)
    grids = grid.of_study(study, say)
    folder = store or Path("runs") / study.name
    failed = run_grids(folder, study.name, study.model_dump(), grids, jobs)
    show_reports(folder, study.name, grids, report or folder / "report.html", as_json, "auto")
    if failed:
        raise typer.Exit(1)


@app.command()
def show(file: File, store: StoreFolder = None, output: Format = "auto", as_json: Json = False) -> None:
    """Print the table of what is done, and how much is left; computes nothing."""
    from lowbit.study import grid, spec
    from lowbit.study.store import Store

    quiet()
    study = spec.load(file)
    grids = grid.of_study(study, say)
    folder = store or Path("runs") / study.name
    held = Store(folder, create=False).lookup([cell.key for g in grids for cell in g.cells])
    done = sum(row.status == "done" for row in held.values())
    say(f"{done} of {sum(len(g.cells) for g in grids)} cells are done")
    for row in held.values():
        if row.status == "failed":
            say(f"failed: {row.label}: {row.error}")
    show_reports(folder, study.name, grids, None, as_json, output)


@app.command()
def report(
    file: File,
    store: StoreFolder = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The HTML file.")] = None,
) -> None:
    """Write the HTML report of what is done; computes nothing."""
    from lowbit.study import grid, spec

    quiet()
    study = spec.load(file)
    grids = grid.of_study(study, say)
    folder = store or Path("runs") / study.name
    show_reports(folder, study.name, grids, out or folder / "report.html", False, "none")


def show_reports(folder: Path, name: str, grids: list[Any], out: Path | None, as_json: bool, style: Any) -> None:
    """Print a table a model; write a report a model, its path printed last."""
    from lowbit.report import page, terminal
    from lowbit.study.assemble import report as assemble
    from lowbit.study.store import Store

    store = Store(folder, create=False)
    reports = [assemble(store, name, grid) for grid in grids]
    written = []
    for i, found in enumerate(reports):
        if as_json:
            continue
        if style != "none":
            terminal.show(found, style)
        if out is not None:
            path = out if len(reports) == 1 else out.with_stem(f"{out.stem}-{i + 1}")
            written.append(page.write(found, path))
    if as_json:
        import json

        emit([json.loads(terminal.to_json(found)) for found in reports])
    for path in written:
        print(path)
