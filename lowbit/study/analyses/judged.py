"""Statements about a study, judged together: what an analysis measures becomes claims with verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lowbit.evaluation.hypotheses import Hypothesis, Kind, Measured, judge
from lowbit.evaluation.statistics import Interval
from lowbit.report import text
from lowbit.report.panel import Claim

RULE = "Verdicts come from tests at 5 %, adjusted over the claims of this panel by Holm's rule."


class Statement(NamedTuple):
    """A claim, where it is from, and the one number that it is about: above 0, below 0, or within ± ``margin``."""

    source: str
    claim: str
    kind: Kind
    interval: Interval
    found: str
    margin: float = 0.0


def claims(statements: Sequence[Statement]) -> tuple[Claim, ...]:
    """Judged as one list (``evaluation.hypotheses``)."""
    measured = [Measured(Hypothesis(s.claim, s.claim, s.kind, s.margin), s.interval) for s in statements]
    return tuple(Claim(s.source, s.claim, s.found, j.verdict) for s, j in zip(statements, judge(measured), strict=True))


def spelled(interval: Interval, unit: str = "", *, signed: bool = False) -> str:
    """``0.021 [0.020, 0.022] nat``."""
    value = " ".join(text.estimate(interval.estimate, interval.low, interval.high, signed=signed))
    return f"{value} {unit}".rstrip()
