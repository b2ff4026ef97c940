from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import study_stages
from study_stages import cell as _cell
from study_stages import stage as _stage

import lowbit.study
from lowbit.errors import StudyError
from lowbit.study.engine import (
    Cell,
    CellDone,
    CellFailed,
    CellProgress,
    CellSkipped,
    CellStarted,
    Event,
    add_cells,
    run,
)
from lowbit.study.executors import inline, processes
from lowbit.study.keys import code_version
from lowbit.study.store import Store
from lowbit.study.worker import Stage

ROOT = Path(lowbit.study.__path__[0]).parents[1]


def _diamond(tmp_path: Path) -> list[Cell]:
    log = str(tmp_path / "log.txt")
    a, b = _cell("number", n=2, log=log, label="a"), _cell("number", n=3, log=log, label="b")
    c = _cell("add", a, b, log=log, label="c")
    return [_cell("add", c, a, log=log, label="d"), c, a, b]  # dependents first: the order given need not be one


def _runs(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "log.txt").read_text().split())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "study")


def test_a_cell_copies_its_parameters_and_its_key_ignores_names_for_people() -> None:
    params = {"n": 1}
    cell = Cell(_stage("number"), "one", (), params)
    params["n"] = 2
    assert cell.params == {"n": 1}
    assert cell.key == Cell(_stage("number"), "uno", (), {"n": 1}, affinity="x").key
    assert cell.key != Cell(_stage("number"), "one", (), {"n": 2}).key
    assert cell.key != Cell(Stage("number", "study_stages:number", ("lowbit.digest",)), "one", (), {"n": 1}).key


def test_inputs_first_and_nothing_twice(store: Store, tmp_path: Path) -> None:
    cells = _diamond(tmp_path)
    events: list[Event] = []
    summary = run(store, cells, inline(), events.append)
    assert summary[:4] == (4, 0, 0, 0)
    assert store.cell(cells[0].key).output == {"value": 7}
    assert [e.cell.label for e in events if isinstance(e, CellDone)] == ["a", "b", "c", "d"]
    events.clear()
    again = run(store, cells, inline(), events.append)
    assert again[:4] == (0, 4, 0, 0)
    assert again.seconds < 0.1
    assert {type(e) for e in events} == {CellSkipped}
    assert _runs(tmp_path) == ["a", "b", "c", "d"]


def test_processes_give_what_inline_gives(store: Store, tmp_path: Path) -> None:
    cells = _diamond(tmp_path)
    with processes(2) as executor:
        assert run(store, cells, executor)[:4] == (4, 0, 0, 0)
        assert run(store, cells, executor)[:4] == (0, 4, 0, 0)
    assert store.cell(cells[0].key).output == {"value": 7}
    assert store.cell(cells[2].key).output["pid"] != os.getpid()  # type: ignore[index]
    assert _runs(tmp_path) == ["a", "b", "c", "d"]


def test_idle_processes_are_never_started(store: Store, tmp_path: Path) -> None:
    cells = _diamond(tmp_path)
    run(store, cells, inline())
    with processes(64) as executor:
        assert run(store, cells, executor).seconds < 0.1


def test_a_failure_stops_only_its_dependents(store: Store, tmp_path: Path) -> None:
    log = str(tmp_path / "log.txt")
    bad = _cell("broken")
    good = _cell("number", n=1, log=log)
    child = _cell("add", good, bad, log=log, label="child")
    grandchild = _cell("add", child, log=log, label="grandchild")
    last = _cell("add", good, log=log, label="last")
    events: list[Event] = []
    summary = run(store, [bad, good, child, grandchild, last], inline(), events.append)
    assert summary[:4] == (2, 0, 1, 2)
    failed = {e.cell.label: e for e in events if isinstance(e, CellFailed)}
    assert {label: e.blocked for label, e in failed.items()} == {"broken": False, "child": True, "grandchild": True}
    assert all("boom in the stage" in e.error for e in failed.values())
    assert "study_stages.py" in failed["broken"].error  # a bug in a stage comes with its traceback
    assert "boom in the stage" in (store.cell(grandchild.key).error or "")
    assert store.cell(last.key).status == "done"
    assert not store.evidence_folder(bad.key).exists()


def test_what_failed_is_tried_again(store: Store, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cell = _cell("flaky", gate=str(gate))
    assert run(store, [cell], inline())[:4] == (0, 0, 1, 0)
    gate.touch()
    assert run(store, [cell], inline())[:4] == (1, 0, 0, 0)
    assert store.cell(cell.key).error is None


def test_lost_evidence_is_made_again(store: Store, tmp_path: Path) -> None:
    cells = _diamond(tmp_path)
    run(store, cells, inline())
    folder = store.evidence_folder(cells[2].key)
    (folder / "value.txt").unlink()
    folder.rmdir()
    assert run(store, cells, inline())[:4] == (1, 3, 0, 0)
    assert (folder / "value.txt").read_text() == "2"


@pytest.mark.parametrize(("name", "message"), [("nan", "not a JSON value"), ("nothing", "returned NoneType")])
def test_an_output_that_cannot_be_stored_fails_the_cell(store: Store, name: str, message: str) -> None:
    cell = _cell(name)
    assert run(store, [cell], inline()).failed == 1
    assert message in (store.cell(cell.key).error or "")
    assert not store.evidence_folder(cell.key).exists()


def test_an_input_from_nowhere_is_refused_before_anything_runs(store: Store, tmp_path: Path) -> None:
    a = _cell("number", n=1, log=str(tmp_path / "log.txt"))
    b = _cell("add", a, log=str(tmp_path / "log.txt"))
    with pytest.raises(StudyError, match="neither in this run nor done"):
        run(store, [b], inline())
    run(store, [a], inline())
    assert run(store, [b], inline()).done == 1


@pytest.mark.parametrize("path", ["study_stages", ":number", "study_stages:", "no_such:number"])
def test_a_function_that_is_not_there(store: Store, path: str) -> None:
    with pytest.raises(StudyError, match=r"no source files|not a function path"):
        Cell(Stage("x", path), "x")


def test_a_function_that_its_module_does_not_have_fails_the_cell(store: Store) -> None:
    cell = Cell(Stage("x", "study_stages:no_such"), "x")
    assert run(store, [cell], inline()).failed == 1
    assert "cannot import 'study_stages:no_such'" in (store.cell(cell.key).error or "")


def test_source_that_changes_after_planning_does_not_run_under_the_old_key(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "changing_stage.py"
    module.write_text("def f(ctx):\n    return {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    cell = Cell(Stage("f", "changing_stage:f"), "f")
    module.write_text("def f(ctx):\n    return {'new': 1}\n")
    add_cells(store, [cell])
    code_version.cache_clear()
    assert run(store, [cell], inline()).failed == 1
    assert "source changed" in (store.cell(cell.key).error or "")
    assert Cell(Stage("f", "changing_stage:f"), "f").key != cell.key


def test_a_dead_worker_costs_its_cell_only(store: Store, tmp_path: Path) -> None:
    dies = _cell("dies")
    others = [_cell("number", n=i, log=str(tmp_path / "log.txt"), label=str(i)) for i in range(3)]
    child = _cell("add", dies, log="", label="child")
    with processes(1) as executor:
        summary = run(store, [others[0], dies, child, *others[1:]], executor)
    assert summary[:4] == (3, 0, 1, 1)
    assert "exit code 3" in (store.cell(dies.key).error or "")


def test_progress_crosses_processes(store: Store, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cell = _cell("gated", gate=str(gate), log=str(tmp_path / "log.txt"))
    seen: list[tuple[int, int, str]] = []

    def on_event(event: Event) -> None:
        if isinstance(event, CellProgress):
            seen.append(event.progress)
            if event.progress.done == 2:
                gate.touch()

    with processes(1) as executor:
        assert run(store, [cell], executor, on_event).done == 1
    assert seen[-1] == (2, 3, "steps")


def test_progress_is_throttled_but_the_end_is_told(store: Store) -> None:
    events: list[Event] = []
    run(store, [_cell("fast_steps")], inline(), events.append)
    told = [e.progress.done for e in events if isinstance(e, CellProgress)]
    assert told[-1] == 1000
    assert len(told) < 20


def test_a_silent_stage_keeps_its_lease(store: Store) -> None:
    cell = _cell("silent", seconds=0.5)
    assert run(store, [cell], inline(), lease_s=0.1).done == 1


def test_who_lost_the_lease_publishes_nothing(store: Store) -> None:
    cell = _cell("loses_lease", root=str(store.root))
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, CellStarted) and len(events) > 1:
            raise KeyboardInterrupt  # the other owner, on a far host, beats on; here it is only waited for

    with pytest.raises(KeyboardInterrupt):
        run(store, [cell], inline(), on_event, lease_s=0.3)
    assert not store.evidence_folder(cell.key).exists()
    assert not any(isinstance(e, CellDone | CellFailed) for e in events)


def test_an_interrupt_gives_the_cell_back(store: Store) -> None:
    cell = _cell("interrupted")
    with pytest.raises(KeyboardInterrupt):
        run(store, [cell], inline())
    assert store.cell(cell.key).status == "todo"
    assert list((store.root / "evidence").iterdir()) == []


def test_an_interrupt_ends_the_workers_and_the_run_goes_on_later(store: Store, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cells = [_cell("gated", gate=str(gate), log=str(tmp_path / "log.txt"), n=i) for i in range(2)]

    def on_event(event: Event) -> None:
        if isinstance(event, CellProgress) and not gate.exists():
            raise KeyboardInterrupt

    with processes(2) as executor:
        with pytest.raises(KeyboardInterrupt):
            run(store, cells, executor, on_event)
        assert {store.cell(cell.key).status for cell in cells} == {"todo"}
        gate.touch()
        assert run(store, cells, executor, on_event)[:4] == (2, 0, 0, 0)


DRIVER = """
import sys
from pathlib import Path
from study_stages import gated_chain
from lowbit.study.engine import run
from lowbit.study.executors import inline, processes
from lowbit.study.store import Store
if __name__ == "__main__":
    with (processes(1) if sys.argv[2] == "processes" else inline()) as executor:
        run(Store(Path(sys.argv[1]) / "study"), gated_chain(Path(sys.argv[1])), executor)
"""


@pytest.mark.parametrize("executor", ["inline", "processes"])
def test_kill_it_and_run_it_again(store: Store, tmp_path: Path, executor: str) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    a, b, _ = cells = study_stages.gated_chain(tmp_path)
    path = os.pathsep.join([str(ROOT), str(Path(study_stages.__file__).parent)])
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path), executor]
    driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 20
    while not (store.checkpoint_folder(b.key) / "1.txt").exists():
        assert time.monotonic() < deadline
        assert driver.poll() is None
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert (store.cell(a.key).status, store.cell(b.key).status) == ("done", "claimed")
    worker = int((store.cell(b.key).owner or "").split(":")[-2])
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline  # a worker process ends with its driver
        time.sleep(0.01)
    assert [p.name for p in (store.root / "evidence").iterdir() if p.name.startswith(f".{b.key}")]  # half written
    assert not store.evidence_folder(b.key).exists()
    piece = store.checkpoint_folder(b.key) / "1.txt"
    written = piece.stat().st_mtime_ns
    (tmp_path / "gate").touch()
    assert run(store, cells, inline())[:4] == (2, 1, 0, 0)
    assert [store.cell(cell.key).output["value"] for cell in cells] == [1, 3, 3]  # type: ignore[index]
    assert piece.stat().st_mtime_ns == written  # the checkpoint went on where it stopped
    assert Counter(_runs(tmp_path))["a"] == 1
    assert sorted(p.name for p in (store.root / "evidence").iterdir()) == sorted(cell.key for cell in cells)


def test_two_drivers_share_the_work(store: Store, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    cells = study_stages.gated_chain(tmp_path)
    path = os.pathsep.join([str(ROOT), str(Path(study_stages.__file__).parent)])
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path), "inline"]
    driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 20
    while not (store.checkpoint_folder(cells[1].key) / "1.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)

    def on_event(event: Event) -> None:
        if isinstance(event, CellStarted):
            (tmp_path / "gate").touch()

    summary = run(store, cells, inline(), on_event)
    assert driver.wait(20) == 0
    assert summary.failed == summary.blocked == 0
    assert summary.done + summary.skipped == 3
    assert _runs(tmp_path) == ["a", "b", "c"]


def test_cells_of_one_affinity_stay_together(store: Store, tmp_path: Path) -> None:
    log = str(tmp_path / "log.txt")
    cells = [_cell("number", n=i, log=log, affinity="xy"[i % 2], label=str(i)) for i in range(6)]
    events: list[Event] = []
    run(store, cells, inline(), events.append)
    assert [e.cell.label for e in events if isinstance(e, CellStarted)] == ["0", "2", "4", "1", "3", "5"]


def test_cost_is_measured(store: Store) -> None:
    small, large = _cell("allocates", nbytes=1 << 20), _cell("allocates", nbytes=200 << 20)
    run(store, [large, small], inline())
    rows = store.lookup([small.key, large.key])
    peak = {key: row.peak_bytes or 0 for key, row in rows.items()}
    assert peak[large.key] > 200 << 20
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert peak[large.key] - peak[small.key] > 150 << 20  # the later, smaller cell has its own peak
    assert all((row.seconds or 0) > 0 and (row.cpu_seconds or 0) > 0 for row in rows.values())
