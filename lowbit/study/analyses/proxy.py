"""How far perplexity foretells each task over the versions of a model, and where it does not (arXiv:2402.16775)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from lowbit.evaluation.correlation import LEAST, WEAK, Correlation, mean_foretold, p_weak, proxy
from lowbit.evaluation.statistics import holm
from lowbit.evaluation.task_findings import TaskFinding
from lowbit.report import text
from lowbit.report.panel import Claim, Curves, Mark, Panel, Titled, Verdict
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.view import Model, View

SOURCE = "arXiv:2402.16775"
ALPHA = 0.05


class Sweep(NamedTuple):
    """Log-perplexity and every task's score over the versions of one model, the original among them."""

    versions: tuple[str, ...]
    log_perplexity: Float[np.ndarray, " versions"]
    scores: Mapping[str, Float[np.ndarray, " versions"]]
    """By task, in the task's unit, its first measure; the higher the better where it has a direction."""
    ceiling: Mapping[str, float]
    """By task: the largest |r| that scores of so few items leave room for."""
    items: Mapping[str, int]


def panels(view: View) -> list[Panel]:
    """A panel a model that was asked tasks in four versions or more."""
    found = []
    for index, model in enumerate(view.models):
        sweep = _sweep(model)
        if sweep is not None and len(sweep.versions) >= LEAST and sweep.scores:
            found.append(of_sweep(sweep, view.titled("Perplexity as a proxy", model), f"proxy-{index}"))
    return found


def of_sweep(sweep: Sweep, title: str = "Perplexity as a proxy", key: str = "proxy") -> Panel:
    """What the scores of one model's versions say."""
    rows = proxy(sweep.log_perplexity, sweep.scores)
    good = [c.task for c in rows if not c.warning]
    deaf = [c.task for c in rows if c.warning and sweep.ceiling[c.task] < WEAK]
    lead = [
        f"{len(sweep.versions)} versions, {len(rows)} tasks. Perplexity foretells {len(good)} of them"
        f"{': ' + ', '.join(good) if good else ''}.",
    ]
    if deaf:
        lead.append(f"Too few items to be foretold by anything: {', '.join(deaf)}; claims are judged without them.")
    if len(sweep.versions) < 12:
        lead.append("Fewer than twelve versions: intervals are wide, and a warning may say no more than that.")
    return Panel(
        key, title, tuple(lead), tuple(_claims(sweep, rows)), (_table(sweep, rows),), (_scatter(sweep),), _notes(sweep)
    )


def _sweep(model: Model) -> Sweep | None:
    """Of the versions that have answered every task; None before any has."""
    versions: list[str] = []
    loss: list[float] = []
    told: dict[str, list[TaskFinding]] = {}
    reference = model.tokens(model.grid.reference)
    if reference is None or model.grid.tasks is None:
        return None
    first = {c.task.name: c.task.measures[0].name for c in model.grid.tasks.tasks if c.task.measures}
    for entry, candidate in model.candidates():
        tokens = model.tokens(entry.score)
        mine = {f.task: f for f in candidate.task_findings if first.get(f.task) == f.measure}
        if tokens is None or not mine or (told and mine.keys() != told.keys()):
            continue
        versions.append(entry.label)
        loss.append(float(tokens.nll.astype(np.float64).mean()))
        for task, finding in mine.items():
            told.setdefault(task, []).append(finding)
    if not versions:
        return None
    scores = {task: _scores(found) for task, found in told.items()}
    return Sweep(
        ("16 bit", *versions), np.array([float(reference.nll.astype(np.float64).mean()), *loss]), scores,
        {task: ceiling(found) for task, found in told.items()}, {task: found[0].n for task, found in told.items()},
    )  # fmt: skip


def _scores(found: Sequence[TaskFinding]) -> Float[np.ndarray, " versions"]:
    """The original's, then the versions'; the sign turned where lower is better."""
    values = np.array([found[0].reference, *(f.candidate for f in found)])
    return -values if found[0].better == "lower" else values


def ceiling(found: Sequence[TaskFinding]) -> float:
    """The square root of the share of the spread of differences that is not the error of their items."""
    spread = float(np.var([f.delta for f in found], ddof=1)) if len(found) > 1 else 0.0
    if spread == 0:
        return 0.0
    error = np.mean([((f.high - f.low) / 2 / special.stdtrit(max(f.clusters - 1, 1), 0.975)) ** 2 for f in found])
    return math.sqrt(max(0.0, 1 - float(error) / spread))


def _claims(sweep: Sweep, rows: Sequence[Correlation]) -> Iterable[Claim]:
    """Over the tasks whose items leave room for a correlation: noise that nothing foretells speaks for nobody."""
    usable = [c for c in rows if math.isfinite(c.pearson.estimate) and sweep.ceiling[c.task] >= WEAK]
    if not usable:
        return
    n = f"{len(sweep.versions)} versions, {len(usable)} tasks"
    mean = mean_foretold(sweep.log_perplexity, {c.task: sweep.scores[c.task] for c in usable})
    verdict: Verdict = "supported" if mean.low > WEAK else "contradicted" if mean.high < WEAK else "undecided"
    found = f"Mean of -r {' '.join(text.estimate(*mean[:3]))}; {n}, drawn anew {mean.method}."
    yield Claim(SOURCE, f"Perplexity foretells scores: over tasks the mean of -r is above {WEAK:g} (0.79 there, 3 and "
                "4 bits).", found, verdict)  # fmt: skip
    below = dict(zip([c.task for c in usable], holm([p_weak(c) for c in usable]), strict=True))
    above = [p_weak(c, shown=True) for c in usable]
    weak = [task for task, p in below.items() if p < ALPHA]
    all_strong = max(above) < ALPHA  # all of them: no adjustment
    verdict = "supported" if weak else "contradicted" if all_strong else "undecided"
    least = usable[0]
    told = (
        f"Shown to be below: {', '.join(weak) or 'none'} (Holm over {len(usable)}). Weakest: {least.task}, r "
        + " ".join(text.estimate(*least.pearson[:3], signed=True))
    )
    yield Claim(SOURCE, f"Not of every task: some have |r| below {WEAK:g}.", f"{told}; {n}.", verdict)


def _table(sweep: Sweep, rows: Sequence[Correlation]) -> Titled:
    columns = (Column("Task", numeric=False), Column("r", "with log-perplexity, 95 %"), Column("Rank correlation"),
               Column("Room", "largest |r| that its items allow"), Column("Items"), Column("Spread", "of scores"),
               Column("Warning", numeric=False))  # fmt: skip
    drawn = []
    for c in rows:
        r = Cell(text.MISSING) if math.isnan(c.pearson.estimate) else Cell(*text.estimate(*c.pearson[:3], signed=True))
        room, values = sweep.ceiling.get(c.task, math.nan), sweep.scores[c.task]
        ends = f"{text.number(float(values.min()))} to {text.number(float(values.max()))}"
        rank = Cell(text.number(c.spearman, signed=True))
        what, _, more = c.warning.partition(": ")
        if what and room < WEAK:
            more = f"{more}; its {sweep.items[c.task]:,} items are too few to be foretold by anything".removeprefix(
                "; "
            )
        drawn.append(Row((Cell(c.task), r, rank, Cell(text.number(room)), Cell(f"{sweep.items[c.task]:,}"),
                          Cell(ends), Cell(what or text.MISSING, more)), verdict="worse" if what else ""))  # fmt: skip
    return Titled("Log-perplexity against each task", Table(columns, tuple(drawn)))


def _scatter(sweep: Sweep) -> Curves:
    marks = tuple(
        Mark(task, float(x), float(y), float(y), float(y), version)
        for task, scores in sweep.scores.items()
        for version, x, y in zip(sweep.versions, sweep.log_perplexity, scores, strict=True)
    )
    return Curves(
        "scatter", "Scores against log-perplexity", "A mark a version; what perplexity foretells falls from left to "
        "right.", "log-perplexity, nats a token", "score", marks, lines=False,
    )  # fmt: skip


def _notes(sweep: Sweep) -> tuple[str, ...]:
    return (
        f"Of a task its first measure counts, of the original and {len(sweep.versions) - 1} versions of it; turned "
        "where lower is better. r is Pearson's with Fisher's interval; it describes versions like these, which were "
        "not drawn at random: a single ruined version can make any r.",
        "Room: scores of few items move by chance, and chance is not foretold. It is the root of the share of their "
        "variance that is not the paired error of the items.",
    )
