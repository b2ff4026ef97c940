"""What the numbers say: the main table, one sentence a candidate, and what could have been detected.

The page and the terminal show the same rows; only the markup differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from lowbit import digest
from lowbit.evaluation.findings import Finding
from lowbit.report import text
from lowbit.report.model import Candidate, Report
from lowbit.report.pareto import Point, Standing, standings
from lowbit.report.table import Cell, Column, Row, Table

KL = "kl"
DELTA_LOG_PPL = "delta_log_perplexity"
TOP1_KEPT = "top1_kept"
DELTA_ACCURACY = "delta_top1_accuracy"


def by_size(report: Report) -> list[Candidate]:
    """The candidates from small to large; equal sizes keep their order."""
    return sorted(report.candidates, key=lambda c: c.bytes_total)


def points(candidates: Iterable[Candidate], metric: str) -> list[Point]:
    """Those candidates that have the metric, as points against size."""
    found = ((c, c.finding(metric)) for c in candidates)
    return [Point(c.label, c.bytes_total, f.value, f.low, f.high) for c, f in found if f and math.isfinite(f.value)]


def main_table(report: Report) -> Table:
    """The paired table: every candidate beside the reference, the columns that never vary left out."""
    several_models = len({c.model_label for c in report.candidates}) > 1
    place = standings(points(report.candidates, KL))
    columns = (
        Column("Candidate", "digest", numeric=False),
        *((Column("Model", numeric=False),) if several_models else ()),
        Column("Size", "vs reference"),
        Column("Bits/weight", "linears"),
        Column("Δ log-ppl", "nat, 95 % CI"),
        Column("p", report.multiplicity_rule),
        Column("KL", "nat, 95 % CI"),
        Column("KL / floor", "multiple"),
        Column("Top-1 kept", "95 % CI"),
        Column("Flips", "lost/gained/other"),
        Column("Verdict", "on Δ log-ppl", numeric=False),
    )
    rows = (_row(report, c, place.get(c.label), several_models) for c in (report.reference, *by_size(report)))
    return Table(columns, tuple(rows))


def _row(report: Report, c: Candidate, place: Standing | None, several_models: bool) -> Row:
    ppl = c.finding(DELTA_LOG_PPL)
    verdict = "reference" if c.is_reference else ppl.verdict if ppl else text.MISSING
    cells = (
        Cell(c.label, digest.short(c.digest)),
        *((Cell(c.model_label),) if several_models else ()),
        Cell(text.size(c.bytes_total), "" if c.is_reference else smaller(report, c)),
        Cell(text.number(c.bits_per_weight)),
        _estimate(ppl, signed=True),
        Cell(text.p_value(adjusted(ppl)) if ppl else text.MISSING),
        _estimate(c.finding(KL)),
        Cell(floor_multiple(report, c) or text.MISSING, _noise(c)),
        _estimate(c.finding(TOP1_KEPT)),
        Cell(flip_counts(c)),
        Cell(verdict, str(place) if place is Standing.FRONT or place is Standing.TIED else ""),
    )
    return Row(cells, verdict, c.is_reference)


def adjusted(finding: Finding) -> float | None:
    """The p value after the multiplicity rule where there is one, else the raw one."""
    return finding.p if finding.p_adjusted is None else finding.p_adjusted


def smaller(report: Report, c: Candidate) -> str:
    """Size against the reference: ``3.3× smaller``, or ``1.02× larger`` when it is."""
    ratio = report.reference.bytes_total / max(c.bytes_total, 1)
    return f"{ratio:.2f}× smaller" if ratio >= 1 else f"{1 / ratio:.2f}× larger"


def floor_multiple(report: Report, c: Candidate) -> str:
    """KL over the noise floor, ``53×``; empty where either is unknown or the floor is zero."""
    kl = c.finding(KL)
    if kl is None or not report.noise_floor or not math.isfinite(kl.value):
        return ""
    multiple = kl.value / report.noise_floor
    return f"{multiple:,.0f}×" if multiple >= 10 else f"{multiple:.1f}×"


def flip_counts(c: Candidate) -> str:
    """``lost/gained/other`` as counts of tokens, or a dash."""
    flips = next((f.flips for f in c.findings if f.flips is not None), None)
    return text.MISSING if flips is None else f"{flips.lost}/{flips.gained}/{flips.other}"


_JUDGEMENT = {
    "worse": "worse than the reference",
    "better": "better than the reference",
    "same": "the same as the reference within the margin",
    "unclear": "no difference from the reference shown, and none excluded",
}


def sentence(report: Report, c: Candidate) -> str:
    """One candidate's verdict in a sentence: the judgement on log-perplexity first, then what it stands on."""
    parts = [f"{smaller(report, c)} at {text.number(c.bits_per_weight)} bits per weight"]
    judgement = "not scored"
    if ppl := c.finding(DELTA_LOG_PPL):
        judgement = _JUDGEMENT.get(ppl.verdict, ppl.verdict)
        parts.append(f"Δ log-perplexity {_phrase(ppl, signed=True)}")
    if kl := c.finding(KL):
        times = floor_multiple(report, c)
        parts.append(f"KL {_phrase(kl)}" + (f" ({times} the noise floor)" if times else ""))
    if kept := c.finding(TOP1_KEPT):
        parts.append(f"first choice kept on {_phrase(kept)} of tokens")
    return f"{judgement}; {', '.join(parts)}."


def _phrase(finding: Finding, *, signed: bool = False) -> str:
    """Value, interval and unit, not to be broken over lines."""
    value, interval = text.estimate(finding.value, finding.low, finding.high, signed=signed)
    return text.NO_BREAK.join(f"{value} {interval} {finding.unit}".split())


def detectable(report: Report, metric: str) -> str:
    """The smallest effect that each candidate's evidence finds with 80 % power, as a range over them; or empty."""
    found = [f for c in report.candidates if (f := c.finding(metric))]
    effects = [f.mde for f in found if f.mde is not None and math.isfinite(f.mde)]
    if not effects:
        return ""
    smallest, largest = text.number(min(effects)), text.number(max(effects))
    unit = "pp" if found[0].unit == "%" else found[0].unit
    return f"{smallest} {unit}" if smallest == largest else f"{smallest} to {largest} {unit} depending on the candidate"


def notes(report: Report) -> list[str]:
    """What must stand under the table: evidence, multiplicity rule, noise floor and minimum detectable effect."""
    p = report.protocol
    lines = [
        f"Paired on the same {p.tokens:,} tokens of {p.text} in {p.windows:,} windows of {p.length:,}; "
        f"intervals are 95 % and clustered ({p.clusters:,} clusters); p values adjusted over this table by "
        f"{report.multiplicity_rule}. "
        f"Reference {report.reference.label}, digest {digest.short(report.reference.digest)}."
    ]
    if report.noise_floor is None:
        lines.append("Noise floor: not measured, so small KL values may be numerical noise.")
    elif report.noise_floor == 0:
        lines.append("Noise floor: KL 0, the reference repeats itself bit for bit under another batch size.")
    else:
        lines.append(
            f"Noise floor: KL {text.number(report.noise_floor)} nat, "
            "the reference against itself under another batch size."
        )
    effects = [
        f"{name} {effect}"
        for metric, name in ((DELTA_LOG_PPL, "Δ log-perplexity"), (DELTA_ACCURACY, "Δ top-1 accuracy"))
        if (effect := detectable(report, metric))
    ]
    if effects:
        lines.append(f"Minimum detectable effect (80 % power at 5 %, before adjustment): {'; '.join(effects)}.")
    return lines


def _noise(c: Candidate) -> str:
    kl = c.finding(KL)
    return "" if kl is None or "floor" in kl.verdict else kl.verdict  # the multiple is already in the cell


def _estimate(finding: Finding | None, *, signed: bool = False) -> Cell:
    if finding is None:
        return Cell(text.MISSING)
    value, interval = text.estimate(finding.value, finding.low, finding.high, signed=signed)
    unit = f" {finding.unit}" if finding.unit in ("%", "pp") else ""
    return Cell(value + unit, interval)
