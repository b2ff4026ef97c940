"""A panel: what one analysis of a study found, as plain values that the page, the terminal and JSON all show.

An analysis fills a panel and knows nothing of HTML or of charts; whoever draws a panel knows nothing of the analysis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from lowbit.report.table import Table

Verdict = Literal["supported", "contradicted", "undecided"]


@dataclass(frozen=True)
class Claim:
    """Somebody's statement beside what was measured here.

    ``source`` is a paper (``arXiv:2309.05210``); ``found`` holds the number, its interval, its unit and n.
    """

    source: str
    claim: str
    found: str
    verdict: Verdict


class Mark(NamedTuple):
    """One value of a curve; ``low`` and ``high`` are its interval, equal to it where there is none."""

    series: str
    x: float
    value: float
    low: float
    high: float
    note: str = ""
    """What a reader who points at the mark is told beside the number."""


@dataclass(frozen=True)
class Curves:
    """Values over a number, a line a series. ``levels`` are named horizontal lines; ``diagonal`` draws y = x.

    ``steps``: the value holds until the next x (a survival curve). ``lines``: marks of a series are joined.
    """

    key: str
    title: str
    caption: str
    x: str
    y: str
    marks: tuple[Mark, ...]
    log_x: bool = False
    log_y: bool = False
    levels: tuple[tuple[str, float], ...] = ()
    diagonal: bool = False
    steps: bool = False
    lines: bool = True


class Square(NamedTuple):
    """One square of a map; ``shown`` is the number with its interval, for people."""

    x: str
    y: str
    value: float
    shown: str


@dataclass(frozen=True)
class Heat:
    """Values over two things that are not numbers to interpolate between; rows and columns in order of appearance.

    ``diverging``: 0 is the middle of the colours, so that better and worse differ in hue.
    """

    key: str
    title: str
    caption: str
    x: str
    y: str
    value: str
    squares: tuple[Square, ...]
    log: bool = False
    diverging: bool = False


class Titled(NamedTuple):
    """A table with what it is called; ``folded`` tables are behind a line to open."""

    title: str
    table: Table
    folded: bool = False


@dataclass(frozen=True)
class Panel:
    """What one analysis found: sentences first, then claims with verdicts, tables, figures and qualifications."""

    key: str
    title: str
    lead: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    tables: tuple[Titled, ...] = ()
    figures: tuple[Curves | Heat, ...] = ()
    notes: tuple[str, ...] = ()
