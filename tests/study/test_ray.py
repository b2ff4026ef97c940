"""Cells on a Ray cluster of two nodes; both are on this machine, so that one store serves them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from study_stages import cell, gated_chain

from lowbit.errors import MissingExtra, StudyError
from lowbit.study import engine, ray_executor
from lowbit.study.executors import Executor, Lane, WorkerLost, inline
from lowbit.study.store import Store


def test_cores_are_shared_without_spreading_a_lane_over_machines() -> None:
    assert ray_executor.share([8, 4], 3) == 4
    assert ray_executor.share([8, 4], 2) == 4  # 6 would fit one machine only
    assert ray_executor.share([8, 4], 12) == 1
    with pytest.raises(StudyError, match="13 workers on 12 cores"):
        ray_executor.share([8, 4], 13)


def test_without_ray_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lowbit\[ray\]'"):
        ray_executor.cluster(2, tmp_path)


class Vanishing(Lane):
    """Loses its worker the first ``times`` times, then works in this process."""

    def __init__(self, times: int) -> None:
        self.times, self.here = times, inline().lanes[0]

    def submit(self, function: Any, /, *args: object) -> Any:
        if self.times == 0:
            return self.here.submit(function, *args)
        self.times -= 1

        def vanish() -> None:
            raise WorkerLost("the worker is gone")

        return self.here.submit(vanish)

    def kill(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(("times", "failed"), [(2, 0), (3, 1)])
def test_a_cell_outlives_two_lost_workers(tmp_path: Path, times: int, failed: int) -> None:
    one = cell("number", n=1, log=str(tmp_path / "log.txt"))
    with Store(tmp_path / "study") as store:
        summary = engine.run(store, [one], Executor((Vanishing(times),), in_process=False))
        assert (summary.done, summary.failed) == (1 - failed, failed)
        assert ("is gone" in (store.cell(one.key).error or "")) == bool(failed)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'lowbit[ray]')")
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the stages of these tests
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
    patch.undo()


def test_a_study_on_two_nodes_outlives_a_killed_worker_and_computes_nothing_twice(nodes: Any, tmp_path: Path) -> None:
    folder, gate, log = tmp_path / "study", tmp_path / "gate", tmp_path / "log.txt"
    chain = gated_chain(tmp_path)
    others = [cell("number", n=n, log=str(log), label=f"n{n}") for n in range(2, 6)]
    with Store(folder) as store, ray_executor.cluster(2, folder) as executor:
        killed: list[int] = []

        def kill() -> None:
            """Ends the worker that holds the gated cell, then lets the cell go on."""
            while (row := store.lookup([chain[1].key]).get(chain[1].key)) is None or row.progress is None:
                time.sleep(0.02)
            assert row.owner is not None
            killed.append(int(row.owner.split(":")[1]))
            os.kill(killed[0], signal.SIGKILL)
            gate.touch()

        helper = threading.Thread(target=kill)
        helper.start()
        summary = engine.run(store, [*chain, *others], executor)
        helper.join()
        assert summary[:4] == (7, 0, 0, 0)
        assert killed != [os.getpid()]
        assert store.cell(chain[2].key).output == {"value": 3}
        started = log.read_text().split()
        assert sorted(started) == sorted(["a", "b", "b", "c", "n2", "n3", "n4", "n5"])  # b once more than it ended
        assert engine.run(store, [*chain, *others], executor)[:4] == (0, 7, 0, 0)
        assert log.read_text().split() == started
    assert not list(folder.glob(".ray-*"))


def test_a_machine_that_does_not_see_the_store_says_so(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ray_executor.cluster(1, tmp_path / "study") as executor:
        (lane,) = executor.lanes
        sign = next((tmp_path / "study").glob(".ray-*"))
        sign.unlink()
        error = lane.submit(os.getpid).exception(30)
        assert isinstance(error, StudyError)
        assert "does not see the folder of the store" in str(error)
        sign.touch()
        failed = lane.submit(int, "x").exception(30)
        assert isinstance(failed, ValueError)
        assert lane.submit(os.getpid).result(30) != os.getpid()
