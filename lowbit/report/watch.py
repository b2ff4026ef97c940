"""The page of a study while it runs: served on this machine alone, built again when there is something new to say.

Three addresses: ``/`` is the page, ``/state`` how far the study is (asked for every second), ``/content`` what stands
under the page's head, as JSON, fetched when its version changed. The chart library is sent once, with the page.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Protocol, runtime_checkable

from lowbit.errors import LowbitError, StudyError
from lowbit.report import page, text
from lowbit.report.markup import Html
from lowbit.report.model import StudyReport
from lowbit.report.work import CellWork, Work

EVERY_S = 1.0  # between two looks at the store
_FAILURES = 5  # shown beside the progress; all stand in the page
_HOST = "127.0.0.1"
_HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}  # fmt: skip


@runtime_checkable
class Source(Protocol):
    """A study that may be running."""

    def work(self) -> Work:
        """How far its cells are; asked every second, so cheap."""

    def report(self) -> StudyReport:
        """What is found so far; asked when a cell came to an end."""


class Watched:
    """What is served: the page's content, of some version, and how far the study is. Threads may read it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._ended: frozenset[tuple[str, str]] | None = None
        self._content = page.Content("", "", Html(""))
        self._work = Work(())
        self._trouble = ""
        self._since: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()
        self.version = "none"
        self.built = 0
        """How often the page was built."""

    def refresh(self) -> None:
        """Look at the study; build the page anew where cells have ended since. An error of the tree is shown."""
        work = self._source.work()
        ended = frozenset((cell.label, cell.status) for cell in work.of("done", "failed", "blocked"))
        content, trouble = None, self._trouble
        if ended != self._ended:
            try:
                content, trouble = page.content(self._source.report()), ""
            except LowbitError as error:  # evidence that does not compare, say: the next cell may mend it
                trouble = str(error)
        with self._lock:
            self._work, self._ended, self._trouble = work, ended, trouble
            if content is not None:
                self._content, self.built = content, self.built + 1
                self.version = hashlib.sha256(content.main.encode()).hexdigest()[:16]

    def whole(self) -> str:
        """The page as it is now."""
        with self._lock:
            content, version = self._content, self.version
        return page.whole(content, live=version)

    def content(self) -> dict[str, Any]:
        """What stands under the page's head, with its version."""
        with self._lock:
            return {"version": self.version, **self._content._asdict()}

    def state(self) -> dict[str, Any]:
        """How far the study is, in sentences, and the version of the content."""
        with self._lock:
            work, version, trouble = self._work, self.version, self._trouble
        left = work.seconds_left
        sentence = work.sentence() + (f"; about {text.duration(left)} left" if left is not None else "")
        failed = [f"{c.label} failed: {' '.join(c.why.split())}" for c in work.of("failed")]
        more = [f"and {len(failed) - _FAILURES} more"] if len(failed) > _FAILURES else []
        return {
            "version": version, "cells": len(work.cells), "done": len(work.of("done")), "sentence": f"{sentence}.",
            "running": [self._running(c) for c in work.of("running")],
            "trouble": [*([trouble] if trouble else []), *failed[:_FAILURES], *more],
        }  # fmt: skip

    def _running(self, cell: CellWork) -> str:
        """A running cell with its rate since it was first seen, and the time that the rest takes at that rate."""
        if cell.step is None:
            return cell.label
        done, total, unit = cell.step
        now = time.monotonic()
        with self._lock:
            started, first = self._since.get(cell.label, (now, done))
            if done < first:  # work of another unit begins anew
                started, first = now, done
            self._since[cell.label] = started, first
        words = f"{cell.label}: {done:,} of {total:,} {unit}"
        if done > first and now > started:
            rate = (done - first) / (now - started)
            words += f", {text.number(rate)} {unit}/s, {text.duration((total - done) / rate)} left"
        return words


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of the three addresses, to whoever asks for this machine by its own name."""

    server: _Server
    server_version, sys_version = "lowbit", ""
    protocol_version = "HTTP/1.1"
    timeout: ClassVar[float] = 30.0

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{_HOST}:{port}", f"localhost:{port}"):  # a foreign name that leads here
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", "only by the name of this machine")
            return
        watched = self.server.watched
        match self.path.partition("?")[0]:
            case "/":
                self._answer(HTTPStatus.OK, "text/html", watched.whole())
            case "/state":
                self._answer(HTTPStatus.OK, "application/json", json.dumps(watched.state()))
            case "/content":
                self._answer(HTTPStatus.OK, "application/json", json.dumps(watched.content()))
            case _:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "nothing here")

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, kind: str, body: str) -> None:
        content = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")  # the page's own policy is in it
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """A request a second is no news."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, watched: Watched, port: int) -> None:
        self.watched = watched
        super().__init__((_HOST, port), _Handler)


def watch(
    source: Source, port: int, say: Callable[[str], object], wait: Callable[[float], object] = time.sleep
) -> None:
    """Serve the page of a study on this machine until interrupted; ``say`` is told its address.

    Errors of the store go upwards. Raises StudyError where the port is taken. ``wait`` is called between looks.
    """
    watched = Watched(source)
    try:
        server = _Server(watched, port)
    except OSError as error:
        raise StudyError(
            f"cannot listen: {error.strerror or error}", where=f"{_HOST}:{port}", fix="another --port (0: a free one)"
        ) from error
    with server:
        watched.refresh()
        page.chart_library()  # once, before anybody waits for it
        threading.Thread(target=server.serve_forever, daemon=True).start()
        say(f"http://{_HOST}:{server.server_address[1]}/")
        try:
            while True:
                wait(EVERY_S)
                watched.refresh()
        except KeyboardInterrupt:  # how a watch ends
            pass
        finally:
            server.shutdown()
