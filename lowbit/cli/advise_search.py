"""The search of `lowbit advise --search`, with its progress. Imports torch, so the command imports it when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lowbit.cli.options import say
from lowbit.cli.run import running
from lowbit.evaluation.tasks import registry
from lowbit.models.source import Source
from lowbit.report.text import MISSING
from lowbit.study import grid
from lowbit.study import search as searching
from lowbit.study.advise import Advice, Constraint, Prefer
from lowbit.study.spec import Study, Tasks


def asked(model: str, recipes: str | None, names: Sequence[str], data: Path | None, limit: int | None) -> Study:
    """The study that a search is drawn from. Raises EvidenceError for tasks that do not exist."""
    registry.choose(names, data)
    tried = [r.strip() for r in recipes.split(";") if r.strip()] if recipes else list(searching.RECIPES)
    tasks = Tasks(run=list(names), data=None if data is None else str(data), limit=limit, floor=False)
    return Study(name="advise", models=[model], recipes=tried, tasks=tasks)


def search_recipes(
    folder: Path, name: str, study: Study, source: Source, constraint: Constraint, few: int, many: int, jobs: int, *,
    overhead: int, rate: Callable[[int], float] | None, prefer: Prefer | None,
) -> Advice:  # fmt: skip
    """Make, screen, confirm, and say how each version came out."""
    (planned,) = grid.of_study(study, say)
    with running(folder, name, study.model_dump(), jobs) as run:
        found = searching.search(
            run.store, source, planned, constraint, few, many, run, overhead=overhead, rate=rate, prefer=prefer
        )
    for one in found.raced:
        screened, confirmed = one.screened, one.confirmed
        later = MISSING if confirmed is None else f"{confirmed.estimate:+.4f} on {confirmed.n}"
        say(f"{one.name}: change of the mean score {screened.estimate:+.4f} on {screened.n} items, confirmed {later}")
    return found.advice
