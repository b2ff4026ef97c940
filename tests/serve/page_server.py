"""A server with two models that say what a test wants, in the OpenAI protocol; the page cannot tell the difference."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lowbit.serve.page import headers, page

Token = tuple[str, dict[str, float]]
"""What is written, and the probabilities of the likeliest tokens at that place."""


@dataclass
class Script:
    """What the models answer, and what they were asked."""

    answers: dict[str, list[Token]]
    delay_s: float = 0.0
    refusal: tuple[int, dict[str, str], str] | None = None
    api_key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    cut: bool = False


def event(model: str, token: Token | None, reason: str | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": reason}
    if token is not None:
        top = [_entry(text, p) for text, p in token[1].items()]
        written = {**_entry(token[0], token[1][token[0]]), "top_logprobs": top}
        choice |= {"delta": {"content": token[0]}, "logprobs": {"content": [written]}}
    return b"data: " + json.dumps({"model": model, "choices": [choice]}).encode() + b"\n\n"


def _entry(text: str, p: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "logprob": math.log(p)}


@contextmanager
def served(script: Script) -> Iterator[str]:
    """The address of a server that plays the script."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, kind: str, body: bytes, extra: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **extra}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def json(self, value: object, status: int = 200, extra: dict[str, str] | None = None) -> None:
            self.reply(status, "application/json", json.dumps(value).encode(), extra or {})

        def do_GET(self) -> None:
            if self.path == "/":
                self.reply(200, "text/html; charset=utf-8", page().encode(), headers())
            elif script.api_key and self.headers["Authorization"] != f"Bearer {script.api_key}":
                self.json({"error": {"message": "an API key is needed"}}, 401)
            elif self.path == "/v1/models":
                cards = [{"id": name, "bits_per_weight": 16 - 2 * i} for i, name in enumerate(script.answers)]
                self.json({"data": cards[::-1]})
            else:
                each = {name: {"memory_bytes": 40_000_000 + i} for i, name in enumerate(script.answers)}
                self.json({"memory_bytes": 410_000_000, "models": each})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.asked.append(body)
            if script.refusal is not None:
                status, extra, message = script.refusal
                self.json({"error": {"message": message}}, status, extra)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            tokens = script.answers[body["model"]]
            try:
                for token in tokens:
                    self.wfile.write(event(body["model"], token))
                    self.wfile.flush()
                    time.sleep(script.delay_s)
                if script.cut:
                    return
                self.wfile.write(event(body["model"], None, "stop"))
                usage = {"prompt_tokens": 3, "completion_tokens": len(tokens), "total_tokens": 3 + len(tokens)}
                self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
                self.wfile.write(b"data: [DONE]\n\n")
            except (BrokenPipeError, ConnectionResetError):
                return  # the page stopped the answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
