"""What two models' items say of a task: paired differences with intervals, tests, flips and a verdict.

same             shown to lie within the margin of the reference (TOST)
worse, better    a difference shown, and "same" not
changed          the same, for measures where neither direction is better (a share of stereotypes)
unclear          neither; the note says how large an effect this evidence would have found
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lowbit.errors import RecipeError, nearest
from lowbit.evaluation import statistics as st
from lowbit.evaluation.findings import ALPHA, RULES
from lowbit.evaluation.metrics.agreement import Flips
from lowbit.evaluation.metrics.items import Items
from lowbit.evaluation.tasks.measures import ACCURACY, Measure


class Margins(NamedTuple):
    """How much difference does not matter: percentage points of shares and scores, nats of log-likelihoods."""

    points: float = 1.0
    nats: float = 0.01


DEFAULT_MARGINS = Margins()


@dataclass(frozen=True)
class TaskFinding:
    """One measure of one task: what must be printed beside the difference."""

    task: str
    measure: str
    unit: str
    """Of ``reference`` and ``candidate``; differences of percentages are in points."""
    better: str
    n: int
    clusters: int
    reference: float
    candidate: float
    delta: float
    low: float
    high: float
    flips: Flips | None
    """Items lost, gained, and wrong in another way; None where a measure is not right or wrong."""
    p: float
    test: str
    p_same: float
    margin: float
    mde: float
    """Smallest difference that this evidence finds with 80 % power at 5 %, before adjustment."""
    identical: bool
    floor: float | None = None
    """Share of items, in percent, whose value changes when the reference itself runs with another batch size."""
    p_adjusted: float = 1.0
    p_same_adjusted: float = 1.0
    rule: str = ""
    verdict: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain values, keys as the fields are named."""
        return asdict(self) | {"flips": None if self.flips is None else self.flips._asdict()}


def compare(
    task: str, measure: Measure, reference: Items, candidate: Items, floor: Items | None = None,
    margins: Margins = DEFAULT_MARGINS, level: float = 0.95,
) -> TaskFinding | None:  # fmt: skip
    """One measure, paired; None where its group has items of fewer than two clusters. Verdicts come with ``adjust``.

    ``floor``: the reference's own items under another batch size. Raises EvidenceError where items do not pair.
    """
    reference.require_paired(candidate)
    rows = np.flatnonzero(measure.rows(reference))
    if len(np.unique(reference.cluster[rows])) < 2:
        return None
    before, after = reference.take(rows), candidate.take(rows)
    values = measure.values(before), measure.values(after)
    flips = None
    if measure.binary and measure.better == "higher":
        per = "char" if "character" in measure.name else "token" if "token" in measure.name else "sum"
        flips = _flips(*values, _chose_otherwise(before, after, per))
    noise = None
    if floor is not None:
        again = measure.values(floor.take(rows))
        noise = 100 * float(np.mean(~np.isclose(again, values[0], rtol=0, atol=1e-3)))
    return _finding(task, measure, *values, before.cluster, flips, noise, margins, level)


def drop(
    adversarial: tuple[Items, Items],
    original: tuple[Items, Items],
    margins: Margins = DEFAULT_MARGINS,
    level: float = 0.95,
) -> TaskFinding | None:
    """How much more (or less) accuracy the candidate loses to adversarial changes than the reference does.

    Pairs of items (reference, candidate) before and after the change are joined by id. None with fewer than two.
    """
    rows = {str(name): i for i, name in enumerate(original[0].id)}
    joined = [(i, rows[str(name)]) for i, name in enumerate(adversarial[0].id) if str(name) in rows]
    if len(joined) < 2:
        return None
    changed, plain = (np.array(column) for column in zip(*joined, strict=True))
    before, after = (
        (o.score[plain] - a.score[changed]).astype(np.float64) for a, o in zip(adversarial, original, strict=True)
    )
    measure = replace(ACCURACY, name="adversarial drop", better="lower", binary=False, span=2.0)
    return _finding("advglue", measure, before, after, adversarial[0].cluster[changed], None, None, margins, level)


def adjust(table: Mapping[str, Sequence[TaskFinding]], rule: str = "holm") -> dict[str, list[TaskFinding]]:
    """The same findings, adjusted over every row of the table, with verdicts. Raises RecipeError for another rule."""
    if rule not in RULES:
        raise RecipeError(f"no multiplicity rule {rule!r}", where="adjust", fix=nearest(rule, RULES))
    flat = [f for rows in table.values() for f in rows]
    differ, same = (RULES[rule]([getattr(f, name) for f in flat]) for name in ("p", "p_same"))
    judged = iter(
        [
            _judge(replace(f, p_adjusted=p, p_same_adjusted=q, rule=f"{rule}, {len(flat)} tests"))
            for f, p, q in zip(flat, differ, same, strict=True)
        ]
    )
    return {label: [next(judged) for _ in rows] for label, rows in table.items()}


def _finding(
    task: str, measure: Measure, before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"],
    cluster: Int[np.ndarray, " n"], flips: Flips | None, floor: float | None, margins: Margins, level: float,
) -> TaskFinding:  # fmt: skip
    d = after - before
    scale, margin = (100.0, margins.points) if measure.unit == "%" else (1.0, margins.nats)
    interval = st.paired_mean(d, cluster, level)
    clusters = interval.clusters
    share = measure.unit == "%"
    # in a ratio an item weighs more than its share, the more the fewer items count in it
    span = max(measure.span, float(np.ptp(before)))
    p_same = st.tost(interval, margin / scale)
    if share and not d.any():
        # no spread is seen; what could have been missed among so many clusters is Clopper and Pearson's limit
        limit = span * st.clopper_pearson(0, clusters, level).high
        interval = interval._replace(low=-limit, high=limit, method=f"no change in {clusters} clusters")
        p_same = _unchanged(clusters, margin / scale, span)
    if measure.binary and clusters == len(d):
        p, test = st.mcnemar(int(np.sum(d < 0)), int(np.sum(d > 0))), "exact McNemar"
    else:
        p, test = st.paired_test(d, cluster)
    shown = interval.scaled(scale)
    return TaskFinding(
        task=task, measure=measure.name, unit=measure.unit, better=measure.better, n=len(d), clusters=clusters,
        reference=scale * float(before.mean()), candidate=scale * float(after.mean()),
        delta=shown.estimate, low=shown.low, high=shown.high, flips=flips, p=p, test=test,
        p_same=p_same, margin=margin, mde=scale * st.detectable(interval),
        identical=not d.any(), floor=floor,
    )  # fmt: skip


def _unchanged(clusters: int, margin: float, span: float) -> float:
    """The chance to see no change in so many clusters if as many items changed as ``margin`` takes at least."""
    return float((1 - min(margin / span, 1.0)) ** clusters)


def _flips(before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"], otherwise: Bool[np.ndarray, " n"]) -> Flips:
    wrong = (before < 0.5) & (after < 0.5)
    lost, gained = (before > 0.5) & (after < 0.5), (before < 0.5) & (after > 0.5)
    return Flips(int(lost.sum()), int(gained.sum()), int((wrong & otherwise).sum()))


def _chose_otherwise(before: Items, after: Items, per: str) -> Bool[np.ndarray, " n"]:
    if before.is_choice:
        differ: Bool[np.ndarray, " n"] = before.choice(per) != after.choice(per)
        return differ
    written: Bool[np.ndarray, " n"] = (before.answer != after.answer) | (before.pred != after.pred)
    return written


def _judge(f: TaskFinding) -> TaskFinding:
    verdict = "unclear"
    if f.p_same_adjusted < ALPHA:
        verdict = "same"
    elif f.p_adjusted < ALPHA:
        verdict = (
            "changed" if f.better == "neither" else "better" if (f.delta > 0) == (f.better == "higher") else "worse"
        )
    unit = "pp" if f.unit == "%" else f.unit
    parts = [f"within {f.margin:g} {unit}, TOST p {p_text(f.p_same_adjusted)}"] if verdict == "same" else []
    if verdict == "unclear":
        parts.append(f"finds {f.mde:.3g} {unit} with 80 % power")
    return replace(f, verdict=verdict, note="; ".join(parts))


def p_text(p: float) -> str:
    """A p-value for people."""
    return "<.001" if p < 0.001 else f"{p:.2g}"
