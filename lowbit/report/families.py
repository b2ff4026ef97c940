"""Tasks by family, and what a family shows as a whole."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from lowbit.report.model import Report
from lowbit.report.task_summary import Asked, asked

_VERDICTS = ("worse", "changed", "unclear", "same", "better")


class Family(NamedTuple):
    """The measures of the tasks of one family; ``name`` is empty where families are not known."""

    name: str
    tasks: tuple[Asked, ...]

    @property
    def size(self) -> int:
        """How many tasks it has; a task may have several measures."""
        return len({one.task for one in self.tasks})

    def verdicts(self, candidate: str) -> dict[str, int]:
        """How many measures of a candidate have each verdict, bad ones first."""
        found = Counter(one.found[candidate].verdict for one in self.tasks if candidate in one.found)
        return {verdict: found[verdict] for verdict in _VERDICTS if found[verdict]}

    def mean(self, candidate: str) -> tuple[float, float, float] | None:
        """Mean change in points and its 95 % interval, over the first measure in percent of each task; up is better.

        The tasks are given and their items independent, so the half widths add up in squares. None without any.
        """
        first: dict[str, tuple[float, float]] = {}
        for one in self.tasks:
            f = one.found.get(candidate)
            if f is not None and f.unit == "%" and f.better != "neither":
                change = f.delta if f.better == "higher" else -f.delta
                first.setdefault(one.task, (change, (f.high - f.low) / 2))
        if not first:
            return None
        mean = sum(change for change, _ in first.values()) / len(first)
        half = math.hypot(*(half for _, half in first.values())) / len(first)
        return mean, mean - half, mean + half


def families(report: Report) -> list[Family]:
    """The report's tasks by family, in the order in which families first appear."""
    names = dict(report.families)
    found: dict[str, list[Asked]] = {}
    for one in asked(report):
        found.setdefault(names.get(one.task, ""), []).append(one)
    return [Family(name, tuple(tasks)) for name, tasks in found.items()]
