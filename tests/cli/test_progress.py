"""Progress into a pipe: seldom, with a rate that a resumed run does not flatter, and how much is left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lowbit.cli import progress


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_a_line_every_ten_seconds_with_rate_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bars() as bars:
        for done in range(26):  # one a second
            bars.update("walk", done, 100, "linears")
            clock.now += 1
    assert capsys.readouterr().err.splitlines() == [
        "walk: 10 of 100 linears, 1.0 linears/s, 90 s left",
        "walk: 20 of 100 linears, 1.0 linears/s, 80 s left",
    ]


def test_a_resumed_task_is_not_credited_with_what_was_there(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bars() as bars:
        bars.update("walk", 5000, 6000, "linears")
        clock.now += 10
        bars.update("walk", 5100, 6000, "linears")
    assert capsys.readouterr().err == "walk: 5,100 of 6,000 linears, 10.0 linears/s, 90 s left\n"


def test_short_tasks_print_nothing_and_long_ones_their_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bars() as bars:
        bars.update("short", 0, 2, "cells")
        bars.update("long", 0, 2, "cells")
        clock.now += 1
        bars.update("short", 2, 2, "cells")
        clock.now += 2
        bars.update("long", 2, 2, "cells")
    assert capsys.readouterr().err == "long: 2 of 2 cells, 0.7 cells/s\n"


def test_one_name_can_be_used_again_after_its_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bars() as bars:
        bars.update("floor", 1, 2, "tokens")
        bars.finish("floor", "done in 1.0 s")
        clock.now += 60
        bars.update("floor", 1, 2, "tokens")
    assert capsys.readouterr().err == "floor: done in 1.0 s\n"
