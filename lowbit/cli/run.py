"""Running the cells of grids with progress on the screen. Imports torch, so commands import it when they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lowbit.cli.options import say
from lowbit.cli.progress import Bars
from lowbit.study import engine, ray_executor, slurm_executor
from lowbit.study.executors import Executor, inline, processes
from lowbit.study.grid import Planned
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

        summary = engine.run(store, cells, executor, show)
    parts = [f"{summary.done} cells computed", f"{summary.skipped} were there"]
    parts += [f"{summary.failed} failed"] if summary.failed else []
    parts += [f"{summary.blocked} not run because of it"] if summary.blocked else []
    say(f"{', '.join(parts)}, {summary.seconds:.1f} s")
    return summary.failed + summary.blocked


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
