"""The head of the page: who got worse, who did not, what failed; and how far a study is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

from lowbit.evaluation.findings import Finding
from lowbit.report import alert_section
from lowbit.report.alerts import lead, standings
from lowbit.report.model import Candidate, Report, StudyReport
from lowbit.report.summary import DELTA_LOG_PPL
from lowbit.report.work import CellWork, Step, Work

HOSTILE = "boom </td><script>alert(1)</script>"
WORK = Work(
    (
        CellWork("reference", "reference", "done", seconds=40.0),
        CellWork("score a", "score", "done", seconds=10.0),
        CellWork("score b", "score", "done", seconds=20.0),
        CellWork("score c", "score", "running", step=Step(2, 3, "windows")),
        CellWork("score d", "score", "running"),
        CellWork("make e", "quantize", "failed", HOSTILE),
        CellWork("score e", "score", "blocked", "it needs 'make e'"),
        CellWork("blocks of a", "attribute", "waiting"),
    )
)


def judged(c: Candidate, verdict: str, value: float, half: float) -> Candidate:
    """The candidate with one finding: a change of log-perplexity against a margin of 0.01 nat."""
    f = c.finding(DELTA_LOG_PPL)
    assert isinstance(f, Finding)
    one = dataclasses.replace(f, value=value, low=value - half, high=value + half, verdict=verdict, margin=0.01)
    return dataclasses.replace(c, findings=(one,))


@pytest.fixture
def report(study: Callable[..., Report]) -> Report:
    cases = [("same", 0.001, 0.002), ("worse", 0.012, 0.004), ("worse", 0.5, 0.1), ("better", -0.2, 0.1)]
    cases.append(("unclear", 0.01, 0.05))
    found = study(5)
    return dataclasses.replace(
        found, candidates=tuple(judged(c, *case) for c, case in zip(found.candidates, cases, strict=True))
    )


def test_the_worst_stand_first_and_only_whole_intervals_are_beyond_the_margin(report: Report) -> None:
    found = standings(StudyReport.alone(report))
    labels = [c.label for c in report.candidates]
    assert [s.candidate for s in found] == [labels[i] for i in (2, 1, 3, 0, 4)]
    assert [s.changes[0].beyond for s in found] == [True, False, False, False, False]
    assert found[0].changes[0].words == "Δ log-ppl +0.50 [+0.40, +0.60] nat, beyond the margin of 0.01 nat"
    assert [kind for kind, _ in lead(found)] == ["worse", "better", "same", ""]
    assert lead(found)[0][1] == "2 of 5 versions got worse, 1 of them beyond the margin."
    assert lead([s for s in found if s.judgement == "same"])[0] == ("same", "0 of 1 version got worse.")


def test_accuracy_is_worse_downwards(report: Report) -> None:
    first = report.candidates[0]
    f = dataclasses.replace(
        first.findings[0], metric="delta_top1_accuracy", unit="pp", verdict="worse", value=-3.0, low=-4.0, high=-2.0,
        margin=1.0,
    )  # fmt: skip
    changed = dataclasses.replace(report, candidates=(dataclasses.replace(first, findings=(f,)),))
    assert standings(StudyReport.alone(changed))[0].changes[0].beyond


def test_failures_say_why_and_cannot_be_markup(report: Report) -> None:
    study = dataclasses.replace(StudyReport.alone(report), work=WORK)
    html = alert_section.alerts(study)
    rows = re.findall(r"<tr>.*?</tr>", html.split('data-table="failed"')[1])
    assert len(rows) == 3
    assert "&lt;script&gt;" in rows[1]
    assert "blocked" in rows[2]
    assert "<script" not in html
    assert "Not done: 3 of 8 cells" in html
    empty = dataclasses.replace(study, reports=())
    assert "Nothing is scored yet" in alert_section.alerts(empty)


def test_more_than_a_dozen_versions_fold(study: Callable[..., Report]) -> None:
    html = alert_section.alerts(StudyReport.alone(study(40)))
    assert "The 28 other versions" in html
    assert html.split("<details>")[1].count("<tr>") == 1 + 28


def test_time_left_is_by_stage_and_shared_by_the_workers() -> None:
    # two running scores of 15 s, one of them with a third left, and a stage never seen (the mean of all); two workers
    assert WORK.seconds_left == pytest.approx((15 / 3 + 15 + 70 / 3) / 2)
    assert WORK.sentence() == "3 of 8 cells done, 2 running, 1 failed, 1 not run because of it"
    assert not WORK.is_over
    assert Work(WORK.cells[3:]).seconds_left is None  # nothing to go by
    assert Work(WORK.cells[:3]).is_over
