"""The main table, and that of tasks, in a terminal, in a pipe, in an issue (Markdown) or for a program (JSON)."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lowbit.evaluation.metrics.agreement import Flips
from lowbit.report import text
from lowbit.report.model import Report, StudyReport
from lowbit.report.panel import Claim, Panel, Titled
from lowbit.report.summary import main_table, notes
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.report.task_summary import task_notes, task_table

Style = Literal["auto", "plain", "md", "json"]

_COLOURS = {
    "worse": "dark_orange", "better": "deep_sky_blue1", "same": "green", "reference": "dim", "supported": "green",
    "contradicted": "dark_orange",
}  # fmt: skip
_EXPENDABLE = ("Flips", "Bits/weight", "Top-1 kept", "KL / floor", "p")
"""Columns that a narrow terminal does without, the first first."""


def show(report: Report, style: Style = "auto") -> None:
    """Prints the report's main table and its notes on standard output, then those of the tasks where there are any.

    ``auto``: a coloured table on a terminal, aligned plain text in a pipe. ``md`` pastes into an issue, ``json``
    holds everything in the report.
    """
    if style == "auto" and sys.stdout.isatty():
        _rich(report)
        return
    makers = {"auto": plain, "plain": plain, "md": markdown, "json": to_json}
    sys.stdout.write(makers[style](report) + "\n")


def show_panel(panel: Panel, style: Style = "auto") -> None:
    """Prints what an analysis found, but for its figures and the tables that a page folds away."""
    console = Console() if style == "auto" and sys.stdout.isatty() else None
    lines = [] if style == "md" else [text.safe(panel.title)]
    lines += [f"- {text.safe(line)}" for line in panel.lead]
    tables = [Titled("Claims", _claims(panel.claims))] if panel.claims else []
    tables += [t for t in panel.tables if not t.folded]
    if console is not None:
        console.print(*(Text(line) for line in lines), sep="\n")
        for t in tables:
            _rich_table(console, t.table, t.title, ())
        for note in panel.notes:
            console.print(Text(text.safe(note), style="dim"))
        return
    if style == "md":
        lines = [f"### {_escape_markdown(text.safe(panel.title))}", "", *map(_escape_markdown, lines)]
    for t in tables:
        lines += ["", f"**{_escape_markdown(text.safe(t.title))}**", "", *_piped(t.table, ())] if style == "md" else [
            "", text.safe(t.title), *_aligned(t.table)
        ]  # fmt: skip
    spelled = [text.safe(note) for note in panel.notes]
    lines += ["", *(f"{_escape_markdown(n)}  " if style == "md" else n for n in spelled)] if spelled else []
    sys.stdout.write("\n".join(lines) + "\n")


def _claims(claims: Sequence[Claim]) -> Table:
    rows = [Row((Cell(c.claim, c.source), Cell(c.found), Cell(c.verdict)), c.verdict) for c in claims]
    columns = (Column("Claim", "source", False), Column("Found here", "95 % CI", False), Column("Verdict", "", False))
    return Table(columns, tuple(rows))


def plain(report: Report) -> str:
    """Columns aligned by spaces, one line a version, then the notes."""
    return "\n\n".join("\n".join([*_aligned(shown), "", *map(text.safe, below)]) for _, shown, below in _tables(report))


def _tables(report: Report) -> list[tuple[str, Table, list[str]]]:
    """The tables that a report has, each with its title and the notes below it."""
    found = [(report.title, main_table(report), notes(report))] if report.has_tokens else []
    if tasks := task_table(report):
        found.append(("What it can still do", tasks, task_notes(report)))
    return found


def _aligned(shown: Table) -> list[str]:
    heads, rows = _lines(shown)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(
            v.rjust(w) if c.numeric else v.ljust(w) for v, w, c in zip(line, widths, shown.columns, strict=True)
        ).rstrip()
        for line in (heads, *rows)
    ]


def markdown(report: Report) -> str:
    """A GitHub table, then the notes."""
    return "\n\n".join("\n".join(_piped(shown, below)) for _, shown, below in _tables(report))


def _piped(shown: Table, below: Sequence[str]) -> list[str]:
    heads, rows = _lines(shown)
    rule = ["---:" if c.numeric else ":---" for c in shown.columns]
    lines = [f"| {' | '.join(map(_escape_markdown, line))} |" for line in (heads, *rows)]
    lines.insert(1, f"|{'|'.join(rule)}|")
    return [*lines, "", *(f"{_escape_markdown(text.safe(n))}  " for n in below)]


def to_json(report: Report | StudyReport) -> str:
    """Every field as one JSON object (a study: ``reports``, ``panels``); a number that is not finite becomes null."""
    return json.dumps(_finite(asdict(report)), indent=2, ensure_ascii=False, allow_nan=False)


def _rich(report: Report) -> None:
    console = Console()
    for i, (title, shown, below) in enumerate(_tables(report)):
        if i:
            console.print()
        _rich_table(console, shown, title, below)


def _rich_table(console: Console, shown: Table, title: str, below: Sequence[str]) -> None:
    kept, dropped = _fitting(shown, console.width)
    table = RichTable(box=None, header_style="bold", pad_edge=False, title=Text(text.safe(title)))
    table.title_justify = "left"
    for column in (shown.columns[i] for i in kept):
        name = Text(text.safe(column.title))
        name.append(f"\n{text.safe(column.unit)}", style="not bold dim")
        table.add_column(name, justify="right" if column.numeric else "left", overflow="fold")
    for row in shown.rows:
        cells = [_rich_cell(row.cells[i]) for i in kept]
        cells[-1].stylize(_COLOURS.get(row.verdict, ""))
        table.add_row(*cells, style="dim" if row.is_reference else "")
    console.print(table)
    if dropped:
        console.print(Text(f"Left out on {console.width} columns: {', '.join(dropped)}.", style="dim"))
    for note in below:
        console.print(Text(text.safe(note), style="dim"))


def _fitting(shown: Table, width: int) -> tuple[list[int], list[str]]:
    """Indices of the columns that fit in ``width`` characters, and the titles of those left out to make them fit."""

    def natural(i: int) -> int:
        lines = [*shown.columns[i][:2], *(line for row in shown.rows for line in row.cells[i])]
        return 2 + max(len(text.safe(line)) for line in lines)

    kept, dropped = list(range(len(shown.columns))), []
    for title in _EXPENDABLE:
        if sum(map(natural, kept)) - 2 <= width:
            break
        dropped.append(title)
        kept = [i for i in kept if shown.columns[i].title != title]
    return kept, dropped


def _rich_cell(cell: Cell) -> Text:
    shown = Text(text.safe(cell.main))
    return shown.append(f"\n{text.safe(cell.sub)}", style="dim") if cell.sub else shown


def _lines(shown: Table) -> tuple[list[str], list[list[str]]]:
    return [_head(c) for c in shown.columns], [[_joined(c) for c in row.cells] for row in shown.rows]


def _head(column: Column) -> str:
    return text.safe(f"{column.title} ({column.unit})" if column.unit else column.title)


def _joined(cell: Cell) -> str:
    return text.safe(
        f"{cell.main} {cell.sub}".rstrip() if cell.sub.startswith("[") or not cell.sub else f"{cell.main} ({cell.sub})"
    )


def _escape_markdown(value: str) -> str:
    return "".join(f"\\{c}" if c in "\\|`*_<>" else c for c in value)


def _finite(value: Any) -> Any:
    if isinstance(value, Flips):
        return value._asdict()
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
