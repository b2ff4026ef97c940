"""How far a study is, read from its store."""

from __future__ import annotations

import time
from collections.abc import Iterable

from lowbit.report.work import CellWork, Step, Work
from lowbit.study.engine import Cell
from lowbit.study.rows import CellRow
from lowbit.study.store import LEASE_S, Store

_BLOCKED = "not run:"  # how the engine begins the error of a cell whose input failed


def work(store: Store | None, cells: Iterable[Cell]) -> Work:
    """What became of the cells; all of them wait where there is no store yet. One query, no evidence is read."""
    cells = list(cells)
    rows = {} if store is None else store.lookup([cell.key for cell in cells])
    return Work(tuple(_cell(cell, rows.get(cell.key)) for cell in cells))


def _cell(cell: Cell, row: CellRow | None) -> CellWork:
    label, stage = cell.label, cell.stage.name
    if row is None:
        return CellWork(label, stage, "waiting")
    if row.status == "failed":
        error = row.error or ""
        blocked = error.startswith(_BLOCKED)
        why = error.partition("\n")[0].removeprefix(_BLOCKED).removesuffix(":").strip() if blocked else error
        return CellWork(label, stage, "blocked" if blocked else "failed", why)
    if row.status == "claimed" and row.heartbeat is not None and row.heartbeat > time.time() - LEASE_S:
        return CellWork(label, stage, "running", step=None if row.progress is None else Step(*row.progress))
    return CellWork(label, stage, "done" if row.status == "done" else "waiting", seconds=row.seconds)
