"""Running the cells of grids with progress on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.cli.options import say
from lowbit.cli.progress import Bars


def run_grids(folder: Path, name: str, spec: Mapping[str, Any], grids: list[Any], jobs: int) -> int:
    """Compute what is missing of all grids; returns how many cells failed or could not run."""
    from lowbit.study import engine
    from lowbit.study.executors import inline, processes
    from lowbit.study.store import Store

    store = Store(folder)
    cells = [cell for grid in grids for cell in grid.cells]
    engine.add_cells(store, cells)
    store.put_study(name, dict(spec), [member for grid in grids for member in grid.members])
    with Bars() as bars:

        def show(event: engine.Event) -> None:
            label = event.cell.label
            match event:
                case engine.CellProgress(_, p):
                    bars.update(label, p.done, p.total, p.unit)
                case engine.CellDone(_, seconds):
                    bars.finish(label, f"done in {seconds:.1f} s")
                case engine.CellFailed(_, error, blocked):
                    bars.finish(label, f"{'not run' if blocked else 'failed'}: {error}")
                case _:
                    pass

        summary = engine.run(store, cells, inline() if jobs == 1 else processes(jobs), show)
    say(f"{summary.done} cells computed, {summary.skipped} were there, {summary.failed + summary.blocked} failed, "
        f"{summary.seconds:.1f} s")  # fmt: skip
    return summary.failed + summary.blocked
