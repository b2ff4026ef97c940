"""Advice by tasks: what versions lose of the original's score, from answers that a store holds. No model is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lowbit.errors import EvidenceError, StudyError
from lowbit.evaluation.metrics import influence
from lowbit.evaluation.metrics.items import Items, ItemsProvenance, read_items
from lowbit.evaluation.statistics import Interval
from lowbit.evaluation.tasks import registry
from lowbit.evaluation.tasks.base import Task
from lowbit.study import stages
from lowbit.study.advise import ORIGINAL, UNHARMED, Option
from lowbit.study.rows import CellRow
from lowbit.study.store import Store

Answers = tuple[Items, ItemsProvenance]


def table(store: Store, study: str, model_digest: str, names: Sequence[str], *, overhead: int = 0) -> list[Option]:
    """Every version of one model that has answered the named tasks, by the share of the original's score it loses.

    The score is the mean over the items of all tasks; a version that has not answered all of
    them, or whose files are gone, is left out.
    ``names`` are tasks or families, ``overhead`` what running takes beside the weights, in bytes. Raises StudyError
    where the study has not asked this model, EvidenceError for a task whose score has no better and worse.
    """
    cells = [c for _, c in store.cells(study) if c.stage == "task" and c.status == "done" and "only" not in c.params]
    mine = {
        c.params["task"]: c for c in cells if not c.inputs and c.params.get("digest") == model_digest
        and (c.params["task"] in names or _family(c) in names)
    }  # fmt: skip
    if missing := [name for name in names if not any(name in (t, _family(c)) for t, c in mine.items())]:
        raise StudyError(
            f"this model was not asked {', '.join(missing)}", where=f"study {study!r}",
            fix="lowbit compare MODEL OUT... --tasks, or --search, which makes and asks",
        )  # fmt: skip
    base = {name: _answers(store, cell) for name, cell in mine.items()}
    for cell in mine.values():
        require_scored(registry.known(cell.params["task"], cell.params["schema"]))
    versions: dict[str, dict[str, CellRow]] = {}
    for cell in cells:
        if (
            cell.inputs
            and cell.inputs[0] in {c.key for c in mine.values()}
            and cell.params.get("digest") != model_digest
        ):
            versions.setdefault(cell.label.rpartition(": ")[2], {})[cell.params["task"]] = cell
    first = next(iter(mine.values()))
    found = [_option(store, ORIGINAL, first, UNHARMED, overhead)]
    for label, answered in versions.items():
        if answered.keys() == mine.keys() and _place(store, next(iter(answered.values()))).exists():
            pairs = [(base[name], _answers(store, cell)) for name, cell in answered.items()]
            found.append(_option(store, label, next(iter(answered.values())), lost(pairs), overhead))
    return found


def lost(pairs: Sequence[tuple[Answers, Answers]]) -> Interval:
    """The share of the reference's mean score that a candidate loses, over the items of all tasks.

    A ratio of means with the delta method's error, clustered. Raises EvidenceError where items do not pair and where
    the reference scores nothing.
    """
    for (base, asked), (after, again) in pairs:
        again.require_comparable(asked)
        base.require_paired(after)
    reference, candidate = (_scores([pair[side][0] for pair in pairs]) for side in (0, 1))
    mean = scored(reference)
    share = 1 - candidate.mean() / mean
    each = (reference - candidate - share * reference) / (mean * len(reference))
    return influence.interval(float(share), each, clusters([p[0][0] for p in pairs]), 0.95, "share of a score")


def scored(score: Float[np.ndarray, " n"]) -> float:
    """The mean score of the original, of which a share can be lost. Raises EvidenceError where it is 0."""
    mean = float(score.mean())
    if mean <= 0:
        raise EvidenceError("the original gets nothing right", where="tasks", fix="tasks that it can do")
    return mean


def clusters(tasks: Sequence[Items]) -> Int[np.ndarray, " n"]:
    """Cluster of every item of several tasks, no two tasks sharing one."""
    offset = np.cumsum([0, *(int(items.cluster.max()) + 1 for items in tasks)])
    found: Int[np.ndarray, " n"] = np.concatenate([t.cluster + at for t, at in zip(tasks, offset[:-1], strict=True)])
    return found


def _scores(tasks: Sequence[Items]) -> Float[np.ndarray, " n"]:
    found: Float[np.ndarray, " n"] = np.concatenate([items.score for items in tasks]).astype(np.float64)
    return found


def require_scored(task: Task) -> None:
    """Raises EvidenceError for a task of which more is not better."""
    if not any(m.better == "higher" for m in task.measures):
        raise EvidenceError(
            "has no score of which more is better", where=task.name, why="advice weighs what is lost",
            fix="tasks with right and wrong answers",
        )  # fmt: skip


def _family(cell: CellRow) -> str:
    return registry.known(cell.params["task"], cell.params["schema"]).family


def _answers(store: Store, cell: CellRow) -> Answers:
    return read_items(store.evidence_folder(cell.key))


def _option(store: Store, label: str, cell: CellRow, loss: Interval, overhead: int) -> Option:
    return of_checkpoint(label, _place(store, cell), loss, overhead)


def _place(store: Store, cell: CellRow) -> Path:
    return Path(cell.params["path"]) if "path" in cell.params else store.root / "checkpoints" / cell.inputs[1]


def of_checkpoint(label: str, where: Path, loss: Interval, overhead: int) -> Option:
    """A version that lies in ``where``. Raises StudyError where it is gone."""
    if not where.exists():
        raise StudyError("is not there any more", where=str(where), why=f"{label} was asked once", fix="ask it again")
    said: Mapping[str, Any] = stages.describe(where)
    nbytes = int(said["bytes_total"])
    return Option(label, str(said["recipe"]), nbytes, nbytes + overhead, loss, None, str(where), "score")
