"""Disagreement: which answers low bits change, what foretells it, what a cascade would cost (arXiv:2204.04220).

A panel a model: rates of change, uncertainties of the original as rankings of the changed questions and tokens, the
changed questions to look at, and the margin-gated cascade.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lowbit.evaluation import hypotheses
from lowbit.evaluation.hypotheses import Hypothesis, Measured
from lowbit.evaluation.metrics import disagreement as dis
from lowbit.evaluation.metrics.base import quantile_group
from lowbit.evaluation.metrics.confidence import Answers
from lowbit.evaluation.metrics.influence import share
from lowbit.evaluation.statistics import Interval, cluster_ratio
from lowbit.report import text
from lowbit.report.panel import Claim, Curves, Mark, Panel, Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses import cascades, changed_inputs, foretold
from lowbit.study.analyses.answered import (
    Answered,
    Part,
    Version,
    answered,
    beyond,
    contrast,
    counted,
    estimated,
    require_choices,
)  # fmt: skip
from lowbit.study.analyses.judged import spelled
from lowbit.study.view import Model, View

_PAPER = "arXiv:2204.04220"
_FIFTH = 5
_TIMES = 3.0
"""How often the rate of the least sure fifth must be that of all (acceptance A7.3)."""
_ESCALATED, _REMOVED = 0.1, 0.4
"""The share of questions that the original answers, and the share of the changes that this must undo (A13.3)."""
_FOUR_BITS = 3.9, 5.0  # bits a weight of the candidates that A13.3 speaks of


def panels(view: View) -> list[Panel]:
    """A panel for each model whose candidates have answered. Raises StudyError where no question has choices."""
    require_choices(view, "disagreement")
    found = ((m, answered(m)) for m in view.models)
    return [
        _panel(f"disagreement-{i}", view.titled("Which answers change", m), m, f)
        for i, (m, f) in enumerate(found)
        if f.versions
    ]


class _Changed(NamedTuple):
    """A candidate's questions of all tasks, and which answers changed."""

    version: Version
    part: Part
    changed: Bool[np.ndarray, " n"]

    @property
    def rate(self) -> Interval:
        return dis.rate(self.changed, self.part.reference.cluster)

    @property
    def margin(self) -> Float[np.ndarray, " n"]:
        """The original's first probability less its second."""
        return -dis.margin(self.part.reference.p)

    @property
    def least_sure(self) -> Bool[np.ndarray, " n"]:
        group: Int[np.ndarray, " n"] = quantile_group(self.margin, _FIFTH)
        rows: Bool[np.ndarray, " n"] = group == 0
        return rows


def _panel(key: str, title: str, model: Model, found: Answered) -> Panel:
    changes = [
        _Changed(v, part, dis.disagrees(part.reference, part.candidate))
        for v in found.versions
        if (part := v.pooled()) is not None
    ]
    routes = cascades.routes(model, found.versions)
    rankings = foretold.rankings(found.versions)
    tokens = foretold.of_tokens(model)
    tables = [
        Titled("Changed answers", _rates(model, changes)),
        Titled("What foretells a changed answer", foretold.table(rankings)),
        Titled("What foretells a changed token", foretold.token_table(tokens)),
        Titled(f"A cascade that agrees on {100 * cascades.WANTED:.0f} %", cascades.table(routes)),
        Titled("Changed answers task by task", _by_task(model, found.versions), folded=True),
        Titled("Changed questions that the original was least sure of", changed_inputs.table(found.versions),
               folded=True),
    ]  # fmt: skip
    return Panel(
        key=key, title=title, lead=tuple(_lead(changes, routes)), claims=tuple(_claims(changes, rankings, tokens)),
        tables=tuple(t for t in tables if t.table.rows), figures=(_by_margin(changes), cascades.curves(routes)),
        notes=(*_NOTES, *(f"Left out: {reason}." for reason in found.left_out)),
    )  # fmt: skip


_NOTES = (
    "An answer is the choice of the largest summed log-likelihood, and changed where the candidate's is another than "
    "the original's; the margin is the probability of the first choice less that of the second. 95 % intervals are "
    "clustered by passage, subject or template.",
    "AUC: the chance that a changed answer ranks above an unchanged one. With two choices all uncertainties rank "
    "alike, so they are compared on questions with more. What is shown is so at 5 %, adjusted by Holm over its table; "
    "the claims are another such family.",
    "The cascade is gated by the candidate's own margin. Its threshold was chosen on one half of the clusters and is "
    "reported on the other. Bytes are those of both models' weights, each read once for every question that it "
    "answers.",
    "lowbit generate gates every token by its margin over the vocabulary, not a question by that over its choices: "
    "the analysis cascades has the margins for it.",
    "Of the paper's other findings, changes under shifted inputs and after retraining are not tried here.",
)


# -- how many ----------------------------------------------------------------------------------------------------------


def _rates(model: Model, changes: Sequence[_Changed]) -> Table:
    rows = list(_floor(model))
    for one in changes:
        names = Cell(one.version.label), counted(one.version)
        least_sure = (Cell(text.MISSING), Cell(text.MISSING))
        if one.changed.any():
            least_sure = estimated(_fifth(one).scaled(100.0)), estimated(_enriched(one)[0].scaled(100.0))
        rows.append(Row((*names, estimated(one.rate.scaled(100.0)), *_kinds(one.part, one.changed), *least_sure)))
    columns = (
        Column("Version", numeric=False), *_counts(), Column("Of them in the least sure fifth", "%"),
        Column("Changed in that fifth", "%"),
    )  # fmt: skip
    return Table(columns, tuple(rows))


def _floor(model: Model) -> Iterator[Row]:
    """The original itself in other batches: how many answers change without any rounding."""
    asked = model.grid.tasks
    if asked is None:
        return
    changed, n = 0, 0
    for name, cell in asked.floor.items():
        base, again = model.items(asked.reference[name]), model.items(cell)
        if base is not None and again is not None and base.is_choice and (base.gold >= 0).all():
            changed += int((Answers.of(base).chosen != Answers.of(again).chosen).sum())
            n += len(base)
    if n:
        names = Cell("original, in other batches"), Cell(f"{n}")
        rate = Cell(f"{100 * changed / n:.2g}", f"{changed} of {n}")
        yield Row((*names, rate, *(Cell("") for _ in range(5))), "reference", is_reference=True)


def _by_task(model: Model, versions: Sequence[Version]) -> Table:
    rows = []
    for task in dict.fromkeys(part.task for version in versions for part in version.parts):
        for version in versions:
            for part in version.parts:
                if part.task == task:
                    changed = dis.disagrees(part.reference, part.candidate)
                    rate = estimated(dis.rate(changed, part.reference.cluster).scaled(100.0))
                    n = Cell(f"{len(changed)}")
                    rows.append(Row((Cell(task), Cell(version.label), n, rate, *_kinds(part, changed))))
    return Table((Column("Task", numeric=False), Column("Version", numeric=False), *_counts()), tuple(rows))


def _counts() -> tuple[Column, ...]:
    return (
        Column("Questions"), Column("Changed", "%"), Column("Lost", "right to wrong"),
        Column("Gained", "wrong to right"), Column("Other", "wrong to wrong"),
    )  # fmt: skip


def _kinds(part: Part, changed: Bool[np.ndarray, " n"]) -> tuple[Cell, Cell, Cell]:
    before, after = part.reference.correct, part.candidate.correct
    lost, gained = int((before > after).sum()), int((after > before).sum())
    return Cell(f"{lost}"), Cell(f"{gained}"), Cell(f"{int(changed.sum()) - lost - gained}")


def _fifth(one: _Changed) -> Interval:
    """Share of the changed answers that the least sure fifth of the questions holds."""
    return share(one.least_sure[one.changed].astype(np.float64), one.part.reference.cluster[one.changed])


def _enriched(one: _Changed) -> tuple[Interval, Interval]:
    """The rate in the least sure fifth, and that less ``_TIMES`` the rate of all."""
    cluster, value = one.part.reference.cluster, one.changed.astype(np.float64)
    everything = np.ones(len(value), dtype=bool)
    return share(value[one.least_sure], cluster[one.least_sure]), contrast(
        value, one.least_sure, everything, cluster, _TIMES
    )


def _by_margin(changes: Sequence[_Changed]) -> Curves:
    """How often answers change, by the original's margin."""
    marks = []
    for one in changes:
        margin, cluster = one.margin, one.part.reference.cluster
        group = quantile_group(margin, max(2, min(10, len(margin) // 30)))
        for k in range(group.max() + 1):
            rows = group == k
            rate = share(one.changed[rows].astype(np.float64), cluster[rows]).scaled(100.0)
            note = f"margins {margin[rows].min():.2f} to {margin[rows].max():.2f}, n {rate.n}"
            marks.append(Mark(one.version.label, float(margin[rows].mean()), rate.estimate, rate.low, rate.high, note))
    return Curves(
        key="margin", title="Answers change where the original was torn",
        caption="Share of changed answers in groups of questions of like margin of the original.",
        x="margin of the original", y="changed answers, %", marks=tuple(marks),
    )  # fmt: skip


# -- what is said of it ------------------------------------------------------------------------------------------------


def _lead(changes: Sequence[_Changed], routes: Sequence[cascades.Route]) -> Iterator[str]:
    by_label = {route.label: route for route in routes}
    for one in changes:
        label, n = one.version.label, one.rate.n
        line = f"{label} changes {spelled(one.rate.scaled(100.0), '%')} of the answers, n {n}"
        if one.changed.any():
            held = spelled(_fifth(one).scaled(100.0), "%")
            line += f"; the fifth that the original was least sure of holds {held} of them"
        yield f"{line}."
        if label in by_label:
            yield cascades.said(by_label[label])


def _claims(
    changes: Sequence[_Changed], rankings: Mapping[str, foretold.Ranking], tokens: Mapping[str, foretold.TokenRanking]
) -> Iterator[Claim]:
    """The paper's statements and this project's checks on every candidate, judged together."""
    told: list[tuple[str, str]] = []
    measured: list[Measured] = []

    def ask(source: str, claim: str, interval: Interval, found: str, among: int = 1) -> None:
        kind: hypotheses.Kind = "below" if "closer" in claim else "above"
        measured.append(Measured(Hypothesis(claim, claim, kind), interval, among))
        told.append((source, found))

    for one in changes:
        label, total, n = one.version.label, int(one.changed.sum()), len(one.changed)
        if label in rankings:
            worst = rankings[label].worst
            ask(_PAPER, f"{label}: the margin foretells changed answers best of four uncertainties", worst.interval,
                f"AUC beyond that of {worst.score} {spelled(worst.interval, signed=True)}, n {worst.interval.n}",
                among=len(dis.SCORES) - 1)  # fmt: skip
        if label in tokens:
            ahead = tokens[label].beside_entropy
            ask(_PAPER, f"{label}: so it does for tokens, beside entropy", ahead,
                f"AUC beyond that of entropy {spelled(ahead, signed=True)}, n {ahead.n}")  # fmt: skip
        if not 0 < total < n:
            continue
        closer = contrast(one.margin, one.changed, ~one.changed, one.part.reference.cluster)
        ask(_PAPER, f"{label}: changed answers have closer first and second probabilities", closer,
            f"margin of changed less unchanged {spelled(closer, signed=True)}, {total} changed of {n}")  # fmt: skip
        rate, more = _enriched(one)
        ask("acceptance A7.3", f"{label}: the least sure fifth changes {_TIMES:g} times as often as all, or more", more,
            f"{rate.estimate / one.changed.mean():.2g} times; beyond {_TIMES:g} times "
            f"{spelled(more.scaled(100.0), 'pp', signed=True)}, {total} changed of {n}")  # fmt: skip
        if _FOUR_BITS[0] <= one.version.about.bits_per_weight <= _FOUR_BITS[1] and _clusters(one) >= 2:
            removed = _undone(one)
            ask("acceptance A13.3",
                f"{label}: the original on the {100 * _ESCALATED:.0f} % that are least sure undoes "
                f"{100 * _REMOVED:.0f} % of the changes or more",
                beyond(removed, _REMOVED), f"{spelled(removed.scaled(100.0), '%')} of {total}")  # fmt: skip
    for (source, found), judged in zip(told, hypotheses.judge(measured), strict=True):
        yield Claim(source, judged.hypothesis.claim, found, judged.verdict)


def _undone(one: _Changed) -> Interval:
    """Share of the changes among the tenth of the questions that the candidate itself was least sure of."""
    group = quantile_group(-dis.margin(one.part.candidate.p), round(1 / _ESCALATED))
    hit, changed = (rows.astype(np.float64) for rows in ((group == 0) & one.changed, one.changed))
    return cluster_ratio(hit, changed, one.part.reference.cluster)


def _clusters(one: _Changed) -> int:
    return len(np.unique(one.part.reference.cluster[one.changed]))
