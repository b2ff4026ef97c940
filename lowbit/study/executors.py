"""Where cells run: in this process, or in processes of this machine. One lane runs one cell at a time.

A lane has the shape of ``concurrent.futures``, and each process lane is one process, so that a worker's death costs
the one cell that it had, and cells that share a large input can be sent to the same process. A cluster's lanes need
no more than `Lane`: ``submit``, ``kill``, ``close`` (see `ray_executor`).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from lowbit.errors import StudyError

_SPAWN = multiprocessing.get_context("spawn")  # a forked copy of a process with threads or a GPU is broken
_CLOSE_S = 5.0
_SEEN_S = 10.0  # how long a network file system may take to show a new file on another machine
_starting = threading.Lock()


class WorkerLost(StudyError):
    """A worker vanished, maybe with its machine: the call may be sent again."""


class Lane(ABC):
    """Runs one call at a time, always in the same place."""

    @abstractmethod
    def submit(self, function: Callable[..., Any], /, *args: object) -> Future[Any]:
        """Starts ``function(*args)``. The future holds its result or exception, a `StudyError` if the worker died.

        A `WorkerLost` where that may have had other reasons than the call.
        """

    @abstractmethod
    def kill(self) -> None:
        """Ends the running call at once; the lane takes new ones."""

    @abstractmethod
    def close(self) -> None:
        """Ends the lane; a running call is given a few seconds."""


@dataclass(frozen=True)
class Executor:
    """A set of lanes. ``in_process`` lanes run a call inside ``submit`` and can be handed callbacks."""

    lanes: tuple[Lane, ...]
    in_process: bool

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self.lanes:
            lane.close()


def inline() -> Executor:
    """Runs cells in the calling thread: simplest to debug; a crash of a cell is a crash of the run."""
    return Executor((_InlineLane(),), in_process=True)


def processes(n: int, environments: Sequence[Mapping[str, str]] = ()) -> Executor:
    """Runs cells in ``n`` processes of this machine, each started with its first cell.

    ``environments`` gives variables per process, such as one ``CUDA_VISIBLE_DEVICES`` each. Unless they or the user's
    environment set ``OMP_NUM_THREADS``, the processor cores are shared out. Raises `StudyError` for a wrong number.
    """
    if n < 1 or (environments and len(environments) != n):
        raise StudyError(
            f"{n} processes with {len(environments)} environments", fix="one environment for each process."
        )
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // n))
    own = environments or [{}] * n
    return Executor(tuple(_ProcessLane({"OMP_NUM_THREADS": threads, **env}) for env in own), in_process=False)


class _InlineLane(Lane):
    def submit(self, function: Callable[..., Any], /, *args: object) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:  # an interrupt passes through
            future.set_exception(error)
        return future

    def kill(self) -> None:
        pass  # nothing runs between two calls of submit

    def close(self) -> None:
        pass


class _ProcessLane(Lane):
    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._worker: tuple[BaseProcess, Connection] | None = None

    def submit(self, function: Callable[..., Any], /, *args: object) -> Future[Any]:
        if self._worker is None or not self._worker[0].is_alive():
            self.kill()
            self._worker = _start(self._environment)
        future: Future[Any] = Future()
        call = (*self._worker, future, (function, args))
        threading.Thread(target=_exchange, args=call, name="lane", daemon=True).start()
        return future

    def kill(self) -> None:
        if self._worker is not None:
            process, connection = self._worker
            process.kill()
            process.join()
            connection.close()
            self._worker = None

    def close(self) -> None:
        if self._worker is not None:
            process, connection = self._worker
            connection.close()  # the worker, when it looks for its next call, finds the end
            process.join(_CLOSE_S)
        self.kill()


def _start(environment: Mapping[str, str]) -> tuple[BaseProcess, Connection]:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs,), name="lowbit-worker", daemon=True)
    with _with_environment(environment):
        process.start()
    theirs.close()  # so that the pipe ends when the worker does
    return process, ours


def _exchange(process: BaseProcess, connection: Connection, future: Future[Any], call: tuple[Any, ...]) -> None:
    """Sends one call and waits for its answer, or for the end of the worker."""
    try:
        connection.send(call)
        answer, error = connection.recv()
    except (EOFError, OSError):
        process.join()
        future.set_exception(_worker_died(process.exitcode))
    except Exception as problem:  # a call or an answer that does not cross processes
        future.set_exception(problem)
    else:
        if error is None:
            future.set_result(answer)
        else:
            future.set_exception(error)


def _serve(connection: Connection) -> None:
    """The life of a worker process: one call after the other until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all; the driver decides what ends
    threading.Thread(target=_follow_parent, daemon=True).start()
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        reply: tuple[object, Exception | None]
        try:
            reply = (function(*args), None)
        except Exception as error:
            reply = (None, error)
        try:
            connection.send(reply)
        except BrokenPipeError:  # the lane was closed; the store has the result
            return


def answered(call: bytes, sign: str) -> tuple[object, Exception | None]:
    """On another machine: what a pickled call returned, or its error as it was raised.

    The call is read only where the driver's ``sign``, a file in the store's folder, is seen: a store that is
    unpickled where its folder is not shared would make a new one.
    """
    try:
        _see(sign)
        function, args = pickle.loads(call)
        return function(*args), None
    except Exception as error:
        return None, error


def _see(sign: str) -> None:
    patience = time.monotonic() + _SEEN_S
    while not os.path.exists(sign):
        if time.monotonic() > patience:
            raise StudyError(
                "does not see the folder of the store", where=f"{os.uname().nodename}: {os.path.dirname(sign)}",
                why="Its results would be lost.", fix="mount the shared folder under the same path on every machine",
            )  # fmt: skip
        time.sleep(0.1)


def _follow_parent() -> None:
    """Ends this process with its driver: an orphan would hold its cell's lease and the machine."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)


def _worker_died(exitcode: int | None) -> StudyError:
    how = signal.Signals(-exitcode).name if exitcode is not None and exitcode < 0 else f"exit code {exitcode}"
    hint = "if memory ran out (SIGKILL often says so), fewer processes; inline() shows where a crash is."
    return StudyError(f"the worker process ended in the middle of this cell ({how})", fix=hint)


@contextmanager
def _with_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Variables that a child must see before its first import, which is when thread pools read them."""
    with _starting:
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
