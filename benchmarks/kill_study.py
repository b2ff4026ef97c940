"""Kill a study ten times at random moments: does it end with the store of one that nobody disturbed?

A study of 40 cells (12 recipes: made, scored, asked a task; reference and noise floor) runs twice by ``lowbit study
run``, each into a store of its own. The second one's whole process group is sent SIGKILL again and again, at moments
that a seeded generator draws, then runs to its end. Prints one JSON object; exits with 1 when the stores differ.

    python benchmarks/kill_study.py MODEL --work FOLDER --seed 0

Compared: keys, status and outputs of all cells, findings, every file of evidence and checkpoints byte for byte, and
that no file is left over. Measured times (``TIMES``) are no results and are left out of outputs and manifests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RECIPES = (
    "rtn:int8-row-sym", "rtn:int4-row-sym", "rtn:int4-g64", "rtn:int4-g32", "rtn:int3-g64", "rtn:int2-g32",
    "rtn:nf4", "rtn:nf4-dq", "rtn:int3-g64,clip=20", "gptq:int4-g64", "gptq:int3-g64", "gptq:int2-g32",
)  # fmt: skip
TIMES = ("seconds", "cpu_seconds")
HISTORY = ("resumed", "already_done")  # of a checkpoint: whether its seconds are those of the last of several runs
MANIFEST = "lowbit.json"
POLL_S = 0.02
STARTING = 0.3  # share of kills at a moment of the start-up


class Killed(NamedTuple):
    """One kill: after how many seconds, and how many cells were then done and in work."""

    seconds: float
    done: int
    lost: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the study and its two stores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    study = written(args.work, args.model.resolve())
    whole, killed = args.work / "whole", args.work / "killed"
    for store in (whole, killed):
        shutil.rmtree(store, ignore_errors=True)
    began = time.monotonic()
    run = started_run(study, whole, args.jobs)
    until_done(run, whole, 0)
    start = time.monotonic() - began
    if run.wait() != 0:
        sys.exit(f"the undisturbed study failed: see {whole}.log")
    seconds = time.monotonic() - began
    moments = random.Random(args.seed)
    kills = []
    seen: dict[str, float] = {}
    again: set[str] = set()
    for _ in range(args.kills):
        # A run's start-up is long beside the cells of a small model: most kills are drawn from the time after it.
        starting = moments.random() < STARTING
        after = moments.uniform(0, start if starting else 2 * (seconds - start) / args.kills)
        kills.append(kill(study, killed, args.jobs, starting, after))
        now = finished(killed)
        again |= {key for key, at in seen.items() if now.get(key) != at}
        seen = now
    last = started_run(study, killed, args.jobs).wait()
    now = finished(killed)
    again |= {key for key, at in seen.items() if now.get(key) != at}
    differences = compared(whole, killed)
    if last != 0:
        differences.append(f"the last run exited with {last}")
    print(json.dumps({
        "cells": len(now), "seconds": round(seconds, 1), "kills": [k._asdict() for k in kills],
        "killed_in_work": sum(k.lost for k in kills), "done_cells_computed_again": len(again),
        "resumed_checkpoints": resumed(killed), "things_compared": len(described(whole)), "differences": differences,
    }, indent=1))  # fmt: skip
    if differences or again:
        sys.exit(1)


def written(folder: Path, model: Path) -> Path:
    """The study file, its text and its task."""
    numbers = random.Random(7)
    lines = [
        f"In the year {1400 + i} the river rose by {numbers.randrange(90)} feet and fell again.\n" for i in range(900)
    ]
    (folder / "text.txt").write_text("".join(lines))
    words = ["river", "hill", "stone", "bread", "cloud", "spoon", "lamp", "tower"]
    with (folder / "questions.jsonl").open("w") as file:
        for i in range(48):
            record = {"id": str(i), "context": f"They saw a {words[i % 8]} and a", "choices": numbers.sample(words, 3)}
            file.write(json.dumps(record | {"answer": i % 3}) + "\n")
    study = folder / "study.toml"
    study.write_text(
        f'name = "killed"\nmodels = [{json.dumps(str(model))}]\nrecipes = {json.dumps(RECIPES)}\n'
        '[calibration]\ntext = "text.txt"\nsamples = 16\nlength = 128\n'
        '[evaluation]\ntext = "text.txt"\nprotocol = "windows-128"\nwindows = 16\ndtype = "float32"\n'
        '[tasks]\nrun = ["./questions.jsonl"]\n'
    )
    return study


def started_run(study: Path, store: Path, jobs: int) -> subprocess.Popen[bytes]:
    """``lowbit study run`` at the head of its own process group."""
    command = [sys.executable, "-c", "from lowbit.cli import main; main()", "study", "run", study.name]
    with store.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, "-j", str(jobs), "--store", str(store.resolve()), "-o", "plain"],
            cwd=study.parent, start_new_session=True, stdout=log, stderr=log,
        )  # fmt: skip


def until_done(run: subprocess.Popen[bytes], store: Path, before: int) -> None:
    """Wait for the first cell that this run finishes, or for its end."""
    while run.poll() is None and counts(store)[0] == before:
        time.sleep(POLL_S)


def kill(study: Path, store: Path, jobs: int, starting: bool, seconds: float) -> Killed:
    """Run the study and kill it so long after its start, or after its first cell; exits when it ended before that."""
    began, before = time.monotonic(), counts(store)[0]
    run = started_run(study, store, jobs)
    if not starting:
        until_done(run, store, before)
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        return Killed(round(time.monotonic() - began, 2), *counts(store))
    sys.exit(f"it ended before it could be killed: another --seed, or see {store}.log")


def counts(store: Path) -> tuple[int, int]:
    """Cells that are done, and in work."""
    states = [row["status"] for row in rows(store, "SELECT status FROM cells")]
    return states.count("done"), states.count("claimed")


def finished(store: Path) -> dict[str, float]:
    """When each done cell ended: a later time is a cell that was computed again."""
    return {row["key"]: row["finished"] for row in rows(store, "SELECT * FROM cells WHERE status = 'done'")}


def compared(whole: Path, killed: Path) -> list[str]:
    """Every difference, in words."""
    one, two = (described(store) for store in (whole, killed))
    found = [f"{name}: {one.get(name)} | {two.get(name)}" for name in sorted(one.keys() | two.keys())
             if one.get(name) != two.get(name)]  # fmt: skip
    kinds = ("cell", "finding", "evidence", "checkpoints")
    return found + [f"no {kind} to compare" for kind in kinds if not any(name.startswith(kind) for name in one)]


def described(store: Path) -> dict[str, object]:
    """All that a store says, without times: cells, findings, studies, files and empty folders."""
    said: dict[str, object] = {}
    for row in rows(store, "SELECT * FROM cells"):
        kept = {name: row[name] for name in ("key", "inputs", "params", "code_version", "status", "error")}
        said[f"cell {row['label']}"] = kept | {"output": timeless(row["output"])}
    said |= {f"finding {row['key']} {row['metric']}": row["json"] for row in rows(store, "SELECT * FROM findings")}
    said |= {f"study {row['name']}": row["spec"] for row in rows(store, "SELECT * FROM studies")}
    said |= {f"member {row['position']}": (row["study"], row["key"], row["role"])
             for row in rows(store, "SELECT * FROM study_cells")}  # fmt: skip
    for part in ("evidence", "checkpoints"):
        for path in (store / part).rglob("*"):
            if path.is_file() or not any(path.iterdir()):
                said[str(path.relative_to(store))] = content(path)
    return said


def content(path: Path) -> object:
    """Digest of a file's bytes; of a manifest all but its measured times. Nothing for a folder."""
    if path.is_dir():
        return "a folder"
    if path.name == MANIFEST:
        return timeless(path.read_text())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def timeless(text: str | None) -> object:
    """JSON without measured times."""
    return None if text is None else _without(json.loads(text))


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(v) for name, v in value.items() if name not in (*TIMES, *HISTORY)}
    return [_without(v) for v in value] if isinstance(value, list) else value


def resumed(store: Path) -> int:
    """Checkpoints that were begun by one process and finished by another."""
    made = (json.loads(path.read_text()) for path in (store / "checkpoints").glob(f"*/{MANIFEST}"))
    return sum(bool(manifest["resumed"]) for manifest in made)


def rows(store: Path, sql: str) -> Sequence[sqlite3.Row]:
    """What a store answers; nothing where it does not exist yet."""
    path = store / "lowbit.sqlite"
    if not path.exists():
        return []
    with sqlite3.connect(path, 30) as db:
        db.row_factory = sqlite3.Row
        try:
            return db.execute(sql).fetchall()
        except sqlite3.OperationalError:  # its tables are being made
            return []


if __name__ == "__main__":
    main()
