"""A study of forty cells that is killed ten times at random moments ends as one that nobody disturbed."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import study_stages

import lowbit.study

KILLS = 10
TIMES = ("owner", "heartbeat", "progress", "seconds", "cpu_seconds", "peak_bytes", "created", "finished")

# Forks its drivers, which costs no imports. A kill comes after three more cells have begun, and up to 10 ms later.
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
from study_stages import cell
from lowbit.study.engine import run
from lowbit.study.executors import inline
from lowbit.study.store import Store

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
log, gate = str(folder / "log.txt"), str(folder / "gate")
leaves = [cell("gated", label=f"g{n}", n=n, log=log, gate=gate) for n in range(20)]
sums = [cell("add", *leaves[n:n + 2], label=f"s{n}", n=n, log=log) for n in range(15)]
cells = [*leaves, *sums, *(cell("add", *sums[n:n + 10], label=f"t{n}", n=n, log=log) for n in range(5))]

def begun():
    return Path(log).read_text().count("\\n") if Path(log).exists() else 0

def driver():
    pid = os.fork()
    if pid == 0:
        with Store(folder / "study") as store:
            os._exit(0 if run(store, cells, inline()).failed == 0 else 1)
    return pid

moments = random.Random(0)
for _ in range(kills):
    before, pid = begun(), driver()
    while begun() < before + 3 and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.01))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
assert os.waitstatus_to_exitcode(os.waitpid(driver(), 0)[1]) == 0
"""


def _ended(folder: Path, kills: int) -> tuple[dict[str, object], Counter[str]]:
    """What the store holds, without times, and how often each cell was begun."""
    (folder / "driver.py").write_text(DRIVER)
    root = Path(lowbit.study.__path__[0]).parents[1]
    path = os.pathsep.join([str(root), str(Path(study_stages.__file__).parent)])
    command = [sys.executable, str(folder / "driver.py"), str(folder), str(kills)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=60)
    held: dict[str, object] = {}
    with sqlite3.connect(folder / "study" / "lowbit.sqlite") as db:
        db.row_factory = sqlite3.Row
        for row in db.execute("SELECT * FROM cells"):
            held[row["key"]] = {name: row[name] for name in row.keys() if name not in TIMES}  # noqa: SIM118
    for part in ("evidence", "checkpoints"):
        for file in (folder / "study" / part).rglob("*"):
            held[str(file.relative_to(folder))] = file.read_bytes() if file.is_file() else "folder"
    begun = Counter((folder / "log.txt").read_text().split())
    (folder / "study").rename(folder / f"study-{kills}")
    (folder / "log.txt").unlink()
    return held, begun


def test_killed_ten_times_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    whole, once = _ended(tmp_path, 0)
    killed, often = _ended(tmp_path, KILLS)
    assert killed == whole
    rows: list[Any] = [row for row in whole.values() if isinstance(row, dict)]
    assert [row["status"] for row in rows] == ["done"] * 40
    assert set(once.values()) == {1}
    assert often.keys() == once.keys()
    assert 0 < often.total() - 40 <= KILLS  # a kill costs the one cell that was in work; what is done stays done
