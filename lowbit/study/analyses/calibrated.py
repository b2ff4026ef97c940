"""Calibration of a model's versions as a table and as reliability curves, for the analysis of confidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lowbit.errors import EvidenceError
from lowbit.evaluation.hypotheses import ALPHA
from lowbit.evaluation.metrics import calibration
from lowbit.evaluation.metrics.calibration import Line
from lowbit.evaluation.metrics.confidence import Answers
from lowbit.evaluation.statistics import Interval, holm, p_value
from lowbit.report import text
from lowbit.report.panel import Curves, Mark
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses.answered import Part, estimated
from lowbit.study.analyses.judged import spelled

_PERCENT = 100.0
_BINS_SHOWN = 10  # of a curve: fewer than of the error, so that each holds enough for an interval


class _Version(NamedTuple):
    gap: Interval
    line: Line | None
    """None where right and wrong answers are separated, so that there is no slope."""
    line_shift: Line | None


def table(model: str, pooled: Mapping[str, Part], reference: Answers) -> Table:
    """ECE of every version as a level, and paired shifts of the squared gap and of the calibration line.

    p is adjusted by Holm over all shifts of the table.
    """
    found = {label: _version(part) for label, part in pooled.items()}
    tested = [(label, name, i) for label, v in found.items() for name, i in _shifts(v)]
    shown: dict[str, list[str]] = {label: [] for label in found}
    worse = set()
    for (label, name, i), p in zip(tested, holm([p_value(i) for _, _, i in tested]), strict=True):
        if p < ALPHA:
            shown[label].append(f"{name} {'higher' if i.estimate > 0 else 'lower'}")
            if name == "squared gap":
                worse.add((label, i.estimate > 0))
    own = _line(reference)
    rows = [Row((Cell(f"{model} (original)"), *_levels(reference), Cell(""), *_lines(own, None), Cell("")),
                "reference", is_reference=True)]  # fmt: skip
    for label, v in found.items():
        cells = (
            Cell(label), *_levels(pooled[label].candidate), estimated(v.gap.scaled(_PERCENT**2), signed=True),
            *_lines(v.line, v.line_shift), Cell(", ".join(shown[label]) or "nothing"),
        )  # fmt: skip
        verdict = "worse" if (label, True) in worse else "better" if (label, False) in worse else ""
        rows.append(Row(cells, verdict))
    columns = (
        Column("Version", numeric=False), Column("ECE, equal mass", "%"), Column("ECE, equal width", "%"),
        Column("Δ squared gap", "pp²"), Column("Slope", "1 is calibrated"), Column("Intercept", "0 is calibrated"),
        Column("Shown to differ", numeric=False),
    )  # fmt: skip
    return Table(columns, tuple(rows))


def reliability(model: str, pooled: Mapping[str, Part], reference: Answers) -> Curves:
    """How often each version is right against how sure it is; the diagonal is perfect calibration."""
    answers = {f"{model} (original)": reference} | {label: part.candidate for label, part in pooled.items()}
    marks = []
    for label, own in answers.items():
        bins = max(2, min(_BINS_SHOWN, len(own.gold) // 30))
        for b in calibration.reliability(own, bins):
            right = b.accuracy.scaled(_PERCENT)
            note = f"{_PERCENT * b.confidence:.1f} % sure, n {right.n}"
            marks.append(Mark(label, _PERCENT * b.confidence, right.estimate, right.low, right.high, note))
    return Curves(
        key="reliability", title="Right as often as sure",
        caption="Share of right answers against mean confidence, in groups of equal size of each version's own "
        "confidence. Below the diagonal a version is surer than it is right.",
        x="confidence, %", y="right, %", marks=tuple(marks), diagonal=True,
    )  # fmt: skip


def _version(part: Part) -> _Version:
    line = _line(part.candidate)
    both = line is not None and _line(part.reference) is not None
    shift = calibration.calibration_line_shift(part.reference, part.candidate) if both else None
    return _Version(calibration.squared_error_shift(part.reference, part.candidate), line, shift)


def _line(answers: Answers) -> Line | None:
    try:
        return calibration.calibration_line(answers)
    except EvidenceError:  # no line exists where confidence separates right from wrong: a dash stands for it
        return None


def _shifts(v: _Version) -> list[tuple[str, Interval]]:
    lines = [] if v.line_shift is None else [("slope", v.line_shift.slope), ("intercept", v.line_shift.intercept)]
    return [("squared gap", v.gap), *lines]


def _levels(answers: Answers) -> tuple[Cell, Cell]:
    mass = _PERCENT * calibration.calibration_error(answers, kind="mass")
    width = _PERCENT * calibration.calibration_error(answers, kind="width")
    return Cell(text.number(mass)), Cell(text.number(width))


def _lines(line: Line | None, shift: Line | None) -> tuple[Cell, Cell]:
    if line is None:
        return Cell(text.MISSING), Cell(text.MISSING)
    if shift is None:
        return estimated(line.slope), estimated(line.intercept)
    return (
        Cell(text.number(line.slope.estimate), f"Δ {spelled(shift.slope, signed=True)}"),
        Cell(text.number(line.intercept.estimate), f"Δ {spelled(shift.intercept, signed=True)}"),
    )
