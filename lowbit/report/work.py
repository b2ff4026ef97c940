"""How far a study is, as plain values: its cells, and what is left of them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

Status = Literal["done", "running", "failed", "blocked", "waiting"]
"""``blocked``: not run, because a cell that it needs failed; ``waiting``: not begun, or its worker died."""


class Step(NamedTuple):
    """How far a running cell is: ``done`` of ``total`` units, such as "blocks"."""

    done: int
    total: int
    unit: str


@dataclass(frozen=True)
class CellWork:
    """One cell of a study; ``why`` says what went wrong, ``seconds`` what a done one took."""

    label: str
    stage: str
    status: Status
    why: str = ""
    step: Step | None = None
    seconds: float | None = None

    @property
    def share(self) -> float:
        """How much of a running cell is done, from 0 to 1; 0 where that is not known."""
        if self.status != "running" or self.step is None or not 0 < self.step.done <= self.step.total:
            return 0.0
        return self.step.done / self.step.total


@dataclass(frozen=True)
class Work:
    """The cells of a study, in the order in which they are computed."""

    cells: tuple[CellWork, ...]

    def of(self, *statuses: Status) -> list[CellWork]:
        """Those cells that are in one of these states."""
        return [cell for cell in self.cells if cell.status in statuses]

    @property
    def is_over(self) -> bool:
        """Whether no cell is left that could still be computed."""
        return not self.of("running", "waiting")

    @property
    def seconds_left(self) -> float | None:
        """What the rest takes, if each cell takes as long as the done ones of its stage did (else as any did).

        Shared out over as many workers as run now. None before the first cell is done, and where nothing is left.
        """
        taken: dict[str, list[float]] = {}
        for cell in self.of("done"):
            if cell.seconds is not None:
                taken.setdefault(cell.stage, []).append(cell.seconds)
        if not taken or self.is_over:
            return None
        usual = fmean(s for seconds in taken.values() for s in seconds)
        left = sum(fmean(taken.get(cell.stage, [usual])) * (1.0 - cell.share) for cell in self.of("running", "waiting"))
        return left / max(1, len(self.of("running")))

    def sentence(self) -> str:
        """``12 of 40 cells done, 2 running, 1 failed, 3 not run because of it``."""
        parts = [f"{len(self.of('done'))} of {len(self.cells)} cells done"]
        told: tuple[tuple[Status, str], ...] = (
            ("running", "running"), ("failed", "failed"), ("blocked", "not run because of it"),
        )  # fmt: skip
        for status, words in told:
            if found := self.of(status):
                parts.append(f"{len(found)} {words}")
        return ", ".join(parts)
