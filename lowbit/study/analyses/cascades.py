"""The margin-gated cascade: the low-bit model first, the original where it is unsure; what that keeps and costs.

``panels`` has it token by token, as ``lowbit generate --cascade`` writes; that of questions is shown by the analysis
of disagreement. Both come from evidence on the two models: no cascade is run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lowbit.evaluation import cascade
from lowbit.evaluation.cascade import Choice, Gated, Point
from lowbit.evaluation.metrics.influence import share
from lowbit.evaluation.statistics import Interval
from lowbit.report import text
from lowbit.report.model import Candidate
from lowbit.report.panel import Curves, Mark, Panel, Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses.answered import Version, counted, estimated
from lowbit.study.analyses.judged import spelled
from lowbit.study.grid import Entry
from lowbit.study.view import Model, View

WANTED = 0.99
"""The share of answers that are to be the original's."""
TARGETS = (0.95, WANTED, 0.999)
"""Of tokens: one in a thousand is what a text of some length shows."""
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_CLUSTERS = 4  # two to choose a threshold on, two to try it on


class What(NamedTuple):
    """What the gate decides on, in words."""

    items: str
    verb: str
    """What the original does to those that it is asked."""
    results: str


QUESTIONS, TOKENS = What("questions", "answers", "answers"), What("tokens", "chooses", "tokens")


class Route(NamedTuple):
    """A candidate that goes first; where its margin is below a threshold, the original is asked."""

    what: What
    label: str
    counted: Cell
    """How many items there are, and of what."""
    low: int
    high: int
    """Bytes of the candidate and of the original."""
    gated: Gated
    choices: Mapping[float, Choice]
    """By the share of results that are to be the original's: the threshold for it."""
    command: tuple[str, str] | None
    """What would run it: the candidate's folder and the original; None where the candidate has no checkpoint."""

    def cost(self, point: Point) -> float:
        """Bytes that are read for an item, as a share of what the original alone reads."""
        return point.cost(float(self.low), float(self.high)) / self.high

    @property
    def alone(self) -> Interval:
        """Share of results that are the original's without a cascade."""
        return share(self.gated.low, self.gated.cluster)


def panels(view: View) -> list[Panel]:
    """A panel a model with a scored candidate, token by token."""
    found = []
    for i, model in enumerate(view.models):
        routes, left = _of_tokens(model)
        if routes or left:
            found.append(panel(f"cascades-{i}", view.titled("A cascade, token by token", model), routes, left))
    return found


def panel(key: str, title: str, routes: Sequence[Route], left: Sequence[str] = ()) -> Panel:
    """Of one model's candidates; ``left`` says which have none, and why."""
    out = tuple(f"Left out: {reason}." for reason in left)
    if not routes:
        return Panel(key, title, lead=out)
    return Panel(
        key, title, lead=tuple(map(said, routes)),
        tables=(
            Titled("The margin to choose", table(routes)),
            Titled("Agreement and cost over margins", points(routes), folded=True),
        ),
        figures=(curves(routes),), notes=(*_NOTES, *out),
    )  # fmt: skip


_NOTES = (
    "The margin is the probability of the candidate's first choice less that of its second. Each was chosen on one "
    "half of the clusters of the text and is reported on the other; 95 % intervals are clustered.",
    "Every token was foretold from the text before it. lowbit generate foretells each from what it wrote itself, which "
    "is likelier text: it should ask less often. The share of tokens that it says it escalated is the one that counts.",
    "Bytes are those of both models' weights: the candidate's are read for every token, the original's for every one "
    "that it chooses, the tokens that it missed in the same pass. Keys and values are not counted.",
)


def _of_tokens(model: Model) -> tuple[list[Route], list[str]]:
    """A cascade for every candidate, and those that have none, with the reason."""
    found, left = [], []
    for entry, about in model.candidates():
        tokens = model.tokens(entry.score)
        if tokens is None:
            continue
        clusters = len(np.unique(tokens.cluster))
        if tokens.margin is None:
            left.append(f"{about.label}, whose evidence does not hold its own margin: score it again")
        elif clusters < _CLUSTERS:
            left.append(f"{about.label}, scored on {clusters} clusters of text: a margin wants {_CLUSTERS} or more")
        else:
            of = Cell(f"{len(tokens):,}", f"{clusters} clusters")
            found.append(_route(TOKENS, model, entry, about, of, cascade.of_tokens(tokens), TARGETS))
    return found, left


def routes(model: Model, versions: Sequence[Version]) -> list[Route]:
    """Question by question: a cascade for every candidate with enough clusters for a threshold and its trial."""
    found = []
    for version in versions:
        part = version.pooled()
        if part is None or len(np.unique(part.reference.cluster)) < _CLUSTERS:
            continue
        gated = cascade.agreement(part.reference, part.candidate)
        found.append(_route(QUESTIONS, model, version.entry, version.about, counted(version), gated, (WANTED,)))
    return found


def _route(
    what: What, model: Model, entry: Entry, about: Candidate, of: Cell, gated: Gated, targets: Sequence[float]
) -> Route:
    choices = {wanted: cascade.choose(gated, wanted) for wanted in targets}
    high = model.report.reference.bytes_total
    return Route(what, about.label, of, about.bytes_total, high, gated, choices, _command(model, entry))


def said(route: Route) -> str:
    """The cascade that was chosen for ``WANTED`` in a sentence."""
    choice, label, what = route.choices[WANTED], route.label, route.what
    point = choice.reported
    if choice.chosen.margin == 0:
        return f"{label} needs no cascade to agree with the original on {100 * WANTED:.0f} % of the {what.items}."
    cost = route.cost(point)
    words = f"{100 * cost:.0f} % of the bytes of the original alone" + (": it saves nothing" if cost >= 1 else "")
    escalated, agreed = (spelled(i.scaled(100.0), "%") for i in (point.escalated, point.outcome))
    return (
        f"Behind {label} the original {what.verb} {escalated} of the {what.items} at a margin of {point.margin:.3g}: "
        f"{agreed} of the {what.results} are the original's, n {point.outcome.n:,}, for {words}."
    )


def table(found: Sequence[Route]) -> Table:
    """The threshold of every candidate, what it does on other items, and the command that uses it."""
    rows = []
    for route in found:
        for wanted, choice in route.choices.items():
            point = choice.reported
            rows.append(
                Row((
                    Cell(route.label, text.size(route.low)), route.counted, estimated(route.alone.scaled(100.0)),
                    Cell(f"{100 * wanted:g}"), *_done(route, point), Cell(_typed(route, choice.chosen.margin)),
                ))
            )  # fmt: skip
    items = found[0].what.items.capitalize() if found else ""
    columns = (
        Column("Version", numeric=False), Column(items), Column("Agrees alone", "%"), Column("Wanted", "%"),
        *_measured("%, other half"), Column("Command", numeric=False),
    )  # fmt: skip
    return Table(columns, tuple(rows))


def points(found: Sequence[Route]) -> Table:
    """What margins do, over all items: a line for each share that is escalated."""
    rows = [Row((Cell(route.label), *_done(route, point))) for route in found for point in _curve(route)]
    return Table((Column("Version", numeric=False), *_measured("%")), tuple(rows))


def _measured(unit: str) -> tuple[Column, ...]:
    return (
        Column("Margin"), Column("Escalated", unit), Column("Agrees", unit),
        Column("Bytes read", "% of the original alone"),
    )  # fmt: skip


def _done(route: Route, point: Point) -> tuple[Cell, ...]:
    shares = (estimated(i.scaled(100.0)) for i in (point.escalated, point.outcome))
    return Cell(f"{point.margin:.3g}"), *shares, Cell(f"{100 * route.cost(point):.0f}")


def _curve(route: Route) -> Iterator[Point]:
    """Ties can put two shares at one margin."""
    yield from {point.margin: point for point in cascade.curve(route.gated, _SHARES)}.values()


def curves(found: Sequence[Route]) -> Curves:
    """Agreement against cost, over thresholds."""
    marks = []
    for route in found:
        for point in _curve(route):
            i = point.outcome.scaled(100.0)
            note = f"margin {point.margin:.3g}, {100 * point.escalated.estimate:.1f} % escalated, n {i.n:,}"
            marks.append(Mark(route.label, 100 * route.cost(point), i.estimate, i.low, i.high, note))
    what = found[0].what if found else QUESTIONS
    return Curves(
        key="cascade", title="What a cascade costs and keeps",
        caption=f"Share of {what.results} that are the original's against bytes read for one; from left to right more "
        f"{what.items} go to the original, until all do. Beyond 100 % the original alone is cheaper.",
        x="bytes read, % of the original alone", y=f"the original's {what.results}, %", marks=tuple(marks),
        levels=((f"{100 * WANTED:.0f} %", 100 * WANTED),),
    )  # fmt: skip


def _command(model: Model, entry: Entry) -> tuple[str, str] | None:
    if entry.make is not None:
        out = model.store.root / "checkpoints" / entry.make.key
    elif "candidate" in entry.score.params:
        out = Path(entry.score.params["candidate"])
    else:
        return None
    own = Path(model.grid.reference.params["model"])
    return _near(out), _near(own) if own.name == model.name else model.name  # a name that is no folder stays as it is


def _typed(route: Route, margin: float) -> str:
    """The command as it is typed; without a cascade where none is needed."""
    if route.command is None:
        return ""
    out, reference = route.command
    gate = f" --cascade {shlex.quote(f'{reference},margin={margin:.6g}')}" if margin else ""
    return f"lowbit generate {shlex.quote(out)} -p …{gate}"


def _near(path: Path) -> str:
    """A path from the working directory where it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
