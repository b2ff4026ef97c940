"""The few pieces of HTML that a report is made of. Every text argument is escaped here; ``Html`` never again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NewType

from lowbit.report import text
from lowbit.report.table import Table

Html = NewType("Html", str)
"""Markup that is safe to insert as it is."""


def plain(value: str) -> Html:
    """Text from anywhere, made safe and harmless to read."""
    return Html(escape(text.safe(value)))


def join(parts: Iterable[Html], between: str = "") -> Html:
    """The parts one after another."""
    return Html(between.join(parts))


def section(title: str, *content: Html) -> Html:
    """A headed section, or nothing where there is no content."""
    inner = join(content, "\n")
    return Html(f"<section>\n<h2>{plain(title)}</h2>\n{inner}\n</section>") if inner else Html("")


def paragraph(words: str, kind: str = "note") -> Html:
    return Html(f'<p class="{kind}">{plain(words)}</p>')


def head(title: str, unit: str = "", *, numeric: bool = False) -> Html:
    return Html(f'<th scope="col"{_class("num" if numeric else "")}>{plain(title)}{_sub(unit)}</th>')


def cell(main: str, sub: str = "", *, kind: str = "") -> Html:
    """A table cell with what qualifies it under it; ``kind`` is a class of the style sheet (``num``, ``text``)."""
    return Html(f"<td{_class(kind)}>{plain(main)}{_sub(sub)}</td>")


def row(cells: Iterable[Html], kind: str = "") -> Html:
    return Html(f"<tr{_class(kind)}>{join(cells)}</tr>")


def table(key: str, heads: Sequence[Html], rows: Sequence[Html], *, wide: bool = False) -> Html:
    """A table that scrolls sideways where the screen is narrow; keyboard users can focus and scroll it."""
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{plain(key)}">'
        f'<table data-table="{plain(key)}"{_class("wide" if wide else "")}>'
        f"<thead><tr>{join(heads)}</tr></thead>\n<tbody>\n{join(rows, chr(10))}\n</tbody></table></div>"
    )


def drawn(key: str, shown: Table, *, wide: bool = False) -> Html:
    """A table of plain values as markup."""
    heads = [head(c.title, c.unit, numeric=c.numeric) for c in shown.columns]
    kinds = ["num" if c.numeric else "" for c in shown.columns]
    rows = [
        row(
            [cell(*c, kind=kind) for c, kind in zip(line.cells, kinds, strict=True)],
            "reference" if line.is_reference else "",
        )
        for line in shown.rows
    ]
    return table(key, heads, rows, wide=wide)


def details(title: str, content: Html, *, is_open: bool = False) -> Html:
    return Html(f"<details{' open' if is_open else ''}><summary>{plain(title)}</summary>\n{content}\n</details>")


def _sub(words: str) -> str:
    return f'<span class="sub">{plain(words)}</span>' if words else ""


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
