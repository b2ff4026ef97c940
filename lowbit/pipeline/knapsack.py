"""The multiple-choice knapsack: one choice from every group, the least loss within a budget of bytes. Exact.

Lagrange's relaxation gives a lower bound, a greedy walk along the groups' convex hulls an upper one; a choice whose
reduced cost exceeds the gap between them is in no better solution and is dropped. What is left (few groups with few
choices each) is a dynamic programme over undominated pairs of bytes and loss, groups with the closest choices first
(Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lowbit.errors import RecipeError

_STATES = 1 << 16  # pairs kept at once; beyond, the least promising are dropped, and the gap says so


class Choice(NamedTuple):
    """What one option of a group takes and costs."""

    nbytes: int
    loss: float


class Optimum(NamedTuple):
    """The option chosen in every group. No choice whatever has a loss below ``loss - gap``; 0 is a proven optimum."""

    chosen: list[int]
    nbytes: int
    loss: float
    gap: float


def optimum(groups: Sequence[Sequence[Choice]], budget: int) -> Optimum:
    """The least total loss with at most ``budget`` bytes, one choice a group; of equal losses, the fewest bytes.

    Raises RecipeError, with the smallest bytes that are possible, when the budget cannot be met. Losses are compared
    in float64. Cost: milliseconds for hundreds of groups with a handful of choices.
    """
    least = [min(range(len(g)), key=lambda k: (g[k].nbytes, g[k].loss)) for g in groups]
    best = [min(range(len(g)), key=lambda k: (g[k].loss, g[k].nbytes)) for g in groups]
    if _bytes(groups, least) > budget:
        raise RecipeError(
            f"a budget of {budget:,} bytes cannot be met, the smallest is {_bytes(groups, least):,}",
            fix="a larger budget, or formats with fewer bits",
        )
    if _bytes(groups, best) <= budget:
        return _solution(groups, best, 0.0)
    price, greedy = _relaxed(groups, least, budget)
    return _programme(groups, budget, price, greedy)


def _relaxed(groups: Sequence[Sequence[Choice]], least: list[int], budget: int) -> tuple[float, list[int]]:
    """The best price of a byte in the relaxed problem, and a feasible choice found on the way.

    From the smallest choices, steps along the lower convex hulls in order of loss saved a byte. The price is that of
    the first step that does not fit; later ones that do are still taken.
    """
    steps = sorted(
        ((b.loss - a.loss) / (b.nbytes - a.nbytes), i, j, a.nbytes, b.nbytes)
        for i, group in enumerate(groups)
        for (_, a), (j, b) in itertools.pairwise(_hull(group))
    )
    chosen, used, price = list(least), _bytes(groups, least), 0.0
    stuck: set[int] = set()  # a group whose next step did not fit takes no later one
    for slope, i, j, before, after in steps:
        if i not in stuck and used + after - before <= budget:
            chosen[i], used = j, used + after - before
        else:
            stuck.add(i)
            price = price or -slope
    return price, chosen


def _hull(group: Sequence[Choice]) -> list[tuple[int, Choice]]:
    """The lower convex hull of a group's undominated choices, from the fewest bytes to the least loss."""
    hull: list[tuple[int, Choice]] = []
    for j, c in sorted(enumerate(group), key=lambda entry: entry[1]):
        if hull and c.loss >= hull[-1][1].loss:
            continue
        while len(hull) > 1 and _turn(hull[-2][1], hull[-1][1], c) <= 0:
            hull.pop()
        hull.append((j, c))
    return hull


def _turn(a: Choice, b: Choice, c: Choice) -> float:
    """Positive where ``b`` lies below the line from ``a`` to ``c``."""
    return (c.loss - b.loss) * (b.nbytes - a.nbytes) - (b.loss - a.loss) * (c.nbytes - b.nbytes)


class _Stage(NamedTuple):
    """One group's decision in every state: the state it came from and the option taken."""

    group: int
    parent: Int[np.ndarray, " states"]
    option: Int[np.ndarray, " states"]


def _programme(groups: Sequence[Sequence[Choice]], budget: int, price: float, greedy: list[int]) -> Optimum:
    """The exact optimum among the choices that the relaxation leaves.

    A state stands for a whole solution: groups not yet decided take their option of least ``loss + price * bytes``.
    Its loss is ``bound + cost + price * (budget - bytes)``, where ``cost`` sums what its options lie above the least.
    """
    costs = [np.array([c.loss + price * c.nbytes for c in group]) for group in groups]
    start = [min(range(len(g)), key=lambda k: (cost[k], g[k].nbytes)) for g, cost in zip(groups, costs, strict=True)]
    extra = [cost - cost[k] for cost, k in zip(costs, start, strict=True)]
    sizes = [np.array([c.nbytes - g[k].nbytes for c in g], dtype=np.int64) for g, k in zip(groups, start, strict=True)]
    bound = math.fsum(float(cost[k]) for cost, k in zip(costs, start, strict=True)) - price * budget
    known, found = _loss(groups, greedy), greedy
    slack = 1e-12 * max(abs(bound), abs(known))  # rounding must not drop an optimum

    nearest = [
        min((float(x) for k, x in enumerate(e) if k != s), default=math.inf) for e, s in zip(extra, start, strict=True)
    ]
    order = sorted((i for i in range(len(groups)) if len(groups[i]) > 1), key=lambda i: nearest[i])
    saved = np.append(np.cumsum([int(-sizes[i].min()) for i in order][::-1])[::-1], 0)  # bytes that the rest could save
    used, cost = np.array([_bytes(groups, start)], dtype=np.int64), np.zeros(1)
    stages: list[_Stage] = []
    dropped = math.inf
    for depth, i in enumerate([*order, None]):
        fits = used <= budget
        total = np.where(fits, bound + cost + price * (budget - used), math.inf)
        if total.size and total.min() < known:
            at = int(total.argmin())
            known, found = float(total[at]), _backtrack(stages, at, start)
        if i is None or known - bound <= slack or nearest[i] > known - bound + slack:
            break
        options = np.flatnonzero(extra[i] <= known - bound + slack)
        parent, option = (x.ravel() for x in np.meshgrid(np.arange(used.size), options, indexing="ij"))
        used, cost = used[parent] + sizes[i][option], cost[parent] + extra[i][option]
        keep = np.flatnonzero((cost <= known - bound + slack) & (used - saved[depth + 1] <= budget))
        keep = keep[_undominated(used[keep], cost[keep] - price * used[keep])]
        if keep.size > _STATES:
            promise = np.argsort(cost[keep] + price * np.abs(budget - used[keep]), kind="stable")
            dropped = min(dropped, float(cost[keep[promise[_STATES:]]].min()))
            keep = keep[np.sort(promise[:_STATES])]
        used, cost = used[keep], cost[keep]
        stages.append(_Stage(i, parent[keep], option[keep]))
    return _solution(groups, found, max(0.0, _loss(groups, found) - (bound + dropped)) if dropped < math.inf else 0.0)


def _undominated(used: Int[np.ndarray, " n"], loss: Float[np.ndarray, " n"]) -> Int[np.ndarray, " kept"]:
    """Indices of the pairs that no other one beats in both, in order of bytes."""
    order = np.lexsort((loss, used))
    lowest = np.minimum.accumulate(loss[order])
    better = np.append(True, loss[order][1:] < lowest[:-1])[: order.size]
    return np.asarray(order[better])


def _backtrack(stages: list[_Stage], state: int, start: list[int]) -> list[int]:
    chosen = list(start)
    for stage in reversed(stages):
        chosen[stage.group] = int(stage.option[state])
        state = int(stage.parent[state])
    return chosen


def _bytes(groups: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> int:
    return sum(group[k].nbytes for group, k in zip(groups, chosen, strict=True))


def _loss(groups: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    return math.fsum(group[k].loss for group, k in zip(groups, chosen, strict=True))


def _solution(groups: Sequence[Sequence[Choice]], chosen: list[int], gap: float) -> Optimum:
    return Optimum(chosen, _bytes(groups, chosen), _loss(groups, chosen), gap)
