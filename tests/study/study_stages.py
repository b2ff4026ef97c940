"""Stages for the tests; worker processes import them by name."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.study.engine import Cell
from lowbit.study.store import Store
from lowbit.study.worker import Stage, StageContext


def stage(name: str) -> Stage:
    return Stage(name, f"study_stages:{name}")


def cell(name: str, *inputs: Cell, affinity: str = "", label: str = "", **params: object) -> Cell:
    return Cell(stage(name), label or name, tuple(c.key for c in inputs), params, affinity)


def gated_chain(folder: Path) -> list[Cell]:
    """Three cells, each the next one's input; the second waits for ``folder/gate``."""
    log, gate = str(folder / "log.txt"), str(folder / "gate")
    a = cell("number", n=1, log=log, label="a")
    b = cell("gated", a, log=log, gate=gate, label="b")
    return [a, b, cell("add", b, log=log, label="c")]


def number(ctx: StageContext) -> Mapping[str, Any]:
    _log(ctx)
    (ctx.folder / "value.txt").write_text(str(ctx.params["n"]))
    return {"value": ctx.params["n"], "pid": os.getpid()}


def add(ctx: StageContext) -> Mapping[str, Any]:
    _log(ctx)
    read = [int((ctx.input_folder(i) / "value.txt").read_text()) for i in range(len(ctx.inputs))]
    assert read == [ctx.input(i)["value"] for i in range(len(ctx.inputs))]
    (ctx.folder / "value.txt").write_text(str(sum(read)))
    return {"value": sum(read)}


def gated(ctx: StageContext) -> Mapping[str, Any]:
    """Three steps that each leave a piece in the checkpoint; waits for a file before the last one."""
    _log(ctx)
    gate = Path(ctx.params["gate"])
    for step in range(3):
        piece = ctx.checkpoint / f"{step}.txt"
        (ctx.folder / "value.txt").write_text("half")
        ctx.report(step, 3, "steps")
        while step == 2 and not gate.exists():
            ctx.report(step, 3, "steps")
            time.sleep(0.01)
        if not piece.exists():
            half = ctx.folder / "half.txt"  # a kill between making and filling a file leaves an empty one
            half.write_text(str(step))
            half.rename(piece)
    (ctx.folder / "value.txt").write_text("3")
    return {"value": sum(int(p.read_text()) for p in sorted(ctx.checkpoint.iterdir()))}


def broken(ctx: StageContext) -> Mapping[str, Any]:
    raise ValueError("boom in the stage")


def flaky(ctx: StageContext) -> Mapping[str, Any]:
    if not Path(ctx.params["gate"]).exists():
        raise ValueError("the gate is shut")
    return {"value": 1}


def dies(ctx: StageContext) -> Mapping[str, Any]:
    os._exit(3)


def interrupted(ctx: StageContext) -> Mapping[str, Any]:
    raise KeyboardInterrupt


def nan(ctx: StageContext) -> Mapping[str, Any]:
    return {"value": float("nan")}


def nothing(ctx: StageContext) -> Mapping[str, Any]:
    return None  # type: ignore[return-value]


def fast_steps(ctx: StageContext) -> Mapping[str, Any]:
    for i in range(1000):
        ctx.report(i + 1, 1000, "steps")
    return {}


def silent(ctx: StageContext) -> Mapping[str, Any]:
    """Says nothing for several leases."""
    time.sleep(ctx.params["seconds"])
    return {"value": 1}


def loses_lease(ctx: StageContext) -> Mapping[str, Any]:
    """While this one computes, another owner takes the cell over and finishes it."""
    (ctx.folder / "value.txt").write_text("late")
    with Store(Path(ctx.params["root"])) as store:
        time.sleep(0.01)
        assert store.claim("far:1:other", 0.0, ctx.key) is not None
    return {"value": "late"}


def allocates(ctx: StageContext) -> Mapping[str, Any]:
    block = bytearray(ctx.params["nbytes"])
    block[::4096] = b"x" * len(block[::4096])
    return {"n": len(block)}


def claim_all(root: Path, owner: str) -> list[str]:
    """Claims and finishes cells until none is left."""
    from lowbit.study.rows import Usage

    taken = []
    with Store(root) as store:
        while row := store.claim(owner):
            taken.append(row.key)
            store.finish(row.key, owner, {}, Usage(0.0, 0.0, 0))
    return taken


def _log(ctx: StageContext) -> None:
    with open(ctx.params["log"], "a") as log:
        log.write(ctx.label + "\n")
