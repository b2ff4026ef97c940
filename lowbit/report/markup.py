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


def section(title: str, *content: Html, key: str = "", kind: str = "") -> Html:
    """A headed section, or nothing where there is no content; ``key`` is where a link leads to."""
    inner = join([part for part in content if part], "\n")
    place = f' id="{plain(key)}"' if key else ""
    return Html(f"<section{place}{_class(kind)}>\n<h2>{plain(title)}</h2>\n{inner}\n</section>") if inner else Html("")


def paragraph(words: str, kind: str = "note") -> Html:
    return Html(f'<p class="{kind}">{plain(words)}</p>')


def head(title: str, unit: str = "", *, numeric: bool = False, about: str = "") -> Html:
    """The head of a column; ``about`` names the candidate that the whole column is of."""
    kind = _class("num" if numeric else "")
    return Html(f'<th scope="col"{_about(about)}{kind}>{plain(title)}{_sub(unit)}</th>')


def cell(main: str, sub: str = "", *, kind: str = "") -> Html:
    """A table cell with what qualifies it under it; ``kind`` is a class of the style sheet (``num``, ``text``)."""
    return Html(f"<td{_class(kind)}>{plain(main)}{_sub(sub)}</td>")


def row(cells: Iterable[Html], kind: str = "", *, flip: str = "") -> Html:
    """A line of a table; ``flip`` is the kind of a changed choice, by which a reader may choose."""
    return Html(f"<tr{_class(kind)}{f' data-flip={chr(34)}{plain(flip)}{chr(34)}' if flip else ''}>{join(cells)}</tr>")


def table(
    key: str, heads: Sequence[Html], rows: Sequence[Html], *, wide: bool = False, about: str = "", fixed: bool = False
) -> Html:
    """A table that scrolls sideways where the screen is narrow; keyboard users can focus and scroll it.

    The page's script sorts and filters it. ``about`` names the candidate that all of it is of; a ``fixed`` table is
    about none, and stays whole whatever the reader looks for.
    """
    return grouped(key, heads, [rows], wide=wide, about=about, fixed=fixed)


def grouped(
    key: str, heads: Sequence[Html], groups: Sequence[Sequence[Html]], *, wide: bool = False, about: str = "",
    fixed: bool = False,
) -> Html:  # fmt: skip
    """A table whose rows stay within their groups when they are sorted."""
    bodies = join((Html(f"<tbody>\n{join(rows, chr(10))}\n</tbody>") for rows in groups), "\n")
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{plain(key)}">'
        f'<table data-table="{plain(key)}"{_about(about)}{" data-fixed" if fixed else ""}'
        f"{_class('wide' if wide else '')}><thead><tr>{join(heads)}</tr></thead>\n{bodies}</table></div>"
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


def _about(label: str) -> str:
    return f' data-about="{plain(label)}"' if label else ""


def _sub(words: str) -> str:
    return f'<span class="sub">{plain(words)}</span>' if words else ""


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
