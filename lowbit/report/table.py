"""A table as plain values: the page, the terminal and Markdown draw the same rows."""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """One cell: its value, and what qualifies it (an interval, a digest)."""

    main: str
    sub: str = ""


class Row(NamedTuple):
    """One line of a table; ``verdict`` is the bare word that a page may colour."""

    cells: tuple[Cell, ...]
    verdict: str = ""
    is_reference: bool = False


class Column(NamedTuple):
    """A header, its unit or qualification, and whether the cells are numbers (set to the right)."""

    title: str
    unit: str = ""
    numeric: bool = True


class Table(NamedTuple):
    """Columns and the rows under them."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
