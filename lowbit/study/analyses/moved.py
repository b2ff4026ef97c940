"""Whom low bits move: the change of p(true) by how sure the original was, for the analysis of confidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from lowbit.evaluation.metrics import confidence
from lowbit.evaluation.metrics.base import quantile_group
from lowbit.evaluation.metrics.confidence import Answers
from lowbit.evaluation.statistics import Interval, paired_mean
from lowbit.report.panel import Curves, Mark
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses.answered import Part, contrast, estimated

TIMES = 1.5
"""How much more the least sure third must move than the surest to have moved "more" (acceptance A7.2)."""
_LEAST = 1e-6  # probabilities closer to 0 and 1 are cut here before their log-odds are taken


class Third(NamedTuple):
    """Questions of like confidence of the original; shares, and nats for the log-odds."""

    low: float
    high: float
    shift: Interval
    size: Interval
    log_odds: Interval


class Thirds(NamedTuple):
    """From the least sure to the surest, and how much more than the surest the least sure third moved."""

    groups: tuple[Third, ...]
    more: Interval
    """Mean size of the change of p(true) in the least sure third, less that in the surest."""
    more_by: Interval
    """The same less ``TIMES`` that in the surest."""
    more_odds: Interval
    """The first of the change in log-odds."""


def thirds_of(part: Part) -> Thirds | None:
    """None where a third holds fewer than two clusters."""
    sure, cluster = part.reference.confidence, part.reference.cluster
    group = quantile_group(sure, 3)
    members = [group == k for k in range(3)]
    if any(len(np.unique(cluster[rows])) < 2 for rows in members):
        return None
    change = part.candidate.p_true - part.reference.p_true
    odds = np.abs(_log_odds(part.candidate) - _log_odds(part.reference))
    size = np.abs(change)
    groups = tuple(
        Third(
            float(sure[rows].min()), float(sure[rows].max()),
            *(paired_mean(value[rows], cluster[rows]) for value in (change, size, odds)),
        )
        for rows in members
    )  # fmt: skip
    least, most = members[0], members[2]
    return Thirds(
        groups, contrast(size, least, most, cluster), contrast(size, least, most, cluster, TIMES),
        contrast(odds, least, most, cluster),
    )  # fmt: skip


def _log_odds(answers: Answers) -> Float[np.ndarray, " n"]:
    value: Float[np.ndarray, " n"] = special.logit(np.clip(answers.p_true, _LEAST, 1 - _LEAST))
    return value


def table(thirds: Mapping[str, Thirds]) -> Table:
    names = "least sure third", "middle third", "surest third"
    rows = [
        Row((
            Cell(label), Cell(name, f"{100 * g.low:.0f} to {100 * g.high:.0f} % sure"), Cell(f"{g.shift.n}"),
            estimated(g.shift.scaled(100.0), signed=True), estimated(g.size.scaled(100.0)), estimated(g.log_odds),
        ))
        for label, found in thirds.items() for name, g in zip(names, found.groups, strict=True)
    ]  # fmt: skip
    columns = (
        Column("Version", numeric=False), Column("Questions of which the original was", numeric=False),
        Column("Questions"), Column("Shift of p(true)", "pp"), Column("Its size", "pp"),
        Column("Size in log-odds", "nat"),
    )  # fmt: skip
    return Table(columns, tuple(rows))


def curves(pooled: Mapping[str, Part], *, absolute: bool) -> Curves:
    marks = []
    for label, part in pooled.items():
        bins = max(2, min(10, len(part.reference.gold) // 30))
        for b in confidence.shift_by_confidence(part.reference, part.candidate, bins, absolute=absolute):
            i = b.interval.scaled(100.0)
            note = f"{100 * b.low:.0f} to {100 * b.high:.0f} % sure, n {i.n}"
            marks.append(Mark(label, 50 * (b.low + b.high), i.estimate, i.low, i.high, note))
    what = "size of the shift" if absolute else "shift"
    return Curves(
        key="size" if absolute else "shift",
        title=f"{what[0].upper()}{what[1:]} of p(true) by the original's confidence",
        caption=f"Mean {what} of the right answer's probability in groups of like confidence of the original.",
        x="confidence of the original, %", y=f"{what} of p(true), pp", marks=tuple(marks),
        levels=() if absolute else (("no change", 0.0),),
    )  # fmt: skip
