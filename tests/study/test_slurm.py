"""Cells as submitit's jobs: its local executor runs what it would send to Slurm, in processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from study_stages import cell, gated_chain

from lowbit.errors import MissingExtra, StudyError
from lowbit.study import engine, slurm_executor
from lowbit.study.executors import WorkerLost
from lowbit.study.store import Store


def test_without_submitit_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lowbit\[slurm\]'"):
        slurm_executor.cluster(2, tmp_path)


@pytest.fixture
def _submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed (pip install 'lowbit[slurm]')")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the stages of these tests
    monkeypatch.setattr(slurm_executor, "_POLL_S", 0.02)


@pytest.mark.usefixtures("_submitit")
def test_a_study_of_jobs_outlives_a_killed_one_and_computes_nothing_twice(tmp_path: Path) -> None:
    folder, log = tmp_path / "study", tmp_path / "log.txt"
    chain = gated_chain(tmp_path)
    cells = [*chain, cell("number", n=2, log=str(log), label="n2"), cell("broken", label="bad")]
    with Store(folder) as store, slurm_executor.cluster(2, folder, "local") as executor:
        killed: list[int] = []

        def kill() -> None:
            """Ends the job that holds the gated cell, then lets the cell go on."""
            while (row := store.lookup([chain[1].key]).get(chain[1].key)) is None or row.progress is None:
                time.sleep(0.02)
            assert row.owner is not None
            killed.append(int(row.owner.split(":")[1]))
            os.kill(killed[0], signal.SIGKILL)
            (tmp_path / "gate").touch()

        helper = threading.Thread(target=kill)
        helper.start()
        summary = engine.run(store, cells, executor)
        helper.join()
        assert summary[:4] == (4, 0, 1, 0)
        assert killed != [os.getpid()]
        assert store.cell(chain[2].key).output == {"value": 3}
        assert "boom in the stage" in (store.cell(cells[-1].key).error or "")
        assert sorted(log.read_text().split()) == ["a", "b", "b", "c", "n2"]  # b once more than it ended
        assert engine.run(store, cells[:4], executor)[:4] == (0, 4, 0, 0)
    left = [path.name for path in (folder / "slurm").iterdir()]
    assert len({name.partition("_")[0] for name in left}) == 1, left  # the log of the lost job, no sign, nothing else


@pytest.mark.usefixtures("_submitit")
def test_a_node_that_does_not_see_the_store_and_a_cancelled_job_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slurm_executor.cluster(1, tmp_path, "local") as executor:
        (lane,) = executor.lanes
        future = lane.submit(time.sleep, 60)
        lane.kill()
        assert isinstance(future.exception(30), WorkerLost)
        assert isinstance(lane.submit(int, "x").exception(30), ValueError)
    _, error = slurm_executor.answered(b"", str(tmp_path))  # what is no call is an error of the cell
    assert isinstance(error, EOFError)
    monkeypatch.setattr("lowbit.study.executors._SEEN_S", 0.0)
    _, error = slurm_executor.answered(b"", str(tmp_path / "elsewhere" / ".sign"))
    assert isinstance(error, StudyError)
    assert "does not see the folder of the store" in str(error)


@pytest.mark.usefixtures("_submitit")
def test_options_and_machines_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyError, match="no Slurm here"):
        slurm_executor.cluster(1, tmp_path)
    monkeypatch.setenv("LOWBIT_SLURM", "cpus_per_task=2 no_such=1")
    with pytest.raises(StudyError, match="no_such"):
        slurm_executor.cluster(1, tmp_path, "local")
