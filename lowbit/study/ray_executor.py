"""Runs cells on the machines of a Ray cluster: each lane is one actor, placed by Ray where processor cores are free.

The store stays the truth, so every machine must see its folder under the same path, and the models and texts too. What
a worker that vanished had computed is not lost to others: its lease ends and the cell runs again, elsewhere.
"""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import MissingExtra, StudyError
from lowbit.study.database import on_network
from lowbit.study.executors import Executor, Lane, WorkerLost, answered

_CLOSE_S = 5.0


def cluster(n: int, folder: Path) -> Executor:
    """``n`` lanes on the cluster that ``RAY_ADDRESS`` names, one that runs on this machine, or a new one of it alone.

    ``folder`` is that of the store. The cores of the cluster are shared out evenly; an actor starts with its first
    cell. Raises MissingExtra without Ray, StudyError when there are fewer cores than lanes or when several machines
    would share a folder of a local disk.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra.of("ray", "ray") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers otherwise
    joined = not ray.is_initialized()
    if joined:
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise StudyError(
                f"no Ray cluster: {error}", where=f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')}",
                fix="ray status, then RAY_ADDRESS=host:6379, or unset it for this machine alone",
            ) from error  # fmt: skip
    nodes = [node for node in ray.nodes() if node["Alive"]]
    folder = folder.absolute()
    hosts = {node["NodeManagerHostname"] for node in nodes}
    if len(hosts) > 1 and not on_network(folder):
        raise StudyError(
            f"the store is on a local disk and the cluster has {len(hosts)} machines", where=str(folder),
            why="What one machine writes the others must see at once.", fix="--store on a shared folder (NFS 4)",
        )  # fmt: skip
    cores = share([int(node["Resources"].get("CPU", 0)) for node in nodes], n)
    folder.mkdir(parents=True, exist_ok=True)
    sign = folder / f".ray-{uuid.uuid4().hex}"
    sign.touch()
    return _RayExecutor(tuple(_RayLane(cores, sign) for _ in range(n)), False, sign, joined)


def share(cores: Sequence[int], n: int) -> int:
    """The most cores that each of ``n`` lanes can have, none of them spread over two machines.

    Raises StudyError when there is not one for each.
    """
    for each in range(max(cores, default=0), 0, -1):
        if n > 0 and sum(core // each for core in cores) >= n:
            return each
    raise StudyError(f"{n} workers on {sum(cores)} cores", where="Ray cluster", fix=f"-j {max(sum(cores), 1)}")


@dataclass(frozen=True)
class _RayExecutor(Executor):
    sign: Path
    joined: bool

    def __exit__(self, *error: object) -> None:
        import ray

        super().__exit__(*error)
        self.sign.unlink(missing_ok=True)
        if self.joined:
            ray.shutdown()


class _RayLane(Lane):
    def __init__(self, cores: int, sign: Path) -> None:
        self._cores, self._sign = cores, str(sign)
        self._actor: Any = None
        self._running: Future[Any] | None = None

    def submit(self, function: Callable[..., Any], /, *args: object) -> Future[Any]:
        import ray

        if self._actor is None:
            remote = ray.remote(num_cpus=self._cores, max_restarts=0, max_task_retries=0)  # the engine decides
            self._actor = remote(_Worker).remote()
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        # The call travels as bytes: a store that is unpickled where its folder is not shared would make a new one.
        actor = self._actor
        reference = actor.run.remote(pickle.dumps((function, args)), self._sign)
        reference.future().add_done_callback(lambda done: self._settle(done, future, actor))
        self._running = future
        return future

    def kill(self) -> None:
        import ray

        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)
            self._actor = None

    def close(self) -> None:
        if self._running is not None:
            wait_for([self._running], timeout=_CLOSE_S)
        self.kill()

    def _settle(self, done: Future[Any], future: Future[Any], actor: object) -> None:
        from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError

        problem = done.exception()
        if isinstance(problem, RayActorError | WorkerCrashedError | OutOfMemoryError):
            self._actor = None if self._actor is actor else self._actor
            first = str(problem).strip().partition("\n")[0]
            future.set_exception(WorkerLost(f"the worker is gone: {first}", fix="the logs of Ray say more"))
        elif problem is not None:
            future.set_exception(problem)
        else:
            answer, error = done.result()
            if error is None:
                future.set_result(answer)
            else:
                future.set_exception(error)


class _Worker:
    """The life of an actor: one call after the other."""

    def run(self, call: bytes, sign: str) -> tuple[object, Exception | None]:
        return answered(call, sign)
