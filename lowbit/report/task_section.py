"""The section of the page that says what the versions can still do."""

from __future__ import annotations

from lowbit.evaluation.task_findings import TaskFinding
from lowbit.report import text
from lowbit.report.markup import Html, cell, details, drawn, head, join, paragraph, row, table
from lowbit.report.model import Candidate, LostItem, Report
from lowbit.report.task_summary import Asked, answered, asked, difference, flips, level, task_notes, task_table

_PROMPT_CHARACTERS = 400
_VERDICT_CLASSES = frozenset({"worse", "better", "same"})


def tasks(report: Report) -> Html:
    """Tasks by versions, what qualifies the numbers, all findings, and items that were lost; nothing without tasks."""
    candidates = answered(report)
    if not candidates:
        return Html("")
    heads = [head("Task", "measure"), head("Items", numeric=True), head("Reference", numeric=True)]
    heads += [head(c.label, "Δ, 95 % CI, lost/gained/other, verdict", numeric=True) for c in candidates]
    return join(
        [
            table("tasks", heads, [_row(one, candidates) for one in asked(report)], wide=True),
            *(paragraph(line) for line in task_notes(report)),
            _all(report),
            *(details(_title(c), _lost(c)) for c in candidates if c.lost_items),
        ],
        "\n",
    )


def _row(one: Asked, candidates: list[Candidate]) -> Html:
    cells = [cell(one.task, one.measure), cell(f"{one.one.n:,}", kind="num"), cell(level(one.one), kind="num")]
    return row(cells + [_shown(one.found.get(c.label)) for c in candidates])


def _shown(f: TaskFinding | None) -> Html:
    if f is None:
        return cell(text.MISSING, kind="num")
    value, interval = difference(f)
    counts = "" if f.flips is None else flips(f)
    kind = f"num {f.verdict}" if f.verdict in _VERDICT_CLASSES else "num"
    return cell(value, " · ".join(part for part in (interval, counts, f.verdict) if part), kind=kind)


def _all(report: Report) -> Html:
    shown = task_table(report)
    if shown is None:
        return Html("")
    return details(f"All {len(shown.rows)} findings on tasks, with p values", drawn("task findings", shown))


def _title(c: Candidate) -> str:
    return f"{c.label}: items that it lost, those first of which the reference was surest ({len(c.lost_items)} shown)"


def _lost(c: Candidate) -> Html:
    heads = [
        head("Margin", numeric=True),
        head("Task", "item"),
        head("Question"),
        head("Reference answers"),
        head("Candidate answers"),
    ]
    return table(f"lost by {c.label}", heads, [_lost_row(item) for item in c.lost_items])


def _lost_row(item: LostItem) -> Html:
    shown = item.prompt
    if len(shown) > _PROMPT_CHARACTERS:
        shown = "…" + shown[-_PROMPT_CHARACTERS:]
    words = (shown, item.reference_answer, item.candidate_answer)
    return row(
        [
            cell(f"{item.margin_ref:.3f}", kind="num"),
            cell(item.task, item.id),
            *(cell(" ".join(w.split()) or "(empty)", kind="text") for w in words),
        ]
    )
