from __future__ import annotations

import multiprocessing
import os
import pickle
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import study_stages

from lowbit import digest
from lowbit.errors import StorageError, StudyError
from lowbit.study import database
from lowbit.study.rows import Member, Progress, Usage
from lowbit.study.store import Store, new_owner

USAGE = Usage(1.0, 0.5, 1 << 20)
A, B, C = (digest.of_value(name) for name in "abc")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "study")


def _add(store: Store, key: str, *inputs: str, **params: object) -> None:
    store.add_cell(key, "stage", f"cell {key[:4]}", inputs, params, "v1")


def test_adding_twice_changes_nothing(store: Store) -> None:
    _add(store, A, x=[1, {"y": None}])
    claimed = store.claim("me")
    _add(store, A, x=[1, {"y": None}])
    assert store.cell(A) == claimed
    assert claimed is not None
    assert (claimed.params, claimed.inputs, claimed.status) == ({"x": [1, {"y": None}]}, (), "claimed")


def test_a_cell_is_ready_when_all_its_inputs_are_done(store: Store) -> None:
    _add(store, C, A, B)
    _add(store, A)
    _add(store, B)
    assert store.claim("me", key=C) is None
    for key in (A, B):
        assert store.claim("me", key=C) is None
        row = store.claim("me")
        assert row is not None
        assert row.key == key
        store.finish(key, "me", {"at": key}, USAGE)
    row = store.claim("me")
    assert row is not None
    assert row.key == C
    assert store.claim("me") is None
    assert store.cell(A).output == {"at": A}
    assert (store.cell(A).seconds, store.cell(A).cpu_seconds, store.cell(A).peak_bytes) == USAGE


def test_an_input_that_nobody_added_is_not_ready(store: Store) -> None:
    _add(store, C, A)
    assert store.claim("me") is None


def test_a_stale_lease_is_taken_over_and_the_late_owner_cannot_finish(store: Store) -> None:
    _add(store, A)
    assert store.claim("far:1:slow", 0.05) is not None
    assert store.claim("near:1:eager", 60.0) is None
    time.sleep(0.06)
    assert store.claim("near:1:eager", 0.05) is not None
    assert not store.heartbeat(A, "far:1:slow")
    assert not store.fail(A, "late", "far:1:slow")
    with pytest.raises(StudyError, match="another worker took this cell over"):
        store.finish(A, "far:1:slow", {"who": "slow"}, USAGE)
    store.finish(A, "near:1:eager", {"who": "eager"}, USAGE)
    assert store.cell(A).output == {"who": "eager"}


def test_a_heartbeat_keeps_the_lease_and_carries_progress(store: Store) -> None:
    _add(store, A)
    assert store.claim("far:1:x", 0.2) is not None
    for i in range(4):
        time.sleep(0.08)
        assert store.heartbeat(A, "far:1:x", Progress(i, 4, "blocks"))
        assert store.claim("other", 0.2) is None
    assert store.heartbeat(A, "far:1:x")
    assert store.cell(A).progress == Progress(3, 4, "blocks")


@pytest.mark.parametrize("reaped", [True, False])
def test_release_stale_knows_the_dead_of_this_host(store: Store, reaped: bool) -> None:
    for key in (A, B, C):
        _add(store, key)
    child = subprocess.Popen([sys.executable, "-c", ""])
    if reaped:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    me = new_owner()
    host = me.rsplit(":", 2)[0]
    assert store.claim(me, key=A)
    assert store.claim(f"{host}:{child.pid}:0", key=B)
    assert store.claim(f"elsewhere:{child.pid}:0", key=C)
    assert store.release_stale() == [B]
    assert [store.cell(key).status for key in (A, B, C)] == ["claimed", "todo", "claimed"]
    time.sleep(0.02)
    assert store.release_stale(0.01) == [A, C]
    child.wait()


def test_two_processes_never_get_the_same_cell(store: Store) -> None:
    keys = [digest.of_value(i) for i in range(120)]
    for i, key in enumerate(keys):
        _add(store, key, *keys[max(0, i - 10) : max(0, i - 9)])
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        # Inputs may be in work elsewhere, so a claimant can leave early; a last round finishes.
        takes = list(pool.map(study_stages.claim_all, [store.root] * 3, ["x:1:a", "x:1:b", "x:1:c"]))
    takes.append(study_stages.claim_all(store.root, "x:1:d"))
    taken = [key for take in takes for key in take]
    assert sorted(taken) == sorted(keys)


def test_failed_cells_are_not_claimed_until_reopened(store: Store) -> None:
    _add(store, A)
    store.claim("me")
    assert store.fail(A, "boom", "me")
    assert store.claim("me", 0.0) is None
    assert (store.cell(A).status, store.cell(A).error) == ("failed", "boom")
    store.reopen(A, "done")  # what was seen is not so any more
    assert store.cell(A).status == "failed"
    store.reopen(A, "failed")
    assert store.claim("me") is not None
    assert store.cell(A).error is None


def test_evidence_appears_whole_or_not_at_all(store: Store) -> None:
    final = store.evidence_folder(A)
    with pytest.raises(ZeroDivisionError), store.evidence(A) as folder:
        (folder / "half.txt").write_text(str(1 / 0))
    assert list(final.parent.iterdir()) == []
    with store.evidence(A) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "x.txt").write_text("one")
        assert not final.exists()
        assert folder.parent == final.parent  # a rename across file systems is a copy
    assert (final / "deep" / "x.txt").read_text() == "one"
    with store.evidence(A) as folder:
        (folder / "x.txt").write_text("two")
    assert [p.name for p in final.iterdir()] == ["x.txt"]
    assert [p.name for p in final.parent.iterdir()] == [A]


def test_leftovers_of_a_killed_writer_are_swept(store: Store) -> None:
    leftover = store.root / "evidence" / f".{A}.dead"
    leftover.mkdir(parents=True)
    (leftover / "half.txt").write_text("half")
    assert not store.evidence_folder(A).exists()
    with store.evidence(A):
        assert not leftover.exists()


def test_studies_list_their_cells_in_order(store: Store) -> None:
    for key in (A, B):
        _add(store, key)
    store.put_study("s", {"v": 1}, [Member(B, "reference"), Member(A, "candidate"), Member(B, "baseline")])
    assert [(role, cell.key) for role, cell in store.cells("s")] == [
        ("reference", B),
        ("candidate", A),
        ("baseline", B),
    ]
    store.put_study("s", {"v": 2}, [Member(A, "reference")])
    assert [(role, cell.key) for role, cell in store.cells("s")] == [("reference", A)]
    assert store.studies() == {"s": {"v": 2}}
    with pytest.raises(StudyError, match="no study 't'"):
        store.cells("t")
    with pytest.raises(StudyError, match="unknown cells"):
        store.put_study("s", {}, [Member(C, "candidate")])
    assert store.studies() == {"s": {"v": 2}}


def test_done_cells_of_another_source_are_counted_not_used(store: Store) -> None:
    for key in (A, B, C):
        _add(store, key)
    store.put_study("s", {}, [Member(A, "reference"), Member(A, "again"), Member(B, "candidate"), Member(C, "late")])
    for key in (A, B):
        store.claim("me", key=key)
        store.finish(key, "me", {}, USAGE)
    assert store.superseded("s", [A, B]) == store.superseded("t", []) == 0
    assert store.superseded("s", [A]) == 1
    assert store.superseded("s", []) == 2  # C is not done: nothing of it is lost


def test_findings_are_replaced_and_selected(store: Store) -> None:
    for key in (A, B):
        _add(store, key)
        store.put_findings(key, {"kl": {"value": 1.0}, "bytes": {"value": 7}})
    store.put_findings(A, {"kl": {"value": 2.0}})
    assert [(row.key, row.value) for row in store.findings(metric="kl")] == sorted(
        [(A, {"value": 2.0}), (B, {"value": 1.0})]
    )
    assert [row.metric for row in store.findings([A])] == ["bytes", "kl"]
    with pytest.raises(StudyError, match="unknown cell"):
        store.put_findings(C, {"kl": {}})
    with pytest.raises(StudyError, match="finding 'kl'"):
        store.put_findings(A, {"kl": {"value": float("nan")}})


@pytest.mark.parametrize("key", ["../../etc", "a" * 63, "A" * 64, A + "\n", ""])
def test_a_key_is_never_a_path(store: Store, key: str) -> None:
    for use in (store.evidence_folder, store.checkpoint_folder, lambda k: _add(store, k)):
        with pytest.raises(StudyError, match="not a cell key"):
            use(key)


def test_an_unknown_schema_version_is_refused_and_left_alone(store: Store) -> None:
    store.close()
    path = store.root / "lowbit.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StudyError, match="schema version 99"):
        Store(store.root)
    assert path.read_bytes() == before


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "lowbit.sqlite") as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(StudyError, match="schema version 0"):
        Store(tmp_path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lowbit.sqlite").write_bytes(os.urandom(4096))
    with pytest.raises(StudyError, match="not a usable store"):
        Store(tmp_path)


def test_no_store_is_made_by_looking(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study store here"):
        Store(tmp_path / "typo", create=False)
    assert not (tmp_path / "typo").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Store(tmp_path / "file")


def _journal(store: Store) -> str:
    db = sqlite3.connect(store.root / "lowbit.sqlite")
    mode: str = db.execute("PRAGMA journal_mode").fetchone()[0]
    db.close()
    return mode


def test_the_journal_suits_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "on_network", lambda path: False)
    with Store(tmp_path / "local") as local:
        assert _journal(local) == "wal"
    monkeypatch.setattr(database, "on_network", lambda path: True)
    with Store(tmp_path / "remote") as remote:
        assert _journal(remote) == "delete"
        _add(remote, A)
        assert remote.claim("me") is not None
    with Store(tmp_path / "local") as moved:
        assert _journal(moved) == "delete"


def test_a_store_crosses_processes_as_its_folder(store: Store) -> None:
    _add(store, A)
    with pickle.loads(pickle.dumps(store)) as copy:
        assert copy.cell(A) == store.cell(A)
