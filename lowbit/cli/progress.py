"""Progress with rate and time left: live on a terminal, a line now and then when piped."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self


class Bars:
    """Named bars; ``update`` creates one on first use. Writes to standard error, so that results can be piped."""

    def __init__(self) -> None:
        self._live: Any = None
        self._tasks: dict[str, Any] = {}
        self._said: dict[str, tuple[float, float]] = {}
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._live = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, name: str, done: int, total: int, unit: str) -> None:
        """Move a bar; several calls a millisecond are fine."""
        now = time.monotonic()
        started, last = self._said.setdefault(name, (now, now))
        rate = done / (now - started) if now > started + 0.5 else 0.0
        text = f"{rate:,.1f} {unit}/s" if rate else ""
        if self._live is not None:
            if name not in self._tasks:
                self._tasks[name] = self._live.add_task(name, total=total, unit=unit, rate="")
            self._live.update(self._tasks[name], completed=done, total=total, rate=text)
        elif now - last >= 10 or (done >= total and now - started >= 2):
            self._said[name] = (started, now)
            left = f", {(total - done) / rate:,.0f} s left" if rate and done < total else ""
            print(f"{name}: {done} of {total} {unit}{', ' + text if text else ''}{left}", file=sys.stderr, flush=True)

    def finish(self, name: str, note: str) -> None:
        """Replace a bar by a line that says how it ended."""
        if self._live is not None:
            if name in self._tasks:
                self._live.remove_task(self._tasks.pop(name))
            self._live.console.print(f"{name}: {note}", highlight=False, markup=False)
        else:
            print(f"{name}: {note}", file=sys.stderr, flush=True)
