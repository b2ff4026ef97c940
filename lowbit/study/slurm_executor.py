"""Runs cells as jobs of a Slurm cluster, through submitit: each lane has one job at a time, queued or running.

The store stays the truth: nodes must see its folder under the same path, and the models and texts too. A job outlives
its driver and leaves its result in the store; a job that Slurm ended (time limit, memory, a lost node) is sent again.
"""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from lowbit.errors import MissingExtra, StudyError
from lowbit.study.executors import Executor, Lane, WorkerLost, answered

OPTIONS = "LOWBIT_SLURM"
_DEFAULTS: dict[str, str | int] = {"name": "lowbit", "timeout_min": 1440, "cpus_per_task": 1, "stderr_to_stdout": True}
_POLL_S = 1.0  # looks for the job's result file; submitit asks Slurm itself once a minute


def cluster(n: int, folder: Path, kind: Literal["slurm", "local"] = "slurm") -> Executor:
    """``n`` lanes, each a job of the Slurm that this machine submits to (``local``: processes, for trying it out).

    ``folder`` is that of the store; jobs leave their logs in ``slurm/`` below it. ``LOWBIT_SLURM`` holds options of
    submitit ("cpus_per_task=8 mem_gb=32 slurm_partition=cpu timeout_min=120"). Raises MissingExtra without submitit,
    StudyError without Slurm and for options that submitit does not know.
    """
    try:
        import submitit
    except ImportError as error:
        raise MissingExtra.of("submitit", "slurm") from error
    if kind == "slurm" and shutil.which("srun") is None:
        raise StudyError("no Slurm here", where="srun", fix="a login node of the cluster, or -x local")
    jobs = folder.absolute() / "slurm"
    jobs.mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.AutoExecutor(folder=jobs, cluster=kind)
        executor.update_parameters(**(_DEFAULTS | _options()))
    except (NameError, TypeError, ValueError, AssertionError) as error:  # what submitit raises for its options
        raise StudyError(f"options of submitit: {error}", where=OPTIONS) from error
    return Executor(tuple(_SlurmLane(executor, jobs) for _ in range(n)), in_process=False)


def _options() -> dict[str, str | int]:
    pairs = (word.partition("=") for word in os.environ.get(OPTIONS, "").split())
    return {name: int(value) if value.isdigit() else value for name, _, value in pairs}


class _SlurmLane(Lane):
    def __init__(self, executor: Any, jobs: Path) -> None:
        self._executor, self._jobs, self._job = executor, jobs, None

    def submit(self, function: Callable[..., Any], /, *args: object) -> Future[Any]:
        sign = self._jobs / f".sign-{uuid.uuid4().hex}"  # seen by the node: the store's folder is the same there
        sign.touch()
        try:
            self._job = self._executor.submit(_run, pickle.dumps((function, args)), str(sign))
        except RuntimeError as error:  # submitit's FailedSubmissionError
            sign.unlink()
            raise StudyError(f"Slurm took no job: {error}", where="sbatch", fix=f"options in {OPTIONS}") from error
        future: Future[Any] = Future()
        threading.Thread(target=_follow, args=(self._job, sign, future), name="slurm", daemon=True).start()
        return future

    def kill(self) -> None:
        if self._job is not None:
            self._job.cancel(check=False)
            self._job = None

    close = kill  # nothing runs then


def _run(call: bytes, sign: str) -> tuple[object, Exception | None]:
    """In the job; threads are told before torch is imported, which is when the call is read."""
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    return answered(call, sign)


def _follow(job: Any, sign: Path, future: Future[Any]) -> None:
    try:
        while not job.done():
            time.sleep(_POLL_S)
        answer, error = job.result()
    except Exception as problem:  # submitit's: no result, or one that cannot be read
        future.set_exception(WorkerLost(f"the job {job.job_id} is gone: {problem}", where=str(sign.parent)))
    else:
        for path in sign.parent.glob(f"{job.job_id}_*"):  # logs are kept of jobs that were lost
            path.unlink(missing_ok=True)
        future.set_result(answer) if error is None else future.set_exception(error)
    finally:
        sign.unlink(missing_ok=True)
