"""The page of a running study: built when cells end, served to this machine alone, honest about how far it is."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from lowbit.errors import EvidenceError, StudyError
from lowbit.report import page, watch
from lowbit.report.model import Report, StudyReport
from lowbit.report.work import CellWork, Step, Work


class Study:
    """Four cells that the test moves, of a study of which only the reference is shown."""

    def __init__(self, make: Callable[..., Report]) -> None:
        self.make, self.asked = make, 0
        self.cells = [CellWork(name, "score", "waiting") for name in ("reference", "score a", "score b", "score c")]
        self.error: Exception | None = None

    def put(self, i: int, status: str, **more: object) -> None:
        self.cells[i] = dataclasses.replace(self.cells[i], status=status, **more)  # type: ignore[arg-type]

    def work(self) -> Work:
        return Work(tuple(self.cells))

    def report(self) -> StudyReport:
        self.asked += 1
        if self.error is not None:
            raise self.error
        done = sum(c.status == "done" for c in self.cells)
        return StudyReport("tiny", "now", "run", (self.make(0),) if done else (), work=self.work())


@pytest.fixture(autouse=True)
def _short_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "chart_library", lambda: "window.vegaEmbed = null;")


@pytest.fixture
def source(study: Callable[..., Report]) -> Study:
    return Study(study)


def test_the_page_is_built_when_a_cell_ends_and_only_then(source: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = watch.Watched(source)
    watched.refresh()
    assert "Nothing is scored yet" in watched.content()["main"]
    empty = watched.version
    source.put(0, "running", step=Step(10, 100, "windows"))
    watched.refresh()
    assert (watched.built, watched.version) == (1, empty)
    clock = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    assert watched.state()["running"] == ["reference: 10 of 100 windows"]
    clock[0] += 4
    source.put(0, "running", step=Step(30, 100, "windows"))
    watched.refresh()
    assert watched.state()["running"] == ["reference: 30 of 100 windows, 5.00 windows/s, 14.0 s left"]
    source.put(0, "done", seconds=8.0)
    source.put(1, "done", seconds=4.0)
    source.put(2, "running")
    watched.refresh()
    assert watched.built == source.asked == 2
    assert watched.version != empty
    assert watched.state()["sentence"] == "2 of 4 cells done, 1 running; about 12.0 s left."
    source.put(2, "failed", why="no\n  memory")
    watched.refresh()
    assert watched.state()["trouble"] == ["score b failed: no memory"]
    assert "no memory" in watched.content()["main"]


def test_evidence_that_cannot_be_read_is_said_and_tried_again(source: Study) -> None:
    watched = watch.Watched(source)
    source.put(0, "done")
    source.error = EvidenceError("does not compare", where="score a")
    watched.refresh()
    watched.refresh()
    assert source.asked == 1  # nothing new, so no second try
    assert "does not compare" in watched.state()["trouble"][0]
    source.error = None
    source.put(1, "done")
    watched.refresh()
    assert watched.state()["trouble"] == []


@pytest.fixture
def address(source: Study) -> Iterator[tuple[str, int]]:
    """A server that looks at its study when told to."""
    told: list[str] = []
    ready, end = threading.Event(), threading.Event()

    def wait(_: float) -> None:
        end.wait()
        raise KeyboardInterrupt

    def say(address: str) -> None:
        told.append(address)
        ready.set()

    thread = threading.Thread(target=watch.watch, args=(source, 0, say, wait))
    thread.start()
    assert ready.wait(20)
    yield "127.0.0.1", int(told[0].rstrip("/").rpartition(":")[2])
    end.set()
    thread.join(20)
    assert not thread.is_alive()


def test_it_answers_this_machine_alone_and_three_addresses(address: tuple[str, int]) -> None:
    def ask(path: str, method: str = "GET", host: str = "") -> tuple[http.client.HTTPResponse, bytes]:
        line = http.client.HTTPConnection(*address, timeout=20)
        line.request(method, path, headers={"Host": host or f"localhost:{address[1]}"})
        response = line.getresponse()
        body = response.read()
        line.close()
        return response, body

    response, body = ask("/")
    assert response.status == 200
    assert response.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert b"connect-src 'self'" in body
    assert b"not shown" not in body
    version = json.loads(ask("/state")[1])["version"]
    assert f'data-version="{version}"'.encode() in body
    assert json.loads(ask("/content")[1])["version"] == version
    assert ask("/state", "HEAD")[1] == b""
    assert ask("/report.html")[0].status == 404
    assert ask("/../../etc/passwd")[0].status == 404
    assert ask("/", host="evil.example")[0].status == 421
    assert ask("/", host=f"evil.example:{address[1]}")[0].status == 421
    assert ask("/", "POST")[0].status == 501


def test_a_port_that_is_taken_is_said(source: Study) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StudyError, match="cannot listen"):
        watch.watch(source, taken.getsockname()[1], print)


def test_a_saved_page_asks_nobody(study: Callable[..., Report]) -> None:
    assert "connect-src" not in page.render(StudyReport.alone(study(1)))
