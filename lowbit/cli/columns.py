"""Plain columns on standard output."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lowbit.report.text import safe


def print_columns(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> None:
    """Rows under their heads, aligned; to the left in the columns named in ``left``, else to the right."""
    lines = [list(heads), *([safe(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(heads, line, widths, strict=True)
        print("  ".join(v.ljust(w) if head in left else v.rjust(w) for head, v, w in cells).rstrip())
