"""What a reader must know first: which versions got worse, which did not, and what is not known yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from lowbit.evaluation.findings import Finding
from lowbit.evaluation.task_findings import TaskFinding
from lowbit.report import text
from lowbit.report.model import Candidate, StudyReport
from lowbit.report.summary import DELTA_ACCURACY, DELTA_LOG_PPL

Judgement = Literal["worse", "better", "same", "unclear"]
JUDGEMENTS: tuple[Judgement, ...] = ("worse", "better", "same", "unclear")
_METRICS = {DELTA_LOG_PPL: "Δ log-ppl", DELTA_ACCURACY: "top-1 accuracy of tokens"}


class Change(NamedTuple):
    """One difference from the original, judged after adjustment; ``size`` is in margins, the larger the worse.

    ``words`` have its name, value and interval; ``beyond``: all of the interval is worse than the margin.
    """

    judgement: Judgement
    name: str
    words: str
    size: float
    beyond: bool


class Standing(NamedTuple):
    """One version and all of its changes, the most harmful first."""

    model: str
    candidate: str
    changes: tuple[Change, ...]

    def of(self, judgement: Judgement) -> list[Change]:
        """Those changes that were judged so, the largest first."""
        found = [change for change in self.changes if change.judgement == judgement]
        return found[::-1] if judgement == "better" else found

    @property
    def judgement(self) -> Judgement:
        """Worse where anything is; else better where anything is; the same only where everything is."""
        found = {change.judgement for change in self.changes}
        return next((j for j in ("worse", "better", "unclear", "same") if j in found), "unclear")


def standings(study: StudyReport) -> list[Standing]:
    """Every version that is scored, the worst first."""
    found = [_standing(report.reference.model_label, c) for report in study.reports for c in report.candidates]
    found = [s for s in found if s.changes]
    return sorted(found, key=lambda s: (JUDGEMENTS.index(s.judgement), -max(c.size for c in s.changes)))


def _standing(model: str, candidate: Candidate) -> Standing:
    return Standing(model, candidate.label, tuple(sorted(_changes(candidate), key=lambda c: -c.size)))


def _changes(candidate: Candidate) -> Iterator[Change]:
    for f in candidate.findings:
        if f.metric in _METRICS and (judgement := _judgement(f.verdict)):
            yield _change(judgement, _METRICS[f.metric], f, f.value, f.unit, f.metric == DELTA_ACCURACY)
    for t in candidate.task_findings:
        if judgement := _judgement(t.verdict):
            unit = "pp" if t.unit == "%" else t.unit
            name = t.task if t.measure == "accuracy" else f"{t.task}, {t.measure}"
            yield _change(judgement, name, t, t.delta, unit, t.better == "higher")


def _judgement(verdict: str) -> Judgement | None:
    """Measures in which neither direction is better ("changed") are no news of good or bad."""
    return next((j for j in JUDGEMENTS if j == verdict), None)


def _change(judgement: Judgement, name: str, f: Finding | TaskFinding, value: float, unit: str, higher: bool) -> Change:
    shown, interval = text.estimate(value, f.low, f.high, signed=True)
    margin = f.margin or 0.0
    harm = -value if higher else value
    beyond = judgement == "worse" and margin > 0 and (f.high < -margin if higher else f.low > margin)
    words = " ".join(part for part in (name, shown, interval, unit) if part)
    words += f", beyond the margin of {margin:g} {unit}" if beyond else ""
    return Change(judgement, name, words, harm / margin if margin else harm, beyond)


def lead(found: Sequence[Standing]) -> list[tuple[str, str]]:
    """Sentences with the class of the style sheet that each goes by; a kind that nothing is of is said, too, if bad."""
    total = len(found)
    counts = {j: sum(s.judgement == j for s in found) for j in JUDGEMENTS}
    beyond = sum(any(c.beyond for c in s.changes) for s in found)
    worse = f"{counts['worse']} of {_versions(total)} got worse"
    worse += f", {beyond} of them beyond the margin" if counts["worse"] else ""
    lines = [("worse" if counts["worse"] else "same", f"{worse}.")]
    if counts["better"]:
        lines.append(("better", f"{_versions(counts['better'])} improved, and got worse in nothing."))
    if counts["same"]:
        lines.append(("same", f"{_versions(counts['same'])} within the margin of the original in everything."))
    if counts["unclear"]:
        lines.append(("", f"{_versions(counts['unclear'])} not told apart from the original, nor shown to be like it."))
    return lines


def _versions(count: int) -> str:
    return f"{count} version{'' if count == 1 else 's'}"
