"""What the evidence on a candidate says: rows of numbers, each with its error, its test and a verdict.

The verdicts, after adjustment for all tests of the table:

    same           equivalence shown: within the stated margin of the reference (two one-sided tests, TOST)
    worse, better  a difference shown, and equivalence not
    unclear        neither; the note says how large an effect this evidence would have found
    within noise   KL only: shown to lie below twice the noise floor
    53x floor      KL only: shown to lie above the noise floor, by this multiple of it
    above zero     KL only: not 0, but no multiple exists (the floor is exactly 0 or was not measured)

The margin decides what matters: a difference that is real but shown to be smaller than the margin is "same", and
its note says so. The noise floor is the reference scored against itself in another way (another batch size, say).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lowbit.errors import EvidenceError, RecipeError, nearest
from lowbit.evaluation import statistics as st
from lowbit.evaluation.metrics import agreement, kl, perplexity
from lowbit.evaluation.metrics.agreement import Flips
from lowbit.evaluation.metrics.base import Metric, Tokens

RULES: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "holm": st.holm,
    "benjamini-hochberg": st.benjamini_hochberg,
}
METRICS = {
    m.name: m for m in (perplexity.DELTA_LOG_PERPLEXITY, kl.KL, agreement.TOP1_KEPT, agreement.DELTA_TOP1_ACCURACY)
}
ALPHA = 0.05


class Margins(NamedTuple):
    """How much difference does not matter."""

    log_perplexity: float = 0.01
    """Nats a token: 1 % of perplexity."""
    top1: float = 1.0
    """Percentage points, for top-1 accuracy and top-1 kept."""


DEFAULT_MARGINS = Margins()


@dataclass(frozen=True)
class Finding:
    """One metric of one candidate: everything that must be printed beside the number."""

    metric: str
    value: float
    """In ``unit``, as ``low`` and ``high``: the ends of the confidence interval."""
    low: float
    high: float
    unit: str
    n: int
    clusters: int
    p: float | None
    """Of "no difference" (from the reference; for KL from the floor); None where there is nothing to test against."""
    p_adjusted: float | None
    verdict: str
    note: str
    rule: str = ""
    """The multiplicity rule and its number of tests: ``holm, 24 tests``."""
    test: str = ""
    effect: float = 0.0
    """What ``p`` tests: the value less that of the reference or floor; its sign tells worse from better."""
    p_same: float | None = None
    """Of "a difference of at least the margin": small means shown to be the same. Not adjusted."""
    p_same_adjusted: float | None = None
    margin: float | None = None
    mde: float | None = None
    """Smallest effect that this evidence finds with 80 % power at 5 %, before adjustment."""
    floor: float | None = None
    """The same metric on the noise floor; None where it was not measured."""
    identical: bool = False
    flips: Flips | None = None


def findings(
    tokens: Tokens, floor: Tokens | None = None, margins: Margins = DEFAULT_MARGINS, level: float = 0.95
) -> list[Finding]:
    """The four rows of one candidate, Holm-adjusted among themselves; ``adjust`` does it for a whole table.

    ``floor``: the reference scored against itself at the same tokens. Raises EvidenceError where it is not at the
    same tokens, and where the evidence has a single cluster. O(n log n).
    """
    if floor is not None:
        tokens.require_same_positions(floor)
    rows = [
        _delta_log_perplexity(tokens, floor, margins, level),
        _kl(tokens, floor, level),
        _top1_kept(tokens, floor, margins, level),
        _delta_accuracy(tokens, floor, margins, level),
    ]
    return adjust({"": rows})[""]


def adjust(table: Mapping[str, Sequence[Finding]], rule: str = "holm") -> dict[str, list[Finding]]:
    """The same findings, adjusted over every test in the table, with verdicts and notes drawn anew.

    Tests of difference and tests of equivalence are two families: of one row only one kind can be a false claim.
    ``rule``: "holm" for a table of claims, "benjamini-hochberg" for exploring. Raises RecipeError for another.
    """
    if rule not in RULES:
        raise RecipeError(f"no multiplicity rule {rule!r}", where="adjust", fix=nearest(rule, RULES))
    flat = [f for rows in table.values() for f in rows]
    differ = _adjusted([f.p for f in flat], rule)
    same = _adjusted([f.p_same for f in flat], rule)
    count = sum(f.p is not None for f in flat)
    judged = iter(
        [
            _judge(replace(f, p_adjusted=p, p_same_adjusted=q, rule=f"{rule}, {count} tests"))
            for f, p, q in zip(flat, differ, same, strict=True)
        ]
    )
    return {label: [next(judged) for _ in rows] for label, rows in table.items()}


def to_json(finding: Finding) -> str:
    """One JSON object, keys as the fields are named; finite numbers only."""
    value = asdict(finding)
    value["flips"] = None if finding.flips is None else finding.flips._asdict()
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def from_json(text: str) -> Finding:
    """The finding that ``to_json`` wrote. Raises EvidenceError for anything else."""
    try:
        value = json.loads(text)
        unknown = set(value) - {f.name for f in fields(Finding)}
        if unknown:
            raise TypeError(f"unknown field {', '.join(sorted(unknown))}")
        flips = value.pop("flips", None)
        return Finding(**value, flips=None if flips is None else Flips(**flips))
    except (TypeError, ValueError) as e:
        raise EvidenceError(f"not a finding: {e}", where="finding", fix="compute the findings again") from e


def _delta_log_perplexity(tokens: Tokens, floor: Tokens | None, margins: Margins, level: float) -> Finding:
    interval = perplexity.delta(tokens, level)
    p, test = st.paired_test(tokens.nll.astype(np.float64) - tokens.nll_ref, tokens.cluster)
    return replace(
        _row(perplexity.DELTA_LOG_PERPLEXITY, tokens, interval),
        p=p,
        test=test,
        p_same=0.0 if tokens.identical else st.tost(interval, margins.log_perplexity),
        margin=margins.log_perplexity,
        floor=None if floor is None else perplexity.delta(floor).estimate,
    )


def _kl(tokens: Tokens, floor: Tokens | None, level: float) -> Finding:
    row = _row(kl.KL, tokens, kl.mean(tokens, level))
    noise = None if floor is None else kl.mean(floor).estimate
    if floor is None or noise is None or noise <= 0:
        return replace(row, floor=noise)
    excess = tokens.kl.astype(np.float64) - floor.kl
    p, test = st.paired_test(excess, tokens.cluster)
    # testing kl - 2·floor, token by token, also carries the error of the floor itself
    below_twice = st.p_value(st.paired_mean(excess - floor.kl, tokens.cluster), side="less")
    return replace(
        row,
        p=p,
        test=test,
        effect=row.value - noise,
        p_same=below_twice,
        margin=noise,
        mde=st.detectable(st.paired_mean(excess, tokens.cluster)),
        floor=noise,
    )


def _top1_kept(tokens: Tokens, floor: Tokens | None, margins: Margins, level: float) -> Finding:
    kept = (tokens.top1 == tokens.top1_ref).astype(np.float64)
    base = np.ones(len(tokens)) if floor is None else (floor.top1 == floor.top1_ref).astype(np.float64)
    p, test = st.paired_test(kept - base, tokens.cluster)
    row = _row(agreement.TOP1_KEPT, tokens, agreement.top1_kept(tokens, level).scaled(100.0))
    return replace(
        row,
        p=p,
        test=test,
        effect=100 * float(np.mean(kept - base)),
        p_same=_p_same_share(kept - base, tokens, margins.top1 / 100),
        margin=margins.top1,
        floor=None if floor is None else 100 * float(base.mean()),
    )


def _delta_accuracy(tokens: Tokens, floor: Tokens | None, margins: Margins, level: float) -> Finding:
    change = agreement.accuracy_change(tokens).astype(np.float64)
    counts = agreement.flips(tokens)
    row = _row(agreement.DELTA_TOP1_ACCURACY, tokens, agreement.delta_accuracy(tokens, level).scaled(100.0))
    if row.clusters == len(tokens):
        p, test = st.PValue(st.mcnemar(counts.lost, counts.gained), "exact McNemar")
    else:
        p, test = st.paired_test(change, tokens.cluster)
    return replace(
        row,
        p=p,
        test=test,
        p_same=_p_same_share(change, tokens, margins.top1 / 100),
        margin=margins.top1,
        floor=None if floor is None else 100 * agreement.delta_accuracy(floor).estimate,
        flips=counts,
    )


def _p_same_share(d: Float[np.ndarray, " n"], tokens: Tokens, margin: float) -> float:
    """TOST for differences in {-1, 0, 1}.

    Where nothing changed there is no spread to divide by; then the claim is as strong as its count of tokens:
    the chance to see no change among n independent ones if a share ``margin`` did change.
    """
    if tokens.identical:
        return 0.0
    if not d.any():
        return float((1 - margin) ** len(d))
    return st.tost(st.paired_mean(d, tokens.cluster), margin)


def _row(metric: Metric, tokens: Tokens, interval: st.Interval) -> Finding:
    """Value and interval; the tests are filled in by each metric, verdict and note by ``_judge``."""
    return Finding(
        metric=metric.name,
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        unit=metric.unit,
        n=interval.n,
        clusters=interval.clusters,
        p=None,
        p_adjusted=None,
        verdict="",
        note="",
        effect=interval.estimate - metric.ideal,
        mde=st.detectable(interval),
        identical=tokens.identical,
    )


def _adjusted(ps: Sequence[float | None], rule: str) -> list[float | None]:
    adjusted = iter(RULES[rule]([p for p in ps if p is not None]))
    return [None if p is None else next(adjusted) for p in ps]


def _judge(f: Finding) -> Finding:
    verdict = _verdict_kl(f) if f.metric == kl.KL.name else _verdict(f)
    return replace(f, verdict=verdict, note=_note(f, verdict))


def _verdict(f: Finding) -> str:
    if f.p_same_adjusted is not None and f.p_same_adjusted < ALPHA:
        return "same"
    if f.p_adjusted is not None and f.p_adjusted < ALPHA:
        return "better" if (f.effect > 0) == (METRICS[f.metric].better == "higher") else "worse"
    return "unclear"


def _verdict_kl(f: Finding) -> str:
    if f.identical:
        return "same"
    if not f.floor or f.floor < 0:
        return "above zero"
    if f.p_adjusted is not None and f.p_adjusted < ALPHA and f.effect > 0:
        times = f.value / f.floor
        return ">9999x floor" if times >= 9999.5 else f"{times:.0f}x floor" if times >= 9.95 else f"{times:.1f}x floor"
    if f.p_same_adjusted is not None and f.p_same_adjusted < ALPHA:
        return "within noise"
    return "unclear"


def _note(f: Finding, verdict: str) -> str:
    unit = "pp" if f.unit == "%" else f.unit
    parts = []
    if f.flips is not None:
        parts.append(f"lost {f.flips.lost} / gained {f.flips.gained} / other {f.flips.other}")
    if f.identical:
        parts.append("identical to the reference at every token")
    elif verdict == "same":
        parts.append(f"within {f.margin:g} {unit} (TOST p {_p(f.p_same_adjusted)})")
        if f.p_adjusted is not None and f.p_adjusted < ALPHA:
            parts.append(f"a real but smaller difference (p {_p(f.p_adjusted)})")
    elif verdict == "unclear":
        parts.append(f"would have found {f.mde:.2g} {unit} with 80 % power")
    if f.floor is not None:
        parts.append(f"noise floor {f.floor:.3g} {f.unit}" if f.floor else "noise floor exactly 0")
    elif f.metric == kl.KL.name and not f.identical:
        parts.append("no noise floor measured")
    if f.test:
        parts.append(f.test)
    return "; ".join(parts)


def _p(p: float | None) -> str:
    return "none" if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"
