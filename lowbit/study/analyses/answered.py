"""Answers to questions with one right choice, a candidate's beside the original's: what two analyses share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lowbit.errors import StudyError
from lowbit.evaluation.metrics.confidence import Answers
from lowbit.evaluation.metrics.influence import interval
from lowbit.evaluation.statistics import Interval
from lowbit.report import text
from lowbit.report.model import Candidate
from lowbit.report.table import Cell
from lowbit.study.grid import Entry
from lowbit.study.view import Model, Pair, View


class Part(NamedTuple):
    """One task that both have answered."""

    pair: Pair
    reference: Answers
    candidate: Answers

    @property
    def task(self) -> str:
        return self.pair.task.task.name


class Version(NamedTuple):
    """One candidate and the tasks that it has answered; at least one."""

    entry: Entry
    about: Candidate
    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        return self.about.label

    def pooled(self, least: int = 2) -> Part | None:
        """The items of its tasks, one after the other, of those with at least ``least`` choices; None without any.

        Means are over items, so that a task counts by its number of questions. ``pair`` is that of the first.
        """
        parts = [part for part in self.parts if part.reference.p.shape[1] >= least]
        if not parts:
            return None
        reference, candidate = _joined([p.reference for p in parts]), _joined([p.candidate for p in parts])
        return Part(parts[0].pair, reference, candidate)


class Answered(NamedTuple):
    """What a model's candidates have answered, and the tasks that say nothing here, with the reason."""

    versions: tuple[Version, ...]
    left_out: tuple[str, ...]


def require_choices(view: View, analysis: str) -> None:
    """Raises StudyError for a study that asks no question with choices."""
    asked = [chosen.task for m in view.models if m.grid.tasks is not None for chosen in m.grid.tasks.tasks]
    if not any(task.kind == "choice" for task in asked):
        raise StudyError(
            f"the analysis {analysis!r} reads the answers to questions with choices, and the study asks none",
            where=f"study {view.name!r}", fix='run = ["arc_easy", "piqa"] in the table [tasks]',
        )  # fmt: skip


def answered(model: Model) -> Answered:
    """Every candidate that has answered a task whose questions have one right choice each.

    Tasks of other kinds, and those whose questions are of one cluster, are left out by name.
    """
    shown = {about.label: (entry, about) for entry, about in model.candidates()}
    parts: dict[str, list[Part]] = {label: [] for label in shown}
    out: dict[str, None] = {}
    for pair in model.pairs():
        if pair.label not in shown:
            continue
        items, name = pair.reference, pair.task.task.name
        if not items.is_choice or (items.gold < 0).any():
            out[f"{name}: its questions do not have one right choice each"] = None
        elif len(np.unique(items.cluster)) < 2:
            out[f"{name}: all of its questions are of one cluster"] = None
        else:
            parts[pair.label].append(Part(pair, Answers.of(items), Answers.of(pair.candidate)))
    versions = [Version(*shown[label], tuple(found)) for label, found in parts.items() if found]
    return Answered(tuple(versions), tuple(out))


def contrast(
    value: Float[np.ndarray, " n"], inside: Bool[np.ndarray, " n"], outside: Bool[np.ndarray, " n"],
    cluster: Int[np.ndarray, " n"], weight: float = 1.0,
) -> Interval:  # fmt: skip
    """Mean of ``value`` over the items ``inside`` less ``weight`` times that over the items ``outside``, clustered.

    The two may overlap; both hold an item. The error is that of what each item adds to both means.
    """
    (mean, of_inside), (other, of_outside) = (_mean(value, rows) for rows in (inside, outside))
    return interval(mean - weight * other, of_inside - weight * of_outside, cluster, 0.95, "difference of means")


def beyond(found: Interval, null: float) -> Interval:
    """The interval of what ``found`` has beyond ``null``."""
    return found._replace(estimate=found.estimate - null, low=found.low - null, high=found.high - null)


def estimated(found: Interval, *, signed: bool = False) -> Cell:
    """A number with its interval in a table, whose column has the unit; ``judged.spelled`` is for sentences."""
    return Cell(*text.estimate(found.estimate, found.low, found.high, signed=signed))


def counted(version: Version) -> Cell:
    """How many questions of how many tasks a candidate has answered."""
    questions = sum(len(part.reference.gold) for part in version.parts)
    tasks = len(version.parts)
    return Cell(f"{questions}", f"{tasks} task{'s' if tasks != 1 else ''}")


def _mean(value: Float[np.ndarray, " n"], rows: Bool[np.ndarray, " n"]) -> tuple[float, Float[np.ndarray, " n"]]:
    mean = float(value[rows].mean())
    influence: Float[np.ndarray, " n"] = np.where(rows, value - mean, 0.0) / rows.sum()
    return mean, influence


def _joined(several: Sequence[Answers]) -> Answers:
    """Answers of several tasks as one; items of two tasks are of two clusters."""
    widest = max(a.p.shape[1] for a in several)
    p = np.concatenate([np.pad(a.p, ((0, 0), (0, widest - a.p.shape[1]))) for a in several])
    clusters, first = [], 0
    for a in several:
        labels, member = np.unique(a.cluster, return_inverse=True)
        clusters.append(member + first)
        first += len(labels)
    return Answers(p, np.concatenate([a.gold for a in several]), np.concatenate(clusters))
