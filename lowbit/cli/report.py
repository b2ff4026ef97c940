"""lowbit report: what a study found, as a page; while it runs, as a page that follows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli.options import StoreFolder, quiet, say
from lowbit.cli.study import Opened, open_study

if TYPE_CHECKING:
    from lowbit.report.model import StudyReport
    from lowbit.report.work import Work
    from lowbit.study.store import Store


def report(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="A study file (.toml), or the folder that one was run into.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="The HTML file. Default: report.html in the store."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine, and follow the study while it runs.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of --watch; 0 takes a free one. Default: 8765.")
    ] = None,
    store: StoreFolder = None,
) -> None:
    """Write what a study has found so far as one HTML file, or serve it live; computes nothing.

    The page begins with what got worse, what failed and what is missing. It also works before the first result.
    """
    if watch and out is not None:
        raise typer.BadParameter("--watch serves the page and writes no file", param_hint="--out")
    if port is not None and not watch:
        raise typer.BadParameter("only --watch listens", param_hint="--port")
    quiet()
    opened = _of_store(study) if study.is_dir() else open_study(study, store)
    if not watch:
        write_report(opened, out)
        return
    from lowbit.report import watch as watching

    watching.watch(Running(opened), 8765 if port is None else port, lambda address: print(address, flush=True))


def write_report(opened: Opened, out: Path | None) -> None:
    """Write the page of what is done, say how far that is, and print where it lies."""
    from lowbit.cli.tables import show_reports
    from lowbit.study.progress import work
    from lowbit.study.store import Store

    html, study = out or opened.folder / "report.html", opened.study
    with Store(opened.folder, create=False) as held:
        cells = [cell for grid in opened.grids for cell in grid.cells]
        left, old = work(held, cells), held.superseded(study.name, [cell.key for cell in cells])
    if old:
        say(f"{old} done cells of this study are of another version of lowbit or of its file, and do not count")
    if len(left.of("done")) < len(left.cells):
        say(f"{left.sentence()}; lowbit study run computes the rest")
    show_reports(opened.folder, study.name, opened.grids, "none", html, study.analyses, opened.command)


class Running:
    """A study whose store may be written to at this moment, or not be there yet."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._cells = [cell for grid in opened.grids for cell in grid.cells]
        self._store: Store | None = None

    def work(self) -> Work:
        """How far its cells are; all wait while there is no store."""
        from lowbit.study.progress import work

        return work(self._held(), self._cells)

    def report(self) -> StudyReport:
        """What it has found by now. Reads the evidence of every version that is scored."""
        from lowbit.cli.tables import found_so_far
        from lowbit.study import assemble
        from lowbit.study.progress import work

        study, held = self._opened.study, self._held()
        if held is None:
            return assemble.unscored(study.name, work(None, self._cells), self._opened.command)
        return found_so_far(
            held, study.name, self._opened.grids, study.analyses, self._opened.command, tell=lambda _: None
        )

    def _held(self) -> Store | None:
        from lowbit.study.store import Store

        if self._store is None and (self._opened.folder / "lowbit.sqlite").exists():
            self._store = Store(self._opened.folder, create=False)
        return self._store


def _of_store(folder: Path) -> Opened:
    """The one study of a store, as it was last run. Raises StudyError where there are several, or none of a file."""
    from pydantic import ValidationError

    from lowbit.errors import StudyError
    from lowbit.study import grid
    from lowbit.study.spec import Study
    from lowbit.study.store import Store

    with Store(folder, create=False) as held:
        studies = held.studies()
    if len(studies) != 1:
        raise StudyError(
            f"holds {len(studies)} studies{': ' if studies else ''}{', '.join(sorted(studies))}", where=str(folder),
            fix="lowbit report STUDY.toml --store FOLDER, with the file of the one that is meant",
        )  # fmt: skip
    name, spec = next(iter(studies.items()))
    try:
        study = Study.model_validate(spec)
    except ValidationError as error:
        raise StudyError(
            f"holds {name!r}, which is no study of a file of this version", where=str(folder),
            fix="lowbit report STUDY.toml --store FOLDER; lowbit compare has --report of its own",
        ) from error  # fmt: skip
    return Opened(study, grid.of_study(study, say), folder, "lowbit study run")
