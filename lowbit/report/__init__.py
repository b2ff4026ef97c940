"""What a study says, for people: ``write(report, path)`` makes one HTML file, ``show(report)`` prints its table."""

from pathlib import Path

from lowbit.report.model import (
    Band,
    BlockKL,
    Candidate,
    Environment,
    FlipRow,
    LostItem,
    Report,
    ScoringProtocol,
    StudyReport,
)  # fmt: skip
from lowbit.report.terminal import show


def write(report: StudyReport, path: Path) -> Path:
    """Writes the report as one HTML file, atomically; see ``lowbit.report.page.write``."""
    from lowbit.report import page  # altair takes a second to import: not for a table in the terminal

    return page.write(report, path)


__all__ = [
    "Band", "BlockKL", "Candidate", "Environment", "FlipRow", "LostItem", "Report", "ScoringProtocol",
    "StudyReport", "show", "write",
]  # fmt: skip
