"""What a sweep over a family says beyond its rows: which precision is best for a budget, and how few bits will do.

    envelope              loss against stored bytes: the best precision at each budget, with its chance of being best
    scale_or_precision    at equal bytes, the larger model in fewer bits or the smaller one in more
    recommend             the fewest bits for weights, activations or cache within a loss of 2, 5 or 10 %

Losses come with standard errors, and errors of different cells are taken to be independent: they share a text, so a
paired comparison of two cells (``lowbit compare``) is sharper. After arXiv:2212.09720 (total bits), arXiv:2405.03146
(scale and precision) and arXiv:2402.18158 (loss budgets).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

from lowbit.errors import StudyError
from lowbit.evaluation.statistics import Interval, p_value, paired_mean

DRAWS = 4000
ALPHA = 0.05
BUDGETS = (0.02, 0.05, 0.10)


class Point(NamedTuple):
    """One low-bit version of one model of a family."""

    model: str
    parameters: int
    precision: str
    """What the versions of one curve share, such as ``int4-g64``."""
    nbytes: int
    """Everything stored, scales included."""
    loss: float
    """In nats a token, or any unit in which less is better."""
    se: float


class Best(NamedTuple):
    """What to choose for a budget of bytes."""

    nbytes: int
    precision: str
    loss: float
    low: float
    high: float
    chance: float
    """That this precision is the best one at this budget, given the errors of the losses."""
    rivals: tuple[str, ...]
    """Others with a chance above 5 %, the likeliest first."""


def envelope(points: Sequence[Point], budgets: Sequence[int] | None = None, *, seed: int = 0) -> list[Best]:
    """The best precision at every budget of bytes (by default the size of every point that two curves span).

    A precision's curve runs through its models, loss linear in log bytes between them; outside of its models it says
    nothing. Raises StudyError where no budget is spanned by two.
    """
    curves = _curves(points)
    spans = {p: (c[0].nbytes, c[-1].nbytes) for p, c in curves.items()}
    if budgets is None:
        budgets = sorted({p.nbytes for p in points})
    rng, found = np.random.default_rng(seed), []
    for budget in budgets:
        here = {p: _at(c, budget) for p, c in curves.items() if spans[p][0] <= budget <= spans[p][1]}
        if len(here) < 2:
            continue
        names = list(here)
        loss, se = (np.array([here[name][i] for name in names]) for i in (0, 1))
        wins = np.bincount(np.argmin(loss + se * rng.normal(size=(DRAWS, len(names))), axis=1), minlength=len(names))
        order = np.argsort(-wins, kind="stable")
        i = int(np.argmin(loss))
        half = float(special.ndtri(0.975)) * float(se[i])
        rivals = tuple(names[k] for k in order if k != i and wins[k] / DRAWS > ALPHA)
        found.append(
            Best(budget, names[i], float(loss[i]), float(loss[i]) - half, float(loss[i]) + half,
                 float(wins[i]) / DRAWS, rivals)
        )  # fmt: skip
    if not found:
        raise StudyError(
            "no two precisions span one size", where="envelope", why="there is nothing to choose between",
            fix="two models at least, in precisions whose sizes overlap",
        )  # fmt: skip
    return found


class Matched(NamedTuple):
    """A larger model beside the best version of the next smaller one that takes no more bytes."""

    larger: Point
    smaller: Point
    difference: Interval
    """Loss of the larger less that of the smaller."""
    verdict: Literal["larger", "smaller", "undecided"]


def scale_or_precision(points: Sequence[Point]) -> list[Matched]:
    """Every version of every model beside the best version of the next smaller model within its bytes.

    Only measured points are compared. Verdicts are at 5 % each, on both sides.
    """
    models = sorted({(p.parameters, p.model) for p in points})
    found = []
    for (_, small), (_, large) in itertools.pairwise(models):
        for big in (p for p in points if p.model == large):
            rivals = [p for p in points if p.model == small and p.nbytes <= big.nbytes]
            if not rivals:
                continue
            rival = min(rivals, key=lambda p: p.loss)
            gap, se = big.loss - rival.loss, math.hypot(big.se, rival.se)
            half = float(special.ndtri(0.975)) * se
            difference = Interval(gap, gap - half, gap + half, se, 2, 2, "normal, two losses")
            verdict: Literal["larger", "smaller", "undecided"] = "undecided"
            if difference.high < 0 or difference.low > 0:
                verdict = "larger" if gap < 0 else "smaller"
            found.append(Matched(big, rival, difference, verdict))
    return found


class Relative(NamedTuple):
    """The share of its 16-bit score that one model loses: 0.02 for a score that falls from 50 to 49."""

    what: Literal["W", "WA", "KV"]
    """What is low-bit: weights, weights and activations, or keys and values."""
    bits: float
    model: str
    loss: float


class Recommendation(NamedTuple):
    """The fewest bits for a loss budget."""

    what: Literal["W", "WA", "KV"]
    budget: float
    bits: float | None
    """The fewest whose mean loss is *shown* to stay within; None where no width is."""
    loss: Interval | None
    """Mean over models at those bits."""
    hopeful: float | None
    """Fewer bits whose mean is within the budget, but whose error reaches beyond it; None where there are none."""


def recommend(rows: Sequence[Relative], budgets: Sequence[float] = BUDGETS) -> list[Recommendation]:
    """For weights, weights and activations, and cache: the fewest bits whose mean loss over models is within budget.

    Shown means that a one-sided t test over models rejects a mean at the budget or above, at 5 %; a width counts only
    if all larger ones that were measured pass as well (a fixed sequence of tests, which needs no adjustment). Raises
    StudyError for a width with a single model: one model says nothing about the next.
    """
    found = []
    for what in ("W", "WA", "KV"):
        widths = sorted({r.bits for r in rows if r.what == what}, reverse=True)
        means = {bits: _mean([r for r in rows if r.what == what and r.bits == bits]) for bits in widths}
        for budget in budgets if widths else ():
            shown: float | None = None
            for bits in widths:
                if p_value(means[bits], budget, "less") >= ALPHA:
                    break
                shown = bits
            hopeful = [b for b in widths if means[b].estimate <= budget and (shown is None or b < shown)]
            found.append(
                Recommendation(what, budget, shown, None if shown is None else means[shown], min(hopeful, default=None))
            )
    return found


def _mean(rows: list[Relative]) -> Interval:
    by_model = {r.model: r.loss for r in rows}
    if len(by_model) < 2:
        raise StudyError(
            f"{rows[0].what}{rows[0].bits:g} was measured on one model", where="recommend",
            why="no error over models can be told from one", fix="two models at least, better ten",
        )  # fmt: skip
    if len(by_model) != len(rows):
        raise StudyError(f"{rows[0].what}{rows[0].bits:g} has two rows for one model", where="recommend")
    return paired_mean(np.array(list(by_model.values())), np.arange(len(by_model)))


def _curves(points: Sequence[Point]) -> dict[str, list[Point]]:
    curves: dict[str, list[Point]] = {}
    for p in sorted(points, key=lambda p: p.nbytes):
        curves.setdefault(p.precision, []).append(p)
    return curves


def _at(curve: list[Point], nbytes: int) -> tuple[float, float]:
    """Loss and its error at a size within the curve."""
    right = next(i for i, p in enumerate(curve) if p.nbytes >= nbytes)
    b = curve[right]
    if b.nbytes == nbytes:
        return b.loss, b.se
    a = curve[right - 1]
    t = (math.log(nbytes) - math.log(a.nbytes)) / (math.log(b.nbytes) - math.log(a.nbytes))
    return (1 - t) * a.loss + t * b.loss, math.hypot((1 - t) * a.se, t * b.se)
