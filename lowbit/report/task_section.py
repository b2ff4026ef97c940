"""The section of the page that says what the versions can still do."""

from __future__ import annotations

from lowbit.evaluation.task_findings import TaskFinding
from lowbit.report import text
from lowbit.report.families import Family, families
from lowbit.report.markup import Html, cell, details, drawn, grouped, head, join, paragraph, row, table
from lowbit.report.model import Candidate, LostItem, Report
from lowbit.report.task_summary import Asked, answered, difference, flips, level, task_notes, task_table

_PROMPT_CHARACTERS = 400
_VERDICT_CLASSES = frozenset({"worse", "better", "same"})
_FAMILIES = (
    "A family's line: the mean over its tasks of the change of each one's first measure in percent, better being "
    "positive, with the interval over items (these tasks, not others like them); and its verdicts, counted."
)


def tasks(report: Report) -> Html:
    """Tasks by versions, what qualifies the numbers, all findings, and items that were lost; nothing without tasks."""
    candidates = answered(report)
    if not candidates:
        return Html("")
    heads = [head("Task", "measure"), head("Items", numeric=True), head("Reference", numeric=True)]
    heads += [head(c.label, "Δ, 95 % CI, lost/gained/other, verdict", numeric=True, about=c.label) for c in candidates]
    return join(
        [
            grouped("tasks", heads, _groups(report, candidates), wide=True),
            *(paragraph(line) for line in task_notes(report)),
            *([paragraph(_FAMILIES)] if report.families else []),
            _all(report),
            *(details(_title(c), _lost(c)) for c in candidates if c.lost_items),
        ],
        "\n",
    )


def _groups(report: Report, candidates: list[Candidate]) -> list[list[Html]]:
    """The tasks by family, each behind a line on the whole family; one group where no families are known."""
    return [
        [*([_family(one, candidates)] if one.name else []), *(_row(task, candidates) for task in one.tasks)]
        for one in families(report)
    ]


def _family(one: Family, candidates: list[Candidate]) -> Html:
    cells = [
        cell(one.name, f"{one.size} tasks" if one.size > 1 else "1 task"),
        cell("", kind="num"),
        cell("", kind="num"),
    ]
    for c in candidates:
        counts = " · ".join(f"{count} {verdict}" for verdict, count in one.verdicts(c.label).items())
        mean = one.mean(c.label)
        value, interval = ("", "") if mean is None else text.estimate(*mean, signed=True)
        shown = " · ".join(part for part in (interval, counts) if part)
        cells.append(cell(f"{value} pp" if value else text.MISSING, shown, kind="num"))
    return row(cells, "family")


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
    return table(f"lost by {c.label}", heads, [_lost_row(item) for item in c.lost_items], about=c.label)


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
