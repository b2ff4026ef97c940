"""A search over recipes: what fits is made, screened on few items of some tasks, and confirmed on others.

    sizes       of every recipe, from its formats; what does not fit is not made
    original    answers all items, which gives their margins
    screening   each version answers few items, drawn where the original was unsure; what is shown to lose too much
                is out
    confirming  the others answer many more items that had no part in that, and only these count

Every answer is a cell of the store, so a search that was stopped goes on, and one with other limits starts from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lowbit.errors import CoverageError, EvidenceError, FormatError, StudyError
from lowbit.evaluation import screening
from lowbit.evaluation.metrics.items import Items, read_items
from lowbit.evaluation.screening import Raced
from lowbit.evaluation.statistics import Interval
from lowbit.models.source import Source
from lowbit.pipeline.coverage import audit
from lowbit.pipeline.recipe import Recipe
from lowbit.study import advise
from lowbit.study.advise import ORIGINAL, UNHARMED, UNMEASURED, Advice, Constraint, Option, Prefer, Ruled
from lowbit.study.advise_tasks import of_checkpoint, require_scored, scored
from lowbit.study.engine import Cell
from lowbit.study.grid import Entry, Grid
from lowbit.study.store import Store
from lowbit.study.tasks import TaskGrid

RECIPES = (
    "rtn:int8-row-sym", "gptq:int6-g64", "gptq:int5-g64", "gptq:int4-g64", "gptq:int4-g128", "rtn:nf4", "gptq:int3-g64",
    "gptq:int2-g64",
)  # fmt: skip
"""What is tried unless others are named: a ladder of widths, by methods that take minutes."""
Run = Callable[[Sequence[Cell]], None]
"""Computes cells into the store, those that are there not again."""


class Found(NamedTuple):
    """The advice, and what it rests on."""

    advice: Advice
    raced: tuple[Raced, ...]
    items: int
    """That the original answered."""


class Pool(NamedTuple):
    """The original's answers to every item of all tasks."""

    tasks: tuple[tuple[str, Items], ...]

    @property
    def score(self) -> Float[np.ndarray, " n"]:
        score: Float[np.ndarray, " n"] = np.concatenate([items.score for _, items in self.tasks]).astype(np.float64)
        return score

    @property
    def margin(self) -> Float[np.ndarray, " n"]:
        margin: Float[np.ndarray, " n"] = np.concatenate([items.margin for _, items in self.tasks]).astype(np.float64)
        return margin


def bytes_of(source: Source, recipe: Recipe) -> int:
    """What the checkpoint of a recipe will take, headers aside. Raises what :func:`audit` raises."""
    found = audit(source, recipe)
    return found.nbytes + found.kept_nbytes


def search(
    store: Store, source: Source, grid: Grid, constraint: Constraint, few: int, many: int, run: Run, *,
    overhead: int = 0, rate: Callable[[int], float] | None = None, prefer: Prefer | None = None, seed: int = 0,
) -> Found:  # fmt: skip
    """The version to take within ``constraint`` among the recipes of a study's grid, which has tasks.

    ``overhead`` is what running takes beside the weights, in bytes; ``rate`` predicts tokens a second from stored
    bytes. The loss is the share of the original's score over the items of all tasks; an interval speaks of exactly
    these items. Raises EvidenceError for tasks whose items are not drawn one by one (passages with several questions,
    dialogues, lm-eval's own) and for too few items, StudyError where the original does not answer.
    """
    assert grid.tasks is not None  # the caller asks for tasks
    _require_drawn(grid.tasks)
    ruled: list[Ruled] = []
    fitting: list[Entry] = []
    for entry in grid.entries:
        option, why = _planned(source, entry, overhead, rate)
        if why := why or advise.too_much(option, constraint):
            ruled.append(Ruled(option, f"{why}; not made"))
        else:
            fitting.append(entry)
    makes = {entry.label: entry.make for entry in fitting if entry.make is not None}
    cards = {key for make in makes.values() for key in make.inputs}
    run([*grid.tasks.reference.values(), *(c for c in grid.cards if c.key in cards), *makes.values()])
    pool = _pool(store, grid.tasks)
    _require_enough(pool, few)
    mean = scored(pool.score)
    made = dict[str, Option]()
    for entry in fitting:
        row = store.lookup([makes[entry.label].key])[makes[entry.label].key]
        if row.status == "done":
            option = of_checkpoint(entry.label, store.checkpoint_folder(row.key), UNMEASURED, overhead)
            made[entry.label] = option if rate is None else replace(option, rate=rate(option.nbytes))
        else:
            why = (row.error or "").partition("\n")[0]
            ruled.append(Ruled(_planned(source, entry, overhead, rate)[0], f"could not be made: {why}"))
    measures = [(label, partial(_differences, store, grid.tasks, pool, label, run)) for label in made]
    out_of = partial(_out, constraint, advise.preferred(constraint, prefer), mean)
    raced = screening.race(measures, pool.margin, few, many, out_of=out_of, seed=seed) if measures else []
    original = of_checkpoint(ORIGINAL, Path(grid.reference.params["model"]), UNHARMED, overhead)
    options = [original if rate is None else replace(original, rate=rate(original.nbytes))]
    for one in raced:
        option = replace(made[one.name], loss=_lost(one.confirmed or one.screened, mean))
        if one.confirmed is None:
            ruled.append(Ruled(option, f"screened out on {one.screened.n} items: loses {option.percent}"))
        else:
            options.append(option)
    found = advise.advise(options, constraint, prefer)
    return Found(replace(found, ruled_out=(*ruled, *found.ruled_out)), tuple(raced), len(pool.score))


def _planned(source: Source, entry: Entry, overhead: int, rate: Callable[[int], float] | None) -> tuple[Option, str]:
    """An entry before it is made, and why it cannot be."""
    assert entry.make is not None  # a study makes its entries
    try:
        nbytes, why = bytes_of(source, Recipe.model_validate(entry.make.params["recipe"])), ""
    except (FormatError, CoverageError) as error:  # such as a row that is no multiple of a group
        nbytes, why = 0, error.what
    predicted = None if rate is None or why else rate(nbytes)
    return Option(entry.label, entry.recipe, nbytes, nbytes + overhead, UNMEASURED, predicted, "", "score"), why


def _require_drawn(tasks: TaskGrid) -> None:
    for chosen in tasks.tasks:
        require_scored(chosen.task)
        if chosen.task.kind == "dialogue" or chosen.task.family == "lm-eval":
            raise EvidenceError(
                "its items cannot be asked one by one", where=chosen.task.name, why="screening draws single items",
                fix="lowbit compare MODEL OUT... --tasks, then lowbit advise without --search",
            )  # fmt: skip


def _pool(store: Store, tasks: TaskGrid) -> Pool:
    rows = store.lookup([cell.key for cell in tasks.reference.values()])
    found = []
    for name, cell in tasks.reference.items():
        row = rows[cell.key]
        if row.status != "done":
            raise StudyError(f"the original did not answer {name}: {row.error or ''}", where="--search")
        items = read_items(store.evidence_folder(cell.key))[0]
        if len(np.unique(items.cluster)) < len(items):
            raise EvidenceError(
                "several of its items belong to one passage or template", where=name,
                why="the intervals of screening are for items that are independent",
                fix="lowbit compare MODEL OUT... --tasks, then lowbit advise without --search",
            )  # fmt: skip
        found.append((name, items))
    return Pool(tuple(found))


def _require_enough(pool: Pool, few: int) -> None:
    """Before anything is screened: versions are screened on different items, and fifty must be left to confirm on."""
    least = 2 * few + 50
    if (n := len(pool.score)) < least:
        raise EvidenceError(
            f"{n} items, too few to screen on {few} and confirm on others", where="--search",
            fix=f"tasks with {least} items together" + (", or --few 50" if few > 50 else ""),
        )  # fmt: skip


def _differences(
    store: Store, tasks: TaskGrid, pool: Pool, label: str, run: Run, rows: Int[np.ndarray, " k"]
) -> Float[np.ndarray, " k"]:
    """Scores of a version less those of the original on some items, which it is asked now."""
    version = next(v for v in tasks.versions if v.label == label)
    change: Float[np.ndarray, " n"] = np.zeros(len(pool.score))
    at, asked = 0, []
    for name, items in pool.tasks:
        only = np.sort(rows[(rows >= at) & (rows < at + len(items))] - at)
        if len(only):
            full = version.cells[name]
            params = {**full.params, "only": only.tolist()}
            asked.append((at, only, items, replace(full, label=f"{full.label}, {len(only)} items", params=params)))
        at += len(items)
    run([cell for *_, cell in asked])
    for at, only, items, cell in asked:
        row = store.lookup([cell.key])[cell.key]
        if row.status != "done":
            raise StudyError(f"{cell.label} failed: {row.error or ''}", where="--search")
        after = read_items(store.evidence_folder(cell.key))[0]
        if not np.array_equal(items.prompt_hash[only], after.prompt_hash):
            raise EvidenceError("other questions than the original's were answered", where=cell.label)
        change[at + only] = after.score.astype(np.float64) - items.score[only]
    found: Float[np.ndarray, " k"] = change[rows]
    return found


def _out(constraint: Constraint, wanted: Prefer, mean: float, means: Sequence[Interval]) -> list[bool]:
    """What screening rules out: a loss shown to be beyond the limit, and where quality decides, beyond the best's."""
    lossy = [False] * len(means)
    if constraint.max_loss is not None:
        lossy = screening.below(means, -constraint.max_loss * mean)
    worse = screening.behind(means) if wanted == "quality" else [False] * len(means)
    return [a or b for a, b in zip(lossy, worse, strict=True)]


def _lost(change: Interval, mean: float) -> Interval:
    """A change of the score as the share of the original's that is lost."""
    return change._replace(
        estimate=0.0 - change.estimate / mean,
        low=0.0 - change.high / mean,
        high=0.0 - change.low / mean,
        se=change.se / mean,
    )
