"""A study whose answers are made up: items written into a store, as a run would have left them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from lowbit.evaluation.metrics.items import Items, ItemsProvenance, write_items
from lowbit.evaluation.tasks.registry import TASKS, Chosen
from lowbit.report.model import Candidate, Environment, Report, ScoringProtocol
from lowbit.study.engine import Cell
from lowbit.study.grid import Entry, Grid
from lowbit.study.rows import Usage
from lowbit.study.store import Store
from lowbit.study.tasks import TaskGrid, Version
from lowbit.study.view import Model, View
from lowbit.study.worker import Stage

NAMED = {4: "arc_easy", 2: "copa"}
BYTES = {"original": 1000, "other": 250}
Logits = Mapping[int, Float[np.ndarray, "n k"]]
"""By number of choices."""


def original(n: int, seed: int = 0) -> tuple[dict[int, Any], dict[int, Any]]:
    """Log-likelihoods of two tasks, and right answers drawn from their softmax: the original is calibrated."""
    rng = np.random.default_rng(seed)
    logits = {k: rng.normal(0, 2.5, (n, k)) for k in NAMED}
    gold = {k: (special.softmax(z, 1).cumsum(1) > rng.random((n, 1))).argmax(1) for k, z in logits.items()}
    return logits, gold


def noisy(logits: Logits, scale: float, seed: int = 1) -> dict[int, Any]:
    rng = np.random.default_rng(seed)
    return {k: z + scale * rng.normal(size=z.shape) for k, z in logits.items()}


def study(folder: Path, logits: Logits, gold: Mapping[int, Any], candidates: Mapping[str, Logits]) -> View:
    """A view of one model; of its candidates each has 4.3 bits a weight, or 3 where its name says so."""
    store = Store(folder)
    chosen = []
    for k, name in NAMED.items():
        records = (
            {"id": f"{name}/{i}", "context": f"Question {i} of {name}", "choices": [f"answer {c}" for c in range(k)],
             "answer": int(g)}
            for i, g in enumerate(gold[k])
        )  # fmt: skip
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        chosen.append(Chosen(TASKS[name], file, None))
    bare = Chosen(TASKS["truthfulqa_mc2"], None, None)

    def cells(label: str, z: Logits) -> dict[str, Cell]:
        made = {NAMED[k]: _done(store, f"{label} {NAMED[k]}", _items(NAMED[k], z[k], gold[k])) for k in z}
        none = _items("mc2", z[2], np.full(len(gold[2]), -1))
        return made | {bare.task.name: _done(store, f"{label} mc2", none)}

    reference = cells("original", logits)
    versions = [Version(label, {}, cells(label, z)) for label, z in candidates.items()]
    asked = TaskGrid("m", {}, (*chosen, bare), reference, cells("again", logits), tuple(versions))
    nothing = _cell("not done")
    entries = tuple(Entry(label, label, _cell(f"make {label}"), nothing) for label in candidates)
    made = [_candidate(label, BYTES["other"], 3.0 if "3" in label else 4.3) for label in candidates]
    own = _candidate("m (original)", BYTES["original"], 16.0, is_reference=True)
    report = Report(
        "m", "2026-01-01T00:00:00+00:00", "", "made up", own, tuple(made), None,
        ScoringProtocol("t", "", 2, 8, 16, 2, "float32"), Environment((), ""), "holm",
    )  # fmt: skip
    return View("made up", [Model(store, Grid("m", _cell("original"), nothing, entries, asked), report)])


def _candidate(label: str, nbytes: int, bits: float, is_reference: bool = False) -> Candidate:
    return Candidate(label, "m", label, "", nbytes, bits, 0.0, 0, is_reference=is_reference)


def _cell(label: str) -> Cell:
    return Cell(Stage("made", "answered_study:nothing"), label, (), {"label": label, "model": "/models/m"})


def _done(store: Store, label: str, items: Items) -> Cell:
    cell = _cell(label)
    store.add_cell(cell.key, "made", label, [], cell.params, "")
    assert store.claim("me", key=cell.key) is not None
    folder = store.evidence_folder(cell.key)
    folder.mkdir(parents=True)
    write_items(folder, items, ItemsProvenance(label, "original", "t", "", "", "float32"))
    store.finish(cell.key, "me", {"items": len(items)}, Usage(0.0, 0.0, 0))
    return cell


def _items(name: str, logits: Float[np.ndarray, "n k"], gold: Any) -> Items:
    n, k = logits.shape
    logprob = special.log_softmax(logits, 1)
    pred = logits.argmax(1)
    empty, zero = [""] * n, np.zeros(n)
    return Items.of({
        "id": [f"{name}/{i}" for i in range(n)], "group": empty, "cluster": np.arange(n) // 2, "doc_hash": empty,
        "prompt_hash": empty, "starts": np.arange(n + 1) * k, "logprob": logprob.ravel(), "tokens": np.ones(n * k),
        "chars": np.ones(n * k), "true": (np.arange(k) == np.asarray(gold)[:, None]).ravel(), "role": np.zeros(n * k),
        "pred": pred, "gold": gold, "score": pred == gold, "margin": zero, "length": zero, "stop_reason": empty,
        "parse_ok": np.ones(n), "answer": empty, "text": empty, "written_starts": np.zeros(n + 1), "written": [],
    })  # fmt: skip
