"""Claims about samplers and formats as data, each with what would prove it, and a verdict from evidence.

A claim is about one number, a paired difference with its interval: it is ``supported`` when that number is shown to
lie where the claim says, ``contradicted`` when it is shown to lie elsewhere, and ``undecided`` otherwise. The tests of
a list are adjusted together (Holm), so that the chance of any false verdict among them stays below 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from lowbit.errors import EvidenceError
from lowbit.evaluation.statistics import Interval, holm, p_value, paired_mean, tost

Kind = Literal["above", "below", "within"]
Verdict = Literal["supported", "contradicted", "undecided"]
ALPHA = 0.05


@dataclass(frozen=True)
class Hypothesis:
    """A claim that a difference lies above 0, below 0, or within ±margin of it."""

    name: str
    claim: str
    kind: Kind
    margin: float = 0.0
    """In the unit of the difference; of "within" only."""


@dataclass(frozen=True)
class Judgement:
    """What the evidence says of a hypothesis."""

    hypothesis: Hypothesis
    interval: Interval
    p_for: float
    """Of the claim's opposite: small supports the claim; adjusted over the list."""
    p_against: float
    """Of the claim: small contradicts it; adjusted over the list."""
    verdict: Verdict


class Measured(NamedTuple):
    """A hypothesis beside its difference."""

    hypothesis: Hypothesis
    interval: Interval
    among: int = 1
    """Of how many differences this one speaks least for the claim (``worst``): one against it is found by looking at
    all of them."""


def judge(found: Sequence[Measured]) -> list[Judgement]:
    """A verdict for every hypothesis.

    Raises EvidenceError for "within" without a margin above 0.
    """
    for hypothesis, _, _ in found:
        if hypothesis.kind == "within" and hypothesis.margin <= 0:
            raise EvidenceError(
                "within what?", where=hypothesis.name, why="no evidence shows a difference of exactly 0",
                fix="the largest difference that does not matter, as margin",
            )  # fmt: skip
    pros = holm([_for(h, i) for h, i, _ in found])
    cons = holm([min(1.0, among * _against(h, i)) for h, i, among in found])
    return [
        Judgement(h, i, p, q, "supported" if p < ALPHA else "contradicted" if q < ALPHA else "undecided")
        for (h, i, _), p, q in zip(found, pros, cons, strict=True)
    ]


def _for(h: Hypothesis, i: Interval) -> float:
    match h.kind:
        case "above":
            return p_value(i, side="greater")
        case "below":
            return p_value(i, side="less")
        case "within":
            return tost(i, h.margin)


def _against(h: Hypothesis, i: Interval) -> float:
    match h.kind:
        case "above":
            return p_value(i, side="less")
        case "below":
            return p_value(i, side="greater")
        case "within":  # beyond one of the two ends; twice the smaller, for there are two
            return min(1.0, 2 * min(p_value(i, h.margin, "greater"), p_value(i, -h.margin, "less")))


ByTemperature = Mapping[float, Float[np.ndarray, " prompts"]]
"""A number for each prompt at each temperature."""


def extremal(values: Mapping[str, Float[np.ndarray, " rounds"]], name: str, level: float = 0.95) -> list[Interval]:
    """log(value of ``name`` / value of another), for every other, paired by round.

    A claim that ``name`` is the largest needs every one of them above 0, so it is as good as the worst of them: that
    needs no adjustment (an intersection-union test, Berger 1982).
    """
    ours = np.log(values[name])
    rounds = np.arange(len(ours))
    return [paired_mean(ours - np.log(v), rounds, level) for other, v in values.items() if other != name]


def unpaired(a: Interval, b: Interval, level: float = 0.95) -> Interval:
    """a - b of two independent means; t on the fewer clusters of the two, which is wider than Welch's."""
    fewer = a if a.clusters <= b.clusters else b
    gap, se = a.estimate - b.estimate, math.hypot(a.se, b.se)
    half = float(special.stdtrit(fewer.clusters - 1, (1 + level) / 2)) * se
    return Interval(gap, gap - half, gap + half, se, a.n + b.n, fewer.clusters, f"t, {fewer.clusters - 1} df")


def worst(intervals: Sequence[Interval], kind: Kind) -> Interval:
    """The interval that speaks least for the claim: all are above (below) 0 only if this one is."""
    sign = 1 if kind == "above" else -1

    def strength(i: Interval) -> float:
        return sign * i.estimate / i.se if i.se else sign * i.estimate * float("inf") if i.estimate else 0.0

    return min(intervals, key=strength)


def sensitivity(values: ByTemperature, band: tuple[float, float], level: float = 0.95) -> Interval:
    """Mean over the temperatures within ``band`` (ends included) less the mean over the others, paired by prompt.

    Raises EvidenceError where either side is empty.
    """
    inside = [v for t, v in values.items() if band[0] <= t <= band[1]]
    outside = [v for t, v in values.items() if not band[0] <= t <= band[1]]
    if not inside or not outside:
        raise EvidenceError(
            f"no temperatures {'in' if not inside else 'out'}side {band[0]:g} to {band[1]:g}", where="sensitivity",
            fix="temperatures on both sides",
        )  # fmt: skip
    difference = np.mean(inside, axis=0) - np.mean(outside, axis=0)
    return paired_mean(difference, np.arange(len(difference)), level)


class Claims(NamedTuple):
    """The claims of arXiv:2309.05210 that can be measured."""

    alike: Hypothesis = Hypothesis("alike", "nf4 and fp4 texts are equally likely to the 16-bit model", "within", 0.05)
    band: Hypothesis = Hypothesis(
        "band", "4-bit models differ more from 16-bit between temperatures 0.5 and 0.8 than outside", "above"
    )
    slowest: Hypothesis = Hypothesis("slowest", "int8 decodes slower than every other mode", "below")
    fastest: Hypothesis = Hypothesis("fastest", "the original in 16 bit decodes faster than every other mode", "above")


CLAIMS = Claims()
