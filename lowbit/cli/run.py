"""Running the cells of grids with progress on the screen. Imports torch, so commands import it when they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lowbit.cli.options import say
from lowbit.cli.progress import Bars
from lowbit.study import engine, ray_executor, slurm_executor
from lowbit.study.executors import Executor, inline, processes
from lowbit.study.grid import Planned
from lowbit.study.rows import Member
from lowbit.study.store import Store

Where = Literal["local", "ray", "slurm"]
"""On this machine, on those of a Ray cluster, or as jobs of a Slurm cluster."""


def run_grids(
    folder: Path, name: str, spec: Mapping[str, Any], grids: Sequence[Planned], jobs: int, where: Where = "local"
) -> int:
    """Compute what is missing of all grids; returns how many cells failed or could not run."""
    cells = [cell for grid in grids for cell in grid.cells]
    with Store(folder) as store, _executor(folder, jobs, where) as executor, Bars() as bars:
        engine.add_cells(store, cells)
        store.put_study(name, dict(spec), [member for grid in grids for member in grid.members])
        summary = _run(store, cells, executor, bars)
    _sum_up([summary])
    return summary.failed + summary.blocked


class Running:
    """Cells computed a few at a time, where the next ones depend on what the last ones found.

    The study ``name`` lists all of them; what was done is told at the end.
    """

    def __init__(self, store: Store, name: str, spec: Mapping[str, Any], executor: Executor, bars: Bars) -> None:
        self.store, self.name, self.spec, self.executor, self.bars = store, name, dict(spec), executor, bars
        self.members: dict[str, Member] = {}
        self.summaries: list[engine.RunSummary] = []

    def __call__(self, cells: Sequence[engine.Cell]) -> None:
        """Compute what is missing of these."""
        engine.add_cells(self.store, cells)
        self.members |= {cell.key: Member(cell.key, f"{self.name}/{cell.stage.name}") for cell in cells}
        self.store.put_study(self.name, self.spec, list(self.members.values()))
        self.summaries.append(_run(self.store, cells, self.executor, self.bars))


@contextmanager
def running(folder: Path, name: str, spec: Mapping[str, Any], jobs: int) -> Iterator[Running]:
    """A store, workers and bars that stay open while cells are chosen."""
    with Store(folder) as store, _executor(folder, jobs, "local") as executor, Bars() as bars:
        found = Running(store, name, spec, executor, bars)
        yield found
    _sum_up(found.summaries)


def _run(store: Store, cells: Sequence[engine.Cell], executor: Executor, bars: Bars) -> engine.RunSummary:
    def show(event: engine.Event) -> None:
        label = event.cell.label
        match event:
            case engine.CellStarted():
                bars.begin(label)
            case engine.CellProgress(_, p):
                bars.update(label, p.done, p.total, p.unit)
            case engine.CellDone(_, seconds):
                bars.finish(label, f"done in {seconds:.1f} s")
            case engine.CellFailed(_, error, blocked):
                bars.finish(label, blocked_by(error) if blocked else f"FAILED: {indented(error)}")
            case _:
                pass

    return engine.run(store, cells, executor, show)


def _sum_up(runs: Sequence[engine.RunSummary]) -> None:
    failed, blocked = sum(r.failed for r in runs), sum(r.blocked for r in runs)
    parts = [f"{sum(r.done for r in runs)} cells computed", f"{sum(r.skipped for r in runs)} were there"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{blocked} not run because of it"] if blocked else []
    say(f"{', '.join(parts)}, {sum(r.seconds for r in runs):.1f} s")


def _executor(folder: Path, jobs: int, where: Where) -> Executor:
    if where == "ray":
        return ray_executor.cluster(jobs, folder)
    if where == "slurm":
        return slurm_executor.cluster(jobs, folder)
    return inline() if jobs == 1 else processes(jobs)


def blocked_by(error: str) -> str:
    """Why a cell was not run, without the text of the failure, which stands with the cell that failed."""
    return error.partition("\n")[0].removesuffix(":")


def indented(error: str) -> str:
    """An error of several lines, so that it is seen where it ends."""
    return error.rstrip().replace("\n", "\n  ")
