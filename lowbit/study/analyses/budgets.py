"""The fewest bits for weights, for weights and activations, and for the cache within a loss of 2, 5 and 10 %
(arXiv:2402.18158).

Loss is a share of what the 16-bit model has: of the probability that it gives a token of the text (the geometric mean,
one over the perplexity), and of its score on the tasks that it can do at all. A width is recommended where its loss is
*shown* to be within the budget.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from lowbit.evaluation.hypotheses import Hypothesis, Measured, judge, worst
from lowbit.evaluation.metrics.items import Items
from lowbit.evaluation.statistics import Interval, cluster_ratio, p_value, paired_mean
from lowbit.pipeline.recipe import Recipe
from lowbit.report import text
from lowbit.report.panel import Claim, Curves, Mark, Panel, Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study import laws
from lowbit.study.family import Form, form
from lowbit.study.laws import ALPHA, BUDGETS, Recommendation, Relative, What
from lowbit.study.view import Model, View

SOURCE = "arXiv:2402.18158"
WORDS: Mapping[What, str] = {"W": "weights", "WA": "weights and activations", "KV": "keys and values"}
TEXT, TASKS = "text", "tasks"
FLOOR = 0.1  # percent: no logarithm goes to 0


class Lost(NamedTuple):
    """What one version of one model loses of what the original has."""

    model: str
    form: Form
    label: str
    basis: str
    """``text`` or ``tasks``."""
    loss: Interval
    over: str
    """What it is a mean over, in words."""


def panels(view: View) -> list[Panel]:
    """One panel over all models; none before a version of one kind is scored."""
    found: list[Lost] = []
    left: list[str] = []
    for model in view.models:
        chosen, weak = _of_model(model)
        found += chosen
        left += weak
    return of_losses(found, left)


def of_losses(found: Sequence[Lost], left: Sequence[str] = ()) -> list[Panel]:
    """From losses; ``left`` names tasks that were left out."""
    found = _plainest(found)
    if not found:
        return []
    models = list(dict.fromkeys(lost.model for lost in found))
    alone = {(basis, model): _alone(found, basis, model) for basis in (TEXT, TASKS) for model in models}
    over = {basis: _over_models(found, basis) for basis in (TEXT, TASKS)}
    tables = [_recommended(over, alone), _losses(found)]
    return [
        Panel(
            "budgets", "How few bits a loss budget allows",
            tuple(_sentences(over, alone, models)), tuple(_claims(found)),
            tuple(t for t in tables if t.table.rows), tuple(_figures(found)), _notes(models, left),
        )
    ]  # fmt: skip


def _of_model(model: Model) -> tuple[list[Lost], list[str]]:
    """Losses of a model's versions, and the tasks that say nothing because the original cannot do them."""
    pairs: dict[str, list[tuple[str, Items, Items]]] = defaultdict(list)
    weak: set[str] = set()
    for pair in model.pairs():
        if pair.task.task.kind == "dialogue":
            continue
        if able(pair.reference):
            pairs[pair.label].append((pair.task.task.name, pair.reference, pair.candidate))
        else:
            weak.add(f"{pair.task.task.name} of {model.name}")
    found = []
    for entry, _ in model.candidates():
        if entry.make is None:
            continue
        made = form(Recipe.model_validate(entry.make.params["recipe"]))
        if made.kind == "":
            continue
        tokens = model.tokens(entry.score)
        if tokens is not None:
            change = paired_mean((tokens.nll - tokens.nll_ref).astype(np.float64), tokens.cluster)
            over = f"{change.n:,} tokens in {change.clusters} clusters"
            found.append(Lost(model.name, made, entry.label, TEXT, of_nats(change), over))
        if pairs[entry.label]:
            lost = [_ratio(base, after) for _, base, after in pairs[entry.label]]
            over = f"{len(lost)} tasks of {sum(i.n for i in lost):,} items"
            found.append(Lost(model.name, made, entry.label, TASKS, mean(lost), over))
    return found, sorted(weak)


def able(items: Items) -> bool:
    """Whether a model's score is shown to lie above chance, at 5 %: a task it cannot do has nothing to lose."""
    counts = np.diff(items.starts)
    chance = np.where(counts >= 2, 1 / np.maximum(counts, 1), 0.0)
    if len(np.unique(items.cluster)) < 2:
        return False
    above = paired_mean(items.score.astype(np.float64) - chance, items.cluster)
    return above.estimate > 0 and p_value(above, side="greater") < ALPHA


def of_nats(change: Interval) -> Interval:
    """The share of a token's probability that a rise of log-perplexity takes: 1 - exp(-change)."""
    value, low, high = (1 - math.exp(-x) for x in change[:3])
    return change._replace(estimate=value, low=low, high=high, se=change.se * (1 - value))


def _ratio(base: Items, after: Items) -> Interval:
    """The share of the original's score that is lost."""
    before = base.score.astype(np.float64)
    return cluster_ratio(before - after.score, before, base.cluster)


def mean(parts: Sequence[Interval]) -> Interval:
    """Of independent tasks; Student's t with the degrees of freedom of the one of the fewest clusters."""
    value = sum(i.estimate for i in parts) / len(parts)
    se = math.sqrt(sum(i.se**2 for i in parts)) / len(parts)
    clusters = min(i.clusters for i in parts)
    half = float(special.stdtrit(clusters - 1, 0.975)) * se
    return Interval(value, value - half, value + half, se, sum(i.n for i in parts), clusters, "mean over tasks")


def _plainest(found: Sequence[Lost]) -> list[Lost]:
    """One version a model, kind and width: the first that the study names."""
    kept: dict[tuple[str, str, str], Lost] = {}
    for lost in found:
        kept.setdefault((lost.model, lost.form.name, lost.basis), lost)
    return list(kept.values())


def _bits(made: Form) -> float:
    """What widths of one kind are ordered by: the mean of weights' and inputs' where both are low."""
    return {"W": made.weights, "WA": (made.weights + made.inputs) / 2, "KV": made.cache}[made.kind]


def _alone(found: Sequence[Lost], basis: str, model: str) -> list[Recommendation]:
    """For one model: errors are those of its text or items."""
    chosen = []
    for what in WORDS:
        mine = [x for x in found if (x.basis, x.model, x.form.kind) == (basis, model, what)]
        chosen += laws.fewest(what, {(_bits(x.form), x.form.name): x.loss for x in mine}) if mine else []
    return chosen


def _over_models(found: Sequence[Lost], basis: str) -> list[Recommendation]:
    """Over the models as a sample of such models; widths that a single one was measured of are left out."""
    rows = [
        Relative(x.form.kind, _bits(x.form), x.model, x.loss.estimate, x.form.name)  # type: ignore[arg-type]
        for x in found if x.basis == basis
    ]  # fmt: skip
    several = {r.name for r in rows if len({s.model for s in rows if s.name == r.name}) > 1}
    return laws.recommend([r for r in rows if r.name in several])


def _sentences(
    over: Mapping[str, Sequence[Recommendation]], alone: Mapping[tuple[str, str], Sequence[Recommendation]],
    models: Sequence[str],
) -> Iterable[str]:  # fmt: skip
    for what, words in WORDS.items():
        for budget in (BUDGETS[1],):
            mine = [r for r in over[TEXT] if (r.what, r.budget) == (what, budget)]
            for r in mine:
                each = [
                    f"{model} {q.name or 'none'}"
                    for model in models
                    for q in alone[TEXT, model]
                    if (q.what, q.budget) == (what, budget)
                ]
                shown = "no width is shown to do" if r.bits is None else f"{r.name} is the least that is shown to do"
                yield (
                    f"For {words} within {100 * budget:g} % of a token's probability, over {len(models)} models {shown}"
                    f"; for each by itself: {', '.join(each)}."
                )


def _claims(found: Sequence[Lost]) -> Iterable[Claim]:
    """The paper's guidance, each against the mean over the models here; adjusted together."""
    asked: dict[str, tuple[Measured, str]] = {}
    for names, budget in ((("W8", "W8A8", "KV8"), 0.02), (("W4", "W4A8", "KV4"), 0.05)):
        for basis, about in ((TEXT, "a token's probability"), (TASKS, "the score on tasks")):
            losses: dict[str, Interval] = {}
            for name in names:
                mine = [x.loss.estimate for x in found if (x.form.name, x.basis) == (name, basis)]
                if len(mine) > 1:
                    losses[name] = paired_mean(np.array(mine), np.arange(len(mine)))
            if losses:
                claim = f"{', '.join(losses)} lose at most {100 * budget:g} % of {about}."
                told = "; ".join(f"{name} {_percent(i)} of {i.n} models" for name, i in losses.items())
                beyond = [i._replace(estimate=i.estimate - budget) for i in losses.values()]
                measured = Measured(Hypothesis(claim, claim, "below"), worst(beyond, "below"), len(beyond))
                asked[claim] = measured, f"Lost, mean over models: {told}."
    for judged in judge([measured for measured, _ in asked.values()]):
        yield Claim(SOURCE, judged.hypothesis.claim, asked[judged.hypothesis.claim][1], judged.verdict)


def _percent(i: Interval) -> str:
    value, interval = text.estimate(100 * i.estimate, 100 * i.low, 100 * i.high)
    return f"{value} % {interval}".strip()


def _recommended(
    over: Mapping[str, Sequence[Recommendation]], alone: Mapping[tuple[str, str], Sequence[Recommendation]]
) -> Titled:
    columns = (Column("Low-bit", numeric=False), Column("Models", numeric=False), Column("Loss of", numeric=False),
               *(Column(f"Within {100 * b:g} %", "shown", numeric=False) for b in BUDGETS))  # fmt: skip
    rows = []
    for what, words in WORDS.items():
        for basis, about in ((TEXT, "a token's probability"), (TASKS, "scores on tasks")):
            sources = [("all, as a sample", over[basis])]
            sources += [(model, found) for (b, model), found in alone.items() if b == basis]
            for models, found in sources:
                if mine := {r.budget: r for r in found if r.what == what}:
                    cells = [Cell(words), Cell(models), Cell(about)]
                    for b in BUDGETS:
                        hopeful = f"may do: {mine[b].hopeful_name}" if mine[b].hopeful is not None else ""
                        cells.append(Cell(mine[b].name or "none shown", hopeful))
                    rows.append(Row(tuple(cells)))
    return Titled("Fewest bits by loss budget", Table(columns, tuple(rows)))


def _losses(found: Sequence[Lost]) -> Titled:
    columns = (Column("Model", numeric=False), Column("Low-bit", numeric=False), Column("Version", numeric=False),
               Column("Loss of", numeric=False), Column("Lost", "%, 95 %"), Column("Over", numeric=False))  # fmt: skip
    rows = [
        Row((Cell(x.model), Cell(x.form.name), Cell(x.label),
             Cell("a token's probability" if x.basis == TEXT else "scores on tasks"), Cell(_percent(x.loss)),
             Cell(x.over)))
        for x in found
    ]  # fmt: skip
    return Titled("What each version loses", Table(columns, tuple(rows)), folded=True)


def _drawn(loss: float) -> float:
    """In percent, as a logarithmic axis can show it."""
    return max(100 * loss, FLOOR)


def _figures(found: Sequence[Lost]) -> Iterable[Curves]:
    for basis, about in ((TEXT, "of a token's probability"), (TASKS, "of the score on tasks")):
        marks = [
            Mark(f"{x.model}, {x.form.kind}", _bits(x.form), _drawn(x.loss.estimate), _drawn(x.loss.low),
                 _drawn(x.loss.high), f"{x.form.name}, {_percent(x.loss)}")
            for x in sorted(found, key=lambda x: (x.form.kind, x.model, _bits(x.form)))
            if x.basis == basis
        ]  # fmt: skip
        if marks:
            yield Curves(
                basis, f"Share lost {about}", "A line a model and kind; W: weights, WA: weights and inputs, KV: keys "
                f"and values. Levels are the budgets. What is below {FLOOR:g} % is drawn there.",
                "bits (the mean of both for WA)", "% lost", tuple(marks), log_y=True,
                levels=tuple((f"{100 * b:g} %", 100 * b) for b in BUDGETS),
            )  # fmt: skip


def _notes(models: Sequence[str], left: Sequence[str]) -> tuple[str, ...]:
    notes = [
        "Shown: a one-sided test at 5 % rejects a loss of the budget or more, and so it does for every larger width "
        "that was measured. May do: fewer bits whose loss is within the budget, but not shown to be.",
        f"All, as a sample: a t test over {len(models)} models, about models like these; with few models hardly any "
        "width can pass it. A model by itself: errors of its text and items, about that model alone.",
        "Where several versions of a model have one width, the first of the study file counts.",
    ]
    if left:
        notes.append(f"Left out, because the original is not shown to be above chance: {', '.join(left)}.")
    return tuple(notes)
