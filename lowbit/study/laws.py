"""What a sweep over a family says beyond its rows: which precision is best for a budget, and how few bits will do.

    envelope              loss against stored bytes: the best precision at each budget, with its chance of being best
    equal_bytes           two precisions at the same size, between models where none has it
    scale_or_precision    the larger model in fewer bits, or the smaller one in more, measured versions only
    recommend             the fewest bits for weights, activations or cache within a loss of 2, 5 or 10 %

Where all versions were scored on the same tokens (``losses.Shared``), every difference is paired token by token and
every chance comes from drawing the text's clusters anew; without that, errors of different versions are taken to be
independent, which is blunter. Either way they are errors of the text: a family trained again from other seeds would
differ by more. After arXiv:2212.09720 (total bits), arXiv:2405.03146 (scale and precision) and arXiv:2402.18158 (loss
budgets).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from lowbit.errors import StudyError
from lowbit.evaluation.statistics import Interval, holm, p_value, paired_mean
from lowbit.study.losses import Apart, Losses

DRAWS = 4000
ALPHA = 0.05
BUDGETS = (0.02, 0.05, 0.10)
SIZES = 12  # at which two curves are compared

Weights = Float[np.ndarray, " versions"]
What = Literal["W", "WA", "KV"]


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
    chances: tuple[tuple[str, float], ...] = ()
    """Of every precision that has one, the likeliest first."""


def envelope(
    points: Sequence[Point], budgets: Sequence[int] | None = None, *, losses: Losses | None = None, seed: int = 0
) -> list[Best]:
    """The best precision at every budget of bytes (by default the size of every point that two curves span).

    A precision's curve runs through its models, loss linear in log bytes between them; outside of its models it says
    nothing. ``losses`` are those of ``points``, in their order. Raises StudyError where no budget is spanned by two.
    """
    held = losses or _apart(points)
    drawn, names = held.drawn(DRAWS, seed), list(dict.fromkeys(p.precision for p in points))
    found = []
    for budget in sorted({p.nbytes for p in points}) if budgets is None else budgets:
        here = {name: w for name in names if (w := at(points, name, budget)) is not None}
        if len(here) < 2:
            continue
        spanning = list(here)
        curves = np.array([here[name] for name in spanning])
        wins = np.bincount(np.argmin(drawn @ curves.T, axis=1), minlength=len(here)) / DRAWS
        values = [held.weighted(w) for w in curves]
        i = min(range(len(values)), key=lambda k: values[k].estimate)
        order = [int(k) for k in np.argsort(-wins, kind="stable") if wins[k]]
        found.append(
            Best(budget, spanning[i], *values[i][:3], float(wins[i]),
                 tuple(spanning[k] for k in order if k != i and wins[k] > ALPHA),
                 tuple((spanning[k], float(wins[k])) for k in order))
        )  # fmt: skip
    if not found:
        raise StudyError(
            "no two precisions span one size", where="envelope", why="there is nothing to choose between",
            fix="two models at least, in precisions whose sizes overlap",
        )  # fmt: skip
    return found


def at(points: Sequence[Point], precision: str, nbytes: int | float) -> Weights | None:
    """How much each point counts in a precision's loss at a size, or None outside of its models."""
    curve = sorted((p.nbytes, i) for i, p in enumerate(points) if p.precision == precision)
    right = next((k for k, (size, _) in enumerate(curve) if size >= nbytes), None)
    if right is None or nbytes < curve[0][0]:
        return None
    weights = np.zeros(len(points))
    size, b = curve[right]
    if size == nbytes:
        weights[b] = 1
        return weights
    smaller, a = curve[right - 1]
    t = (math.log(nbytes) - math.log(smaller)) / (math.log(size) - math.log(smaller))
    weights[a], weights[b] = 1 - t, t
    return weights


def equal_bytes(points: Sequence[Point], one: str, other: str, losses: Losses) -> Interval | None:
    """Loss of one precision less that of another at the same bytes, the mean over log sizes that both span.

    None where they span no size together.
    """
    sizes = [[p.nbytes for p in points if p.precision == name] for name in (one, other)]
    if not all(sizes):
        return None
    low, high = max(map(min, sizes)), min(map(max, sizes))
    if low > high:
        return None
    # ends as they are: a size that rounding puts outside would be spanned by none
    inner = np.exp(np.linspace(math.log(low), math.log(high), SIZES))[1:-1].tolist() if low < high else []
    gaps = []
    for size in [float(low), *inner, float(high)]:
        a, b = at(points, one, size), at(points, other, size)
        if a is not None and b is not None:
            gaps.append(a - b)
    return losses.weighted(np.mean(gaps, axis=0))


class Matched(NamedTuple):
    """A larger model beside the best version of the next smaller one that takes no more bytes."""

    larger: Point
    smaller: Point
    difference: Interval
    """Loss of the larger less that of the smaller, as if that one had been chosen beforehand."""
    verdict: Literal["larger", "smaller", "undecided"]
    p: float = 1.0
    """Of the verdict, two-sided, adjusted over all rows (Holm)."""
    rivals: int = 1
    """Versions of the smaller model within the bytes."""


def scale_or_precision(points: Sequence[Point], losses: Losses | None = None) -> list[Matched]:
    """Every version of every model beside the best version of the next smaller model within its bytes.

    Only measured points are compared. ``larger``: shown to be better than *every* version of the smaller model within
    its bytes, which needs no adjustment (an intersection-union test); ``smaller``: shown to be worse than some, times
    their number (Bonferroni), for the best one is found by looking at all. Holm's rule holds the chance of any false
    verdict in the table below 5 %.
    """
    held = losses or _apart(points)
    models = sorted({(p.parameters, p.model) for p in points})
    found: list[tuple[Matched, bool]] = []
    for (_, small), (_, large) in itertools.pairwise(models):
        for big in (i for i, p in enumerate(points) if p.model == large):
            rivals = [i for i, p in enumerate(points) if p.model == small and p.nbytes <= points[big].nbytes]
            if not rivals:
                continue
            gaps = {i: held.weighted(_difference(len(points), big, i)) for i in rivals}
            wins = max(p_value(gap, side="less") for gap in gaps.values())
            loses = min(1.0, len(rivals) * min(p_value(gap, side="greater") for gap in gaps.values()))
            best = max(gaps, key=lambda i: gaps[i].estimate)
            row = Matched(points[big], points[best], gaps[best], "undecided", min(1.0, 2 * min(wins, loses)),
                          len(rivals))  # fmt: skip
            found.append((row, wins < loses))
    adjusted = holm([row.p for row, _ in found])
    return [
        row._replace(p=p, verdict="undecided" if p >= ALPHA else "larger" if ahead else "smaller")
        for (row, ahead), p in zip(found, adjusted, strict=True)
    ]


class Relative(NamedTuple):
    """The share of its 16-bit score that one model loses: 0.02 for a score that falls from 50 to 49."""

    what: What
    """What is low-bit: weights, weights and activations, or keys and values."""
    bits: float
    model: str
    loss: float
    name: str = ""
    """Where the bits alone do not say it: W4A8 has 6 in the mean."""


class Recommendation(NamedTuple):
    """The fewest bits for a loss budget."""

    what: What
    budget: float
    bits: float | None
    """The fewest whose mean loss is *shown* to stay within; None where no width is."""
    loss: Interval | None
    """Mean over models at those bits."""
    hopeful: float | None
    """Fewer bits whose mean is within the budget, but whose error reaches beyond it; None where there are none."""
    name: str = ""
    """Of the recommended width."""
    hopeful_name: str = ""


def recommend(rows: Sequence[Relative], budgets: Sequence[float] = BUDGETS) -> list[Recommendation]:
    """For weights, weights and activations, and cache: the fewest bits whose mean loss over models is within budget.

    Shown means that a one-sided t test over models rejects a mean at the budget or above, at 5 %; a width counts only
    if all larger ones that were measured pass as well (a fixed sequence of tests, which needs no adjustment). Raises
    StudyError for a width with a single model: one model says nothing about the next.
    """
    found = []
    for what in dict.fromkeys(r.what for r in sorted(rows, key=lambda r: ("W", "WA", "KV").index(r.what))):
        widths = {(float(r.bits), r.name) for r in rows if r.what == what}
        means = {w: _mean([r for r in rows if (r.what, r.bits, r.name) == (what, *w)]) for w in widths}
        found += fewest(what, means, budgets)
    return found


def fewest(
    what: What, losses: Mapping[tuple[float, str], Interval], budgets: Sequence[float] = BUDGETS
) -> list[Recommendation]:
    """The same from a loss with its interval for each width (bits, name), whatever that interval is over."""
    widths = sorted(losses, reverse=True)
    found = []
    for budget in budgets:
        passing = itertools.takewhile(lambda w: p_value(losses[w], budget, "less") < ALPHA, widths)  # noqa: B023
        shown = next(iter(list(passing)[::-1]), None)
        hopeful = [w for w in widths if losses[w].estimate <= budget and (shown is None or w < shown)]
        least = min(hopeful, default=(None, ""))
        bits, name = shown or (None, "")
        interval = None if shown is None else losses[shown]
        found.append(Recommendation(what, budget, bits, interval, least[0], name, least[1]))
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


def _apart(points: Sequence[Point]) -> Apart:
    return Apart(np.array([p.loss for p in points], float), np.array([p.se for p in points], float))


def _difference(n: int, plus: int, minus: int) -> Weights:
    weights = np.zeros(n)
    weights[plus], weights[minus] = 1, -1
    return weights
