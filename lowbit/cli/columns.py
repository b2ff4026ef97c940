"""Plain columns on standard output."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def print_columns(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str]) -> None:
    """Rows under their heads, aligned; to the left in the columns named in ``left``, else to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lowbit.report.text import safe

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(Text(head), justify="left" if head in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(safe(value)) for value in row))
    console = Console()
    Console(width=None if console.is_terminal else 10_000).print(table)
