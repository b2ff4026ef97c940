"""A judge of known bias is seen through; an endpoint that is down or strange is an error by name."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from lowbit.errors import EvidenceError
from lowbit.evaluation.judge import Duel, Judge, judge

DUELS = [Duel("User: hi", "old" * (i % 3), "new", i) for i in range(12)]


def fair(prompt: str) -> str:
    """Prefers "new"."""
    a = prompt.partition("[Assistant A]\n")[2].partition("\n[End of A]")[0]
    return "because. [[A]]" if a == "new" else "because [[C]] no: [[B]]"


def test_wins_count_in_both_orders_and_bias_is_reported() -> None:
    found = judge(DUELS, fair)
    assert (found.wins, found.losses, found.ties, found.turned, found.noise) == (12, 0, 0, 0.0, 0.0)
    first = judge(DUELS, lambda _: "[[A]]")
    assert (first.ties, first.turned, first.noise) == (12, 1.0, 0.0)
    replies = iter("ABB" * 12)  # the third reply is to the same question as the first
    unsure = judge(DUELS, lambda _: f"[[{next(replies)}]]")
    assert (unsure.losses, unsure.turned, unsure.noise) == (12, 0.0, 1.0)
    silent = judge(DUELS, lambda _: "both are fine")
    assert (silent.ties, silent.unread) == (12, 36)


@pytest.fixture
def address() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            good = self.path.startswith("/good")
            body = b'{"choices": [{"message": {"content": "[[B]]"}}]}' if good else b"{}"
            self.send_response(404 if self.path.startswith("/gone") else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_endpoints(address: str) -> None:
    assert Judge(f"{address}/good", "m").ask("?") == "[[B]]"
    with pytest.raises(EvidenceError, match="the judge answers 404"):
        Judge(f"{address}/gone", "m").ask("?")
    with pytest.raises(EvidenceError, match="the judge does not answer: 'choices'"):
        Judge(f"{address}/odd", "m").ask("?")
    with pytest.raises(EvidenceError, match=r"the judge does not answer[\s\S]*leave --judge out"):
        Judge("http://127.0.0.1:9", "m").ask("?")
    with pytest.raises(EvidenceError, match="no http address"):
        Judge("file:///etc/passwd", "m")
