"""Runs analyses over a study, or over a comparison of versions that exist already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from lowbit.errors import StudyError, nearest
from lowbit.evaluation.correlation import LEAST
from lowbit.evaluation.tasks.base import Task
from lowbit.report.panel import Panel
from lowbit.study.analyses import ANALYSES
from lowbit.study.view import View

Analysis = Callable[[View], Sequence[Panel]]
"""Panels, in their order; none where the study has no evidence (yet) for it. Raises StudyError for a study that cannot
have any, naming what its file must say."""


def analyse(view: View, names: Sequence[str]) -> list[Panel]:
    """What the named analyses found (``analyses.ANALYSES``), in the order of the names; a line where one found nothing.

    A comparison has to meet ``require`` first.
    """
    return [panel for name in names for panel in _load(name)(view) or [_nothing(name)]]


def require(names: Sequence[str], *, tokens: bool, candidates: int, tasks: Sequence[Task]) -> None:
    """Whether analyses can be asked of a comparison of so many ``candidates``, before anything is run for it.

    ``tokens``: whether a text is scored; ``tasks`` are those that are asked. Raises StudyError for a name that is no
    analysis, with the nearest, and for what the comparison does not have, with the way to get it.
    """
    for name in names:
        if name not in ANALYSES:
            raise StudyError(f"no analysis {name!r}", where="--analyses", fix=nearest(name, ANALYSES))
        if name in _OF_STUDIES:
            reads, table = _OF_STUDIES[name]
            raise _missing(name, reads, f"a study file with {table}, and lowbit study run")
        if name in _OF_TOKENS and not tokens:
            raise _missing(name, "both models on every token of a text", "kl among --tasks, or no --tasks")
        if name in _OF_CHOICES and not any(task.kind == "choice" for task in tasks):
            raise _missing(name, "answers to questions with choices", "--tasks arc_easy,piqa --data DIR")
        if name == "long_context" and not any(task.make is not None for task in tasks):
            raise _missing(name, "questions that are made at several lengths", "--tasks long --lengths 512,1024")
        if name == "proxy" and (not tasks or candidates + 1 < LEAST):
            fix = f"--tasks kl,arc_easy,piqa --data DIR, and {LEAST - 1} candidates or more"
            raise _missing(name, f"perplexity and tasks over {LEAST} versions or more, the original among them", fix)


_FAMILY = "a family of models in several precisions", 'models = ["MODEL", "LARGER"] and the same recipes for all'
_OF_STUDIES: Mapping[str, tuple[str, str]] = {
    "sampling": ("texts that every version wrote", "a table [sampling]"),
    "calibration": ("versions made with several calibration texts or seeds", "a table [calibrations]"),
    "outliers": ("statistics of the outliers of the original", "a table [outliers]"),
    "budgets": ("the recipes that versions were made by", "recipes of several widths"),
    "laws": _FAMILY, "scale": _FAMILY,
}  # fmt: skip
"""What a comparison never has: what it is, and what a study file says for it."""
_OF_TOKENS = frozenset({"where", "cascades", "proxy"})
_OF_CHOICES = frozenset({"confidence", "disagreement"})


def _missing(name: str, reads: str, fix: str) -> StudyError:
    return StudyError(f"{name!r} reads {reads}, which this comparison does not have", where="--analyses", fix=fix)


def _nothing(name: str) -> Panel:
    return Panel(name, f"The analysis {name}", lead=("Nothing to show: its evidence is not there yet, or too little.",))


def _load(name: str) -> Analysis:
    function: Analysis = import_module(f"lowbit.study.analyses.{name}").panels
    return function
