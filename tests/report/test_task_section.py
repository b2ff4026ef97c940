"""Tasks in a report: a table of tasks by versions that needs no script, items that were lost, and nothing without."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html import unescape

import numpy as np
import pytest

from lowbit.evaluation.metrics.agreement import Flips
from lowbit.evaluation.task_findings import TaskFinding
from lowbit.report import page, task_section, terminal
from lowbit.report.model import LostItem, Report, StudyReport

HOSTILE = "</td></table><script>alert(1)</script>\x1b[31m"


def finding(task: str, measure: str, delta: float, verdict: str, flips: Flips | None) -> TaskFinding:
    return TaskFinding(
        task, measure, "%", "higher", 200, 150, 61.5, 61.5 + delta, delta, delta - 3.0, delta + 3.0, flips, 0.01,
        "exact McNemar", 0.2, 1.0, 4.2, False, 0.5, 0.02, 0.4, "holm, 3 tests", verdict, "a note",
    )  # fmt: skip


@pytest.fixture
def asked(study: Callable[..., Report]) -> Report:
    """Three versions: one answered two tasks, one answered the first of them, one none."""
    report = study(3)
    first, second, third = report.candidates
    lost = LostItem("copa", "copa/7", "Because of " + "x" * 600 + HOSTILE, " right", " wrong", 0.75)
    both = (finding("copa", "accuracy", -6.0, "worse", Flips(14, 2, 1)), finding("own", HOSTILE, 0.5, "same", None))
    first = dataclasses.replace(first, task_findings=both, lost_items=(lost,))
    second = dataclasses.replace(second, task_findings=(finding("copa", "accuracy", 1.0, "unclear", Flips(1, 3, 0)),))
    return dataclasses.replace(report, candidates=(first, second, third), task_notes=("bbq: left out",))


def cells(html: str, key: str) -> list[list[str]]:
    body = html.split(f'data-table="{key}"')[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", body)]
    return [[unescape(re.sub("<[^>]*>", " ", cell)).strip() for cell in row] for row in rows]


def test_the_table_holds_tasks_by_versions(asked: Report) -> None:
    html = page.render(StudyReport.alone(asked))
    head, *rows = cells(html.split("What it can still do")[1], "tasks")
    order = [c.label for c in sorted(asked.candidates[:2], key=lambda c: c.bytes_total)]
    assert [name.split()[0] for name in head[3:]] == order  # the third answered nothing
    both = 3 + order.index(asked.candidates[0].label)
    assert rows[0][:3] == ["copa accuracy", "200", "61.5 %"]
    assert rows[0][both] == "−6 pp [−9, −3] · 14/2/1 · worse"
    assert rows[0][7 - both] == "+1 pp [−2, +4] · 1/3/0 · unclear"
    assert rows[1][both].endswith("· same")
    assert rows[1][7 - both] == "–"
    assert html.index("What it can still do") < html.index("Size against loss")
    assert "bbq: left out" in html


def test_versions_that_only_answered_tasks_have_no_table_of_tokens(asked: Report) -> None:
    bare = tuple(dataclasses.replace(c, findings=(), kl_by_block=(), kl_by_position=(), flips=())
                 for c in asked.candidates)  # fmt: skip
    protocol = dataclasses.replace(asked.protocol, text="", windows=0, length=0, tokens=0, clusters=0)
    alone = dataclasses.replace(asked, candidates=bare, protocol=protocol)
    html = page.content(StudyReport.alone(alone)).main
    titles = re.findall("<h2>(.*?)</h2>", html)
    assert titles == ["What changed, and what is missing", "What it can still do", "How this was made"]
    assert "tokens scored" not in html
    assert "2 of 2 versions got worse" not in html
    assert "1 of 2 versions got worse" in html
    for shown in (terminal.plain(alone), terminal.markdown(alone)):
        assert "log-ppl" not in shown
        assert shown.lstrip("| ").startswith("Task")
    assert terminal.plain(asked).endswith(terminal.plain(alone))


def test_a_family_is_a_line_before_its_tasks_with_mean_interval_and_counts(asked: Report) -> None:
    first, second, third = asked.candidates
    loss = dataclasses.replace(finding("stereo", "share", 2.0, "worse", None), better="lower")
    first = dataclasses.replace(first, task_findings=(*first.task_findings, loss))
    known = (("copa", "basic"), ("stereo", "basic"), ("own", "own"))
    html = task_section.tasks(dataclasses.replace(asked, candidates=(first, second, third), families=known))
    head, *rows = cells(html, "tasks")
    names = ["basic 2 tasks", "copa accuracy", "stereo share", "own 1 task"]
    assert [row[0] for row in rows][:4] == names
    here = [name.split()[0] for name in head].index(first.label)
    half = np.hypot(3.0, 3.0) / 2  # two tasks, each known to ±3
    low, high = f"{-4 - half:.1f}", f"{-4 + half:.1f}"  # -6, and +2 where lower is better
    assert rows[0][here] == f"−4.0 pp [{low}, {high}] · 2 worse".replace("-", "−")
    assert rows[0][7 - here] == "+1 pp [−2, +4] · 1 unclear"
    assert rows[3][7 - here] == "–"
    assert html.count("<tbody>") - task_section.tasks(asked).count("<tbody>") == 1  # rows are sorted within a family


def test_lost_items_are_shown_cut_and_harmless(asked: Report) -> None:
    html = task_section.tasks(asked)
    _, (margin, item, question, before, after) = cells(html, f"lost by {asked.candidates[0].label}")
    assert (margin, item, before, after) == ("0.750", "copa copa/7", "right", "wrong")
    assert question.startswith("…xxx")
    assert len(question) < 420
    assert "<script" not in html
    assert "\x1b" not in html


def test_terminal_markdown_and_json_hold_every_finding(asked: Report) -> None:
    plain, markdown = terminal.plain(asked), terminal.markdown(asked)
    label = re.escape(asked.candidates[0].label)
    assert re.search(
        rf"\ncopa +accuracy +{label} +200 \(150 clusters\) +61.5 % +−6 pp \[−9, −3\] +14/2/1 +0.02 +worse \(a note\)\n",
        plain,
    )
    assert "holm, 3 tests" in plain
    assert "up to 0.500 % of items change (copa)" in plain
    assert "copa 4.20 pp, own 4.20 pp" in plain
    assert "| copa | accuracy |" in markdown
    assert r"\<script" in markdown
    told = json.loads(terminal.to_json(asked))["candidates"][0]
    assert told["task_findings"][0]["flips"] == {"lost": 14, "gained": 2, "other": 1}
    assert told["lost_items"][0]["id"] == "copa/7"


def test_without_tasks_nothing_is_said(study: Callable[..., Report]) -> None:
    report = study(2)
    assert task_section.tasks(report) == ""
    assert "can still do" not in page.render(StudyReport.alone(report))
    assert "Reference" not in terminal.plain(report).split("Paired")[0]
