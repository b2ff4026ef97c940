"""Confidence: what low bits change in how sure answers are, and in how rightly so (arXiv:2405.00632).

A panel a model: paired shifts of what every question says of an answer, calibration, and who was moved the most. What
the numbers mean, and why the change of ECE has no interval, is in docs/concepts/confidence.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lowbit.evaluation.hypotheses import ALPHA
from lowbit.evaluation.metrics import calibration, confidence
from lowbit.evaluation.metrics.confidence import PER_ITEM, Answers
from lowbit.evaluation.statistics import Interval, detectable, holm, paired_test
from lowbit.report.panel import Panel, Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses import calibrated, moved
from lowbit.study.analyses.answered import (
    Answered,
    Part,
    Version,
    answered,
    counted,
    estimated,
    require_choices,
)  # fmt: skip
from lowbit.study.analyses.judged import Statement, claims, spelled
from lowbit.study.view import View

_PAPER = "arXiv:2405.00632"
_LOW_BITS = 4.0  # of candidates below, acceptance A7.2 speaks


class _Shown(NamedTuple):
    """How a metric of ``PER_ITEM`` is shown; ``judged``: whether one way is better."""

    metric: str
    title: str
    unit: str
    change: str
    factor: float = 1.0
    judged: bool = True


_SHOWN = (
    _Shown("accuracy", "accuracy", "%", "pp", 100.0), _Shown("p_true", "p(true)", "%", "pp", 100.0),
    _Shown("confidence", "confidence", "%", "pp", 100.0, judged=False), _Shown("brier", "Brier", "", ""),
    _Shown("entropy", "entropy", "bit", "bit", judged=False), _Shown("answer_nll", "NLL", "nat", "nat"),
)  # fmt: skip


class _Shift(NamedTuple):
    interval: Interval
    p: float
    """Adjusted over the table."""


_Shifts = Mapping[str, _Shift]


def panels(view: View) -> list[Panel]:
    """A panel for each model whose candidates have answered. Raises StudyError where no question has choices."""
    require_choices(view, "confidence")
    found = ((m, answered(m)) for m in view.models)
    return [
        _panel(f"confidence-{i}", view.titled("How sure, and how rightly so", m), m.name, f)
        for i, (m, f) in enumerate(found)
        if f.versions
    ]


def _panel(key: str, title: str, model: str, found: Answered) -> Panel:
    pooled = {v.label: part for v in found.versions if (part := v.pooled()) is not None}
    shifts = _shifts(list(pooled.values()))
    whole = max(found.versions, key=lambda v: len(v.parts))
    counts = {v.label: counted(v) for v in found.versions}
    thirds = {label: third for label, part in pooled.items() if (third := moved.thirds_of(part)) is not None}
    tables = [
        Titled("Confidence beside the original", _pooled_table(model, whole, pooled, counts, shifts)),
        Titled("Calibration", calibrated.table(model, pooled, pooled[whole.label].reference)),
        Titled("By how sure the original was", moved.table(thirds)),
        Titled("Confidence task by task", _task_table(model, found.versions), folded=True),
    ]
    return Panel(
        key=key, title=title, lead=tuple(_lead(model, whole, pooled, shifts)),
        claims=claims(list(_statements(found.versions, pooled, thirds))), tables=tuple(tables),
        figures=(
            calibrated.reliability(model, pooled, pooled[whole.label].reference),
            moved.curves(pooled, absolute=False), moved.curves(pooled, absolute=True),
        ),
        notes=(*_NOTES, *(f"Left out: {reason}." for reason in found.left_out)),
    )  # fmt: skip


_NOTES = (
    "Probabilities are the softmax over the summed log-likelihoods of a question's choices; p(true) is that of the "
    "right choice, confidence that of the likeliest. Differences are candidate less original on the same questions, "
    "with 95 % intervals clustered by passage, subject or template; a task counts by its number of questions.",
    "A change is called shown where p, adjusted by Holm over all tests of its table, is below 5 %; the claims are "
    "another such family.",
    "ECE is a level: debiased, and without interval, since its noise adds up and never cancels. The test of "
    "calibration is that of the squared gap, whose noise is taken off exactly.",
    "A softmax is steepest where it is undecided: the same error of the log-likelihoods moves an unsure answer's "
    "probability more. The change in log-odds is free of that.",
)


# -- shifts ------------------------------------------------------------------------------------------------------------


def _shifts(parts: Sequence[Part]) -> list[_Shifts]:
    """Every shift of every part, with p adjusted over all of them."""
    intervals = [{s.metric: confidence.shift(s.metric, p.reference, p.candidate) for s in _SHOWN} for p in parts]
    adjusted = iter(holm([paired_test(d, part.reference.cluster).p for part in parts for d in _differences(part)]))
    return [{name: _Shift(interval, next(adjusted)) for name, interval in one.items()} for one in intervals]


def _differences(part: Part) -> Iterator[Float[np.ndarray, " n"]]:
    for shown in _SHOWN:
        column = PER_ITEM[shown.metric][1]
        yield column(part.candidate) - column(part.reference)


def _different(shifts: _Shifts) -> tuple[str, str]:
    """What is shown to differ, in words, and the word that a page colours."""
    words, verdicts = [], set()
    for shown in _SHOWN:
        found = shifts[shown.metric]
        if found.p < ALPHA:
            up = found.interval.estimate > 0
            words.append(f"{shown.title} {'higher' if up else 'lower'}")
            if shown.judged:
                verdicts.add("better" if up == (PER_ITEM[shown.metric][0].better == "higher") else "worse")
    return ", ".join(words) or "nothing", "worse" if "worse" in verdicts else next(iter(verdicts), "")


def _pooled_table(
    model: str, whole: Version, pooled: Mapping[str, Part], counts: Mapping[str, Cell], shifts: Sequence[_Shifts]
) -> Table:
    rows = [_reference_row((Cell(f"{model} (original)"), counts[whole.label]), pooled[whole.label].reference)]
    rows += [_row((Cell(label), counts[label]), one) for label, one in zip(pooled, shifts, strict=True)]
    return Table((Column("Version", numeric=False), Column("Questions"), *_columns()), tuple(rows))


def _task_table(model: str, versions: Sequence[Version]) -> Table:
    tasks = dict.fromkeys(part.task for version in versions for part in version.parts)
    lines = [(task, v, part) for task in tasks for v in versions for part in v.parts if part.task == task]
    rows, last = [], ""
    for (task, version, part), one in zip(lines, _shifts([part for _, _, part in lines]), strict=True):
        n = Cell(f"{len(part.reference.gold)}")
        if task != last:
            rows.append(_reference_row((Cell(task), Cell(f"{model} (original)"), n), part.reference))
        rows.append(_row((Cell(task), Cell(version.label), n), one))
        last = task
    names = Column("Task", numeric=False), Column("Version", numeric=False), Column("Questions")
    return Table((*names, *_columns()), tuple(rows))


def _columns() -> tuple[Column, ...]:
    shown = (Column(s.title[0].upper() + s.title[1:] if s.metric != "p_true" else s.title, _units(s)) for s in _SHOWN)
    return (*shown, Column("Shown to differ", numeric=False))


def _units(shown: _Shown) -> str:
    return f"{shown.unit}; Δ {shown.change}" if shown.unit != shown.change else f"{shown.unit}; Δ".lstrip("; ")


def _row(names: tuple[Cell, ...], shifts: _Shifts) -> Row:
    words, verdict = _different(shifts)
    cells = (estimated(shifts[s.metric].interval.scaled(s.factor), signed=True) for s in _SHOWN)
    return Row((*names, *cells, Cell(words)), verdict)


def _reference_row(names: tuple[Cell, ...], reference: Answers) -> Row:
    levels = (estimated(confidence.level(s.metric, reference).scaled(s.factor)) for s in _SHOWN)
    return Row((*names, *levels, Cell("")), "reference", is_reference=True)


# -- what is said of it ------------------------------------------------------------------------------------------------


def _lead(model: str, whole: Version, pooled: Mapping[str, Part], shifts: Sequence[_Shifts]) -> Iterator[str]:
    reference = pooled[whole.label].reference
    right, true, sure = (
        spelled(confidence.level(m, reference).scaled(100.0), "%") for m in ("accuracy", "p_true", "confidence")
    )
    asked = f"{len(reference.gold)} questions of {len(whole.parts)} task{'s' if len(whole.parts) > 1 else ''}"
    yield f"{model}, the original, on {asked}: right {right}; p(true) {true}; confidence {sure}."
    for label, one in zip(pooled, shifts, strict=True):
        words, _ = _different(one)
        moved = one["p_true"].interval.scaled(100.0)
        p_true = f"p(true) {spelled(moved, 'pp', signed=True)}, n {moved.n}"
        if words == "nothing":
            yield (
                f"{label}: nothing is shown to differ; {p_true}, where a shift of {detectable(moved):.2g} pp would "
                "be found with 80 % power before adjustment."
            )
        else:
            yield f"{label}: shown to differ are {words}; {p_true}."


def _statements(
    versions: Sequence[Version], pooled: Mapping[str, Part], thirds: Mapping[str, moved.Thirds]
) -> Iterator[Statement]:
    """The paper's statements on every candidate."""
    for version in versions:
        label, part = version.label, pooled[version.label]
        n = f"n {len(part.reference.gold)}"
        true, entropy = (confidence.shift(m, part.reference, part.candidate) for m in ("p_true", "entropy"))
        gap = calibration.squared_error_shift(part.reference, part.candidate)
        yield Statement(_PAPER, f"{label}: the right answer becomes less probable", "below", true,
                        f"{spelled(true.scaled(100.0), 'pp', signed=True)}, {n}")  # fmt: skip
        yield Statement(_PAPER, f"{label}: answers become less certain, entropy over the choices rises", "above",
                        entropy, f"{spelled(entropy, 'bit', signed=True)}, {n}")  # fmt: skip
        yield Statement(_PAPER, f"{label}: calibration becomes worse", "above", gap,
                        f"squared gap {spelled(gap.scaled(1e4), 'pp²', signed=True)}, {n}")  # fmt: skip
        if label in thirds:
            yield from _moved(label, thirds[label], n, version.about.bits_per_weight < _LOW_BITS)


def _moved(label: str, third: moved.Thirds, n: str, low_bits: bool) -> Iterator[Statement]:
    yield Statement(_PAPER, f"{label}: probabilities move more where the original was unsure", "above", third.more,
                    f"least sure third less surest {spelled(third.more.scaled(100.0), 'pp', signed=True)}, "
                    f"{n}")  # fmt: skip
    yield Statement(f"{_PAPER}, in log-odds", f"{label}: and not by the softmax's slope alone: log-odds too", "above",
                    third.more_odds, f"{spelled(third.more_odds, 'nat', signed=True)}, {n}")  # fmt: skip
    if low_bits:
        least, most = third.groups[0].size.estimate, third.groups[-1].size.estimate
        ratio = f"{least / most:.2g} times; " if most else ""
        yield Statement("acceptance A7.2", f"{label}: by {moved.TIMES:g} times or more", "above", third.more_by,
                        f"{ratio}beyond {moved.TIMES:g} times "
                        f"{spelled(third.more_by.scaled(100.0), 'pp', signed=True)}, {n}")  # fmt: skip
