"""Progress with rate and time left: live on a terminal, a line now and then when piped."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

_EVERY_S = 10.0  # between two lines about one task, where there is no terminal
_LEAST_S = 2.0  # a task shorter than this is not worth a line


@dataclass
class _Seen:
    """When a task was first heard of, how far it was then (a resumed one is far), and when a line was last printed."""

    started: float
    done: int
    printed: float

    def rate(self, done: int, now: float) -> float:
        """Units a second since it was first heard of; 0 while that is too early to say."""
        return (done - self.done) / (now - self.started) if now > self.started + 0.5 else 0.0


class Bars:
    """Named bars; ``update`` creates one on first use. Writes to standard error, so that results can be piped."""

    def __init__(self) -> None:
        self._live: Any = None
        self._tasks: dict[str, Any] = {}
        self._seen: dict[str, _Seen] = {}
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            self._live = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True)), BarColumn(24),
                MofNCompleteColumn(), TextColumn("{task.fields[unit]}"), TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip

    def __enter__(self) -> Bars:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, name: str) -> None:
        """Show a task of which nothing is known but that it runs; on a terminal only."""
        if self._live is not None and name not in self._tasks:
            self._tasks[name] = self._live.add_task(name, total=None, unit="", rate="")

    def update(self, name: str, done: int, total: int, unit: str) -> None:
        """Move a bar; several calls a millisecond are fine."""
        now = time.monotonic()
        seen = self._seen.get(name)
        if seen is None or done < seen.done:  # work of another unit begins anew
            seen = self._seen[name] = _Seen(now, done, now)
        rate = seen.rate(done, now)
        text = f"{rate:,.{0 if rate >= 100 else 1}f} {unit}/s" if rate else ""
        if self._live is not None:
            self.begin(name)
            self._live.update(self._tasks[name], completed=done, total=total, unit=unit, rate=text)
        elif now - seen.printed >= _EVERY_S or (done >= total and now - seen.started >= _LEAST_S):
            seen.printed = now
            parts = [f"{name}: {done:,} of {total:,} {unit}", *([text] if text else [])]
            parts += [f"{(total - done) / rate:,.0f} s left"] if rate and done < total else []
            print(", ".join(parts), file=sys.stderr, flush=True)

    def finish(self, name: str, note: str) -> None:
        """Replace a bar by a line that says how it ended."""
        self._seen.pop(name, None)
        if self._live is None:
            print(f"{name}: {note}", file=sys.stderr, flush=True)
            return
        if name in self._tasks:
            self._live.remove_task(self._tasks.pop(name))
        self._live.console.print(f"{name}: {note}", highlight=False, markup=False, soft_wrap=True)
