"""What a worker does with one cell: claim, compute with a beating heart, publish; and what a stage gets to see."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lowbit.errors import LowbitError, StorageError, StudyError
from lowbit.study.keys import code_version, spelled
from lowbit.study.rows import CellRow, Progress, Usage
from lowbit.study.store import Store, lease_lost, new_owner

_REPORT_S = 0.25  # progress is for people: no more writes than they can read
OnProgress = Callable[[Progress], object]
StageFunction = Callable[["StageContext"], Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A kind of cell: ``function`` is "module:name" of a `StageFunction`; ``code`` names what its results depend on.

    ``code`` holds full dotted names of modules or packages ("lowbit.methods"); the function's own module is always
    part of it. A change in any of their source files gives every cell of the stage a new key.
    """

    name: str
    function: str
    code: tuple[str, ...] = ()

    def code_version(self) -> str:
        """Digest of the source that makes this stage's results; see `keys.code_version`."""
        return code_version(*sorted({self._module_and_name()[0], *self.code}))

    def load(self) -> StageFunction:
        """Imports the function. Raises `StudyError` when it is not there."""
        module, name = self._module_and_name()
        try:
            function: StageFunction = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise StudyError(f"cannot import {self.function!r}: {error}", where=f"stage {self.name!r}") from error
        return function

    def _module_and_name(self) -> tuple[str, str]:
        module, colon, name = self.function.partition(":")
        if not (module and colon and name):
            raise StudyError(f"not a function path: {self.function!r}", where=f"stage {self.name!r}", fix="module:name")
        return module, name


@dataclass(frozen=True)
class StageContext:
    """All that a stage knows: its parameters, what its inputs gave, where to write, and whom to tell how far it is."""

    key: str
    label: str
    params: Mapping[str, Any]
    folder: Path  # evidence: empty at the start, published when the stage returns
    inputs: tuple[CellRow, ...]
    _store: Store = field(repr=False)
    _tell: OnProgress = field(repr=False)

    def input(self, i: int) -> Mapping[str, Any]:
        """What the ``i``-th input returned."""
        return self.inputs[i].output or {}

    def input_folder(self, i: int) -> Path:
        """The evidence folder of the ``i``-th input; read only."""
        return self._store.evidence_folder(self.inputs[i].key)

    def input_checkpoint(self, i: int) -> Path:
        """The checkpoint folder of the ``i``-th input; read only."""
        return self._store.checkpoint_folder(self.inputs[i].key)

    @property
    def checkpoint(self) -> Path:
        """This cell's checkpoint folder. It outlives a kill: write each piece atomically and skip what exists."""
        return self._store.checkpoint_folder(self.key)

    def report(self, done: int, total: int, unit: str) -> None:
        """Tells how far the stage is; cheap to call often. Raises `StudyError` when the cell went to another worker."""
        self._tell(Progress(done, total, unit))


class Outcome(NamedTuple):
    """How an attempt at a cell ended; "elsewhere" when another worker has it or had it already."""

    status: Literal["done", "failed", "elsewhere"]
    seconds: float = 0.0
    error: str = ""


def run_cell(store: Store, key: str, stage: Stage, lease_s: float, observe: OnProgress | None = None) -> Outcome:
    """Claims the cell, runs its stage and records the result; an error of the stage is an outcome, not an exception.

    An interrupt gives the cell back and goes on upwards. Runs in any process that sees the store's folder.
    """
    owner = new_owner()
    row = store.claim(owner, lease_s, key)
    if row is None:
        return Outcome("elsewhere")
    meter = _Meter()
    try:
        if stage.code_version() != row.code_version:
            raise StudyError(
                "the source changed after this cell was planned", where=row.label, fix="run the study again."
            )
        with _beating(store, key, owner, lease_s), store.evidence(key) as folder:
            inputs = store.lookup(row.inputs)
            tell = _Reporter(store, key, owner, observe)
            context = StageContext(
                key, row.label, row.params, folder, tuple(inputs[k] for k in row.inputs), store, tell
            )
            output = stage.load()(context)
            _check_output(output, row.label)
            if not store.heartbeat(key, owner):  # who lost the lease must not publish over the new owner's evidence
                raise lease_lost(key)
        usage = meter.read()
        store.finish(key, owner, output, usage)
    except (Exception, SystemExit) as error:
        text = str(error) if isinstance(error, LowbitError) else "".join(traceback.format_exception(error))
        seconds = meter.read().seconds
        return Outcome("failed", seconds, text) if store.fail(key, text, owner) else Outcome("elsewhere", seconds, text)
    except BaseException:
        store.release(key, owner)
        raise
    return Outcome("done", usage.seconds)


def _check_output(output: object, label: str) -> None:
    """Before the evidence is published: an output that cannot be stored fails the cell as a whole."""
    if not isinstance(output, Mapping):
        raise StudyError(f"the stage returned {type(output).__name__}", where=label, fix="a mapping of JSON values.")
    spelled(output, where=f"output of {label}")


class _Reporter:
    """Passes progress to the store and to an observer in this process, a few times a second and at the end."""

    def __init__(self, store: Store, key: str, owner: str, observe: OnProgress | None) -> None:
        self._store, self._key, self._owner, self._observe = store, key, owner, observe
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() < self._next and progress.done < progress.total:
            return
        self._next = time.monotonic() + _REPORT_S
        if not self._store.heartbeat(self._key, self._owner, progress):
            raise lease_lost(self._key)
        if self._observe:
            self._observe(progress)


@contextmanager
def _beating(store: Store, key: str, owner: str, lease_s: float) -> Iterator[None]:
    """Renews the lease from a thread: a stage may be silent for longer than a lease, a killed process may not."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(lease_s / 4):
            try:
                store.heartbeat(key, owner)
            except StorageError:
                continue  # a busy disk costs one beat; finish() decides whether the cell is still ours

    thread = threading.Thread(target=beat, name=f"lease-{key[:12]}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Meter:
    """Wall seconds, processor seconds of all threads, and the peak of resident memory since it was made.

    The peak is the cell's own where a process may reset its high-water mark (Linux); elsewhere it is the highest
    since the process began, which is no less.
    """

    def __init__(self) -> None:
        if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Usage:
        return Usage(time.perf_counter() - self._wall, time.process_time() - self._cpu, _peak_bytes())


def _peak_bytes() -> int:
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    import resource  # not on Windows, hence not at the top

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
