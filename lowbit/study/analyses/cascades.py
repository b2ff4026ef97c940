"""The margin-gated cascade as a choice, a table and a curve of costs, for the analysis of disagreement."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lowbit.evaluation import cascade
from lowbit.evaluation.cascade import Choice, Gated, Point
from lowbit.evaluation.metrics.influence import share
from lowbit.evaluation.statistics import Interval
from lowbit.report import text
from lowbit.report.panel import Curves, Mark
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses.answered import Version, counted, estimated, spelled
from lowbit.study.view import Model

WANTED = 0.99
"""The share of answers that are to be the original's."""
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


class Route(NamedTuple):
    """A candidate that answers first; where its margin is below a threshold, the original does."""

    version: Version
    gated: Gated
    choice: Choice
    high: int
    """Bytes of the original."""
    command: str
    """What would run it; empty where the candidate has no checkpoint."""

    def cost(self, point: Point) -> float:
        """Bytes that are read for an answer, as a share of what the original alone reads."""
        return point.cost(float(self.version.about.bytes_total), float(self.high)) / self.high

    @property
    def alone(self) -> Interval:
        """Share of answers that are the original's without a cascade."""
        return share(self.gated.low, self.gated.cluster)


def routes(model: Model, versions: Sequence[Version]) -> list[Route]:
    """A cascade for every candidate with enough clusters to choose a threshold and to try it on others."""
    found = []
    for version in versions:
        part = version.pooled()
        if part is None or len(np.unique(part.reference.cluster)) < 4:
            continue
        gated = cascade.agreement(part.reference, part.candidate)
        choice = cascade.choose(gated, WANTED)
        command = _command(model, version, choice.chosen.margin)
        found.append(Route(version, gated, choice, model.report.reference.bytes_total, command))
    return found


def said(route: Route) -> str:
    """The chosen cascade in a sentence."""
    point, label = route.choice.reported, route.version.label
    if route.choice.chosen.margin == 0:
        return f"{label} needs no cascade to agree with the original on {100 * WANTED:.0f} %."
    cost = route.cost(point)
    words = f"{100 * cost:.0f} % of the bytes of the original alone" + (": it saves nothing" if cost >= 1 else "")
    escalated, agreed = (spelled(i.scaled(100.0), "%") for i in (point.escalated, point.outcome))
    return (
        f"Behind {label} the original answers {escalated} of the questions at a margin of {point.margin:.3g}: "
        f"{agreed} of the answers are the original's, n {point.outcome.n}, for {words}."
    )


def table(found: Sequence[Route]) -> Table:
    """The threshold of every candidate, what it does on other questions, and the command that uses it."""
    rows = []
    for route in found:
        point, cost = route.choice.reported, route.cost(route.choice.reported)
        rows.append(
            Row((
                Cell(route.version.label, text.size(route.version.about.bytes_total)), counted(route.version),
                estimated(route.alone.scaled(100.0)), Cell(f"{point.margin:.3g}"),
                estimated(point.escalated.scaled(100.0)), estimated(point.outcome.scaled(100.0)),
                Cell(f"{100 * cost:.0f}"), Cell(route.command),
            ))
        )  # fmt: skip
    columns = (
        Column("Version", numeric=False), Column("Questions"), Column("Agrees alone", "%"), Column("Margin"),
        Column("Escalated", "%, other half"), Column("Agrees", "%, other half"),
        Column("Bytes read", "% of the original alone"), Column("Command", numeric=False),
    )  # fmt: skip
    return Table(columns, tuple(rows))


def curves(found: Sequence[Route]) -> Curves:
    """Agreement against cost, over thresholds."""
    marks = []
    for route in found:
        for point in cascade.curve(route.gated, _SHARES):
            i = point.outcome.scaled(100.0)
            note = f"margin {point.margin:.3g}, {100 * point.escalated.estimate:.1f} % escalated, n {i.n}"
            marks.append(Mark(route.version.label, 100 * route.cost(point), i.estimate, i.low, i.high, note))
    return Curves(
        key="cascade", title="What a cascade costs and keeps",
        caption="Share of the original's answers against bytes read for an answer; from left to right more questions "
        "go to the original, until all do. Beyond 100 % the original alone is cheaper.",
        x="bytes read, % of the original alone", y="the original's answers, %", marks=tuple(marks),
        levels=((f"{100 * WANTED:.0f} %", 100 * WANTED),),
    )  # fmt: skip


def _command(model: Model, version: Version, margin: float) -> str:
    if version.entry.make is None:
        return ""
    out = _near(model.store.root / "checkpoints" / version.entry.make.key)
    own = Path(model.grid.reference.params["model"])
    reference = _near(own) if own.name == model.name else model.name  # a name that is no folder is typed as it is
    return f"lowbit generate {shlex.quote(out)} -p … --cascade {shlex.quote(f'{reference},margin={margin:.3g}')}"


def _near(path: Path) -> str:
    """A path from the working directory where it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
