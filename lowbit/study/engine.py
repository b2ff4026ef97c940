"""Runs the cells of a study: inputs first, nothing twice, and a failure stops only what needs it.

The store is the truth. The driver below plans and watches; workers claim cells, so several drivers, on one machine or
many, may work on the same store, and a run that was killed anywhere goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lowbit.errors import StudyError
from lowbit.study.executors import Executor, Lane, WorkerLost
from lowbit.study.keys import cell_key, spelled
from lowbit.study.rows import Progress
from lowbit.study.store import LEASE_S, Store
from lowbit.study.worker import Outcome, Stage, run_cell

_POLL_S = 0.2
_LOSSES = 2  # workers that a cell may lose before it is held to be the reason


@dataclass(frozen=True)
class Cell:
    """One unit of work: a stage, the keys of the cells that it reads, and its parameters (JSON).

    ``label`` is for people and ``affinity`` for the scheduler (cells that share a large input carry the same text and
    prefer the same worker, in sequence); neither is part of ``key``, the identity of the result.
    """

    stage: Stage
    label: str
    inputs: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    affinity: str = ""
    key: str = field(init=False)

    def __post_init__(self) -> None:
        # A copy: a caller who reuses a dict must not change what the key was made from.
        params = json.loads(spelled(dict(self.params), where=self.label))
        object.__setattr__(self, "params", params)
        key = cell_key(self.stage.name, self.inputs, params, self.stage.code_version())
        object.__setattr__(self, "key", key)


@dataclass(frozen=True)
class CellSkipped:
    """The result exists already, or another driver made it."""

    cell: Cell


@dataclass(frozen=True)
class CellStarted:
    """The cell was given to the worker in ``lane``, counted from 0.

    It is skipped later when another driver's worker was faster, or started again when that one died.
    """

    cell: Cell
    lane: int


@dataclass(frozen=True)
class CellProgress:
    """How far a running cell is."""

    cell: Cell
    progress: Progress


@dataclass(frozen=True)
class CellDone:
    """The cell was computed in ``seconds`` of wall time."""

    cell: Cell
    seconds: float


@dataclass(frozen=True)
class CellFailed:
    """The cell failed with this text; ``blocked``: it did not run, because a cell that it needs failed."""

    cell: Cell
    error: str
    blocked: bool


Event = CellSkipped | CellStarted | CellProgress | CellDone | CellFailed
OnEvent = Callable[[Event], object]


class RunSummary(NamedTuple):
    """Counts of a run: computed, found done, failed, and not run because of a failure; and its wall time."""

    done: int
    skipped: int
    failed: int
    blocked: int
    seconds: float


def add_cells(store: Store, cells: Iterable[Cell]) -> None:
    """Makes cells known to the store, so that a study can list them before they run (`Store.put_study`)."""
    for cell in cells:
        store.add_cell(cell.key, cell.stage.name, cell.label, cell.inputs, cell.params, cell.stage.code_version())


def run(
    store: Store,
    cells: Iterable[Cell],
    executor: Executor,
    on_event: OnEvent = lambda event: None,
    *,
    lease_s: float = LEASE_S,
) -> RunSummary:
    """Computes those of ``cells`` whose results the store does not hold; failed ones are tried again.

    Ready cells start in the order given, except that a worker stays with the affinity of its last cell while it can.
    ``on_event`` is called from this thread. Cells that another driver is computing are waited for, and taken over when
    it dies. An interrupt kills the workers, frees their cells and goes on upwards. Raises `StudyError` for an input
    that is neither among ``cells`` nor done.
    """
    return _Run(store, executor, on_event, lease_s).run({cell.key: cell for cell in cells})


@dataclass
class _Hand:
    """A lane, and what the driver knows of it."""

    number: int
    lane: Lane
    affinity: str = ""
    busy: bool = False


class _Run:
    """The driver of one run; ``waiting`` keeps the order given, and a cell leaves it when it starts or ends."""

    def __init__(self, store: Store, executor: Executor, on_event: OnEvent, lease_s: float) -> None:
        self.store, self.executor, self.on_event, self.lease_s = store, executor, on_event, lease_s
        self.hands = [_Hand(i, lane) for i, lane in enumerate(executor.lanes)]
        self.running: dict[Future[Outcome], tuple[_Hand, Cell]] = {}
        self.progress: dict[str, Progress] = {}
        self.waiting: dict[str, Cell] = {}
        self.elsewhere: set[str] = set()  # waiting cells that another driver's worker holds
        self.losses: Counter[str] = Counter()
        self.done: set[str] = set()
        self.counts = {CellDone: 0, CellSkipped: 0, CellFailed: 0}
        self.blocked = 0

    def run(self, cells: dict[str, Cell]) -> RunSummary:
        started = time.perf_counter()
        self.plan(cells)
        try:
            while self.waiting or self.running:
                self.start()
                self.watch()
        except BaseException:
            for hand in self.hands:
                hand.lane.kill()
            self.store.release_stale(self.lease_s)
            raise
        done, skipped, failed = self.counts.values()
        return RunSummary(done, skipped, failed - self.blocked, self.blocked, time.perf_counter() - started)

    def plan(self, cells: dict[str, Cell]) -> None:
        """Sorts the cells into done and waiting."""
        outside = {key for cell in cells.values() for key in cell.inputs if key not in cells}
        known = self.store.lookup([*cells, *outside])
        self.done = {key for key, row in known.items() if row.status == "done" and self.has_evidence(key)}
        for cell in cells.values():
            for key in cell.inputs:
                if key in outside and key not in self.done:
                    raise StudyError(f"needs cell {key[:12]}, which is neither in this run nor done", where=cell.label)
        self.store.release_stale(self.lease_s)
        add_cells(self.store, (cell for key, cell in cells.items() if key not in known))
        for key, cell in cells.items():
            if key in self.done:
                self.tell(CellSkipped(cell))
                continue
            self.waiting[key] = cell
            if key in known:
                self.store.reopen(key, known[key].status)  # if it failed, or if its evidence was lost

    def has_evidence(self, key: str) -> bool:
        return self.store.evidence_folder(key).is_dir()

    def start(self) -> None:
        """Gives each idle lane a cell, as long as there is one."""
        for hand in self.hands:
            if hand.busy or (cell := self.pick(hand)) is None:
                continue
            del self.waiting[cell.key]
            hand.busy, hand.affinity = True, cell.affinity
            self.tell(CellStarted(cell, hand.number))
            task = (self.store, cell.key, cell.stage, self.lease_s)
            if self.executor.in_process:
                future = hand.lane.submit(run_cell, *task, lambda told, cell=cell: self.tell(CellProgress(cell, told)))
            else:
                future = hand.lane.submit(run_cell, *task)
            self.running[future] = hand, cell

    def pick(self, hand: _Hand) -> Cell | None:
        """The first ready cell of the lane's own affinity, else of an affinity that no other lane has, else any."""
        others = {other.affinity for other in self.hands if other is not hand and other.affinity}

        def strangeness(cell: Cell) -> int:
            return 0 if cell.affinity and cell.affinity == hand.affinity else 2 if cell.affinity in others else 1

        return min(self.ready(), key=strangeness, default=None)

    def ready(self) -> Iterator[Cell]:
        for key, cell in self.waiting.items():
            if key not in self.elsewhere and self.done.issuperset(cell.inputs):
                yield cell

    def watch(self) -> None:
        """Waits a moment for ends, then looks at what happens out of sight."""
        if self.running:
            ended, _ = wait(self.running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for future in ended:
                self.settle(*self.running.pop(future), future)
        else:
            time.sleep(_POLL_S)
        self.look_at_progress()
        self.look_elsewhere()

    def settle(self, hand: _Hand, cell: Cell, future: Future[Outcome]) -> None:
        """Takes note of how a cell ended."""
        hand.busy = False
        problem = future.exception()
        if isinstance(problem, WorkerLost) and self.losses[cell.key] < _LOSSES:
            self.losses[cell.key] += 1
            self.waiting[cell.key] = cell
            self.elsewhere.add(cell.key)  # until the lease of the lost worker is known to be over
            return
        if problem is not None:  # run_cell makes outcomes of a stage's errors: this is the worker itself
            self.store.fail(cell.key, str(problem))
            self.failed(cell, str(problem))
            return
        outcome = future.result()
        if outcome.status == "done":
            self.done.add(cell.key)
            self.tell(CellDone(cell, outcome.seconds))
        elif outcome.status == "failed":
            self.failed(cell, outcome.error)
        else:
            self.waiting[cell.key] = cell
            self.elsewhere.add(cell.key)

    def failed(self, cell: Cell, error: str) -> None:
        """Reports a failure, and in its turn each cell that can no longer run."""
        self.tell(CellFailed(cell, error, blocked=False))
        lost, text = {cell.key}, f"not run: it needs {cell.label!r}, which failed:\n{error}"
        while blocked := [c for c in self.waiting.values() if not lost.isdisjoint(c.inputs)]:
            for other in blocked:
                lost.add(other.key)
                del self.waiting[other.key]
                self.elsewhere.discard(other.key)
                self.store.fail(other.key, text)
                self.blocked += 1
                self.tell(CellFailed(other, text, blocked=True))

    def look_at_progress(self) -> None:
        """Workers of other processes leave their progress in the store."""
        if self.executor.in_process or not self.running:
            return
        cells = {cell.key: cell for _, cell in self.running.values()}
        for key, row in self.store.lookup(cells).items():
            if row.progress is not None and row.progress != self.progress.get(key):
                self.progress[key] = row.progress
                self.tell(CellProgress(cells[key], row.progress))

    def look_elsewhere(self) -> None:
        """Follows the cells that other drivers hold, and takes back those whose owner died."""
        if not self.elsewhere:
            return
        self.store.release_stale(self.lease_s)
        for key, row in self.store.lookup(self.elsewhere).items():
            if row.status == "claimed":
                continue
            self.elsewhere.discard(key)
            if row.status == "todo":
                continue
            cell = self.waiting.pop(key)
            if row.status == "done":
                self.done.add(key)
                self.tell(CellSkipped(cell))
            else:
                self.failed(cell, row.error or "")

    def tell(self, event: Event) -> None:
        if not isinstance(event, CellStarted | CellProgress):
            self.counts[type(event)] += 1
        self.on_event(event)
