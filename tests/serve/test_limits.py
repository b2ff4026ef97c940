"""What the server refuses, and how it lets go: hostile bodies, keys, queues, time, clients that vanish, its own end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from pydantic import ValidationError
from serving import Address, serving
from tiny import family_model

from lowbit.runtime.requests import Done, Event, Scored
from lowbit.runtime.sampling import Token
from lowbit.serve.answers import Completions, pieces, whole
from lowbit.serve.asking import requests
from lowbit.serve.limits import Limits
from lowbit.serve.protocol import Body, ChatBody, CompletionBody, DetokenizeBody
from lowbit.serve.served import Served

ENDLESS = {"model": "slow", "prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "temperature": 0, "stream": True}


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of an answer; a body of bytes is sent as it is."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"} | headers)
    try:
        with urlopen(request, timeout=20) as answer:
            return answer.status, dict(answer.headers), json.loads(answer.read())
    except HTTPError as error:
        with error:
            return error.code, dict(error.headers), json.loads(error.read())


def until(holds: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def endless(tokenizer: Any, **how: Any) -> Served:
    """A model that can write for ever: ALiBi has no last position."""
    served = Served.of("slow", "f" * 64, family_model("bloom", n_layer=1), tokenizer, **how)
    return dataclasses.replace(served, context=1_000_000)


@pytest.fixture(scope="module")
def slow(tokenizer: Any) -> Iterator[Address]:
    """One slot, a queue of one, a key, small bodies; a model that can write for ever."""
    served = endless(tokenizer, slots=1, queue=1)
    with serving([served], Limits(body=2000, key="open sesame", seconds=60.0, upload_seconds=0.3)) as found:
        yield found


AUTH = {"Authorization": "Bearer open sesame"}


def idle(address: Address) -> bool:
    load = address.service.models["slow"].engine.batcher.load()
    return load.running == load.waiting == load.kv_bytes == 0


def test_bodies_that_mean_nothing_are_refused_in_one_shape(address: Address) -> None:
    url = f"{address.url}/v1/completions"
    good = '"model": "low", "prompt": "a"'
    bodies = [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"model": "low"}',
        b'{%b, "max_tokens": 1e999}', b'{%b, "temperature": NaN}', b'{%b, "n": true}', b'{%b, "n": "1"}',
        b'{%b, "max_tokens": -1}', b'{%b, "max_tokens": 99999999999999999999999}', b'{%b, "stop": [""]}',
        b'{%b, "seed": 1%b}', b'{%b, "logit_bias": {"\\ud800": 1}}', b'{%b, "\\ud800": 1}', b'{%b, "top_p": 0}',
        b'{"model": "low", "prompt": "\\ud800"}', b'{"model": "low", "prompt": [1, "a"]}',
        b'{"model": "low", "prompt": []}', b'{"model": "low", "prompt": [[]]}', b'{"model": "low", "prompt": [-1]}',
        b'{"model": "low", "prompt": {"a": 1}}', b'{%b, "stream_options": {"include_usage": true}}',
    ]  # fmt: skip
    for body in bodies:
        sent = body.replace(b"%b", good.encode(), 1).replace(b"%b", b"0" * 5000)
        status, _, found = ask(url, sent)
        assert (status, list(found)) == (400, ["error"]), sent[:60]
        assert found["error"]["type"] == "invalid_request_error"
        assert found["error"]["message"]
    assert ask(f"{address.url}/nowhere")[2]["error"]["type"] == "not_found_error"
    assert ask(f"{address.url}/v1/completions")[0] == 405
    assert ask(f"{address.url}/v1/completions", {"model": "\x00", "prompt": "a"})[0] == 404
    assert ask(url, {"model": "low", "prompt": ["a"] * 65})[2]["error"]["message"].startswith("65 sequences in one")


MANY = 50_000


@pytest.mark.parametrize(
    ("kind", "body", "place"),
    [
        (CompletionBody, {"prompt": [None] * MANY}, "prompt.(ids).0"),
        (CompletionBody, {"prompt": [1] * 1_000_001}, "prompt.(ids)"),
        (CompletionBody, {"prompt": ["a", *[1] * MANY]}, "prompt.(texts).1"),
        (CompletionBody, {"prompt": [[1, *[None] * MANY]]}, "prompt.(id lists).0.1"),
        (CompletionBody, {"prompt": "a", "stop_token_ids": [None] * MANY}, "stop_token_ids.0"),
        (CompletionBody, {"prompt": "a", "stop": [None] * MANY}, "stop.(list).0"),
        (CompletionBody, {"prompt": "a", "stop": ["a" * 130] * 16}, "stop.(list)"),
        (CompletionBody, {"prompt": "a", "logit_bias": {str(i): None for i in range(MANY)}}, "logit_bias"),
        (CompletionBody, {"prompt": "a", **{f"x{i}": 0 for i in range(MANY)}}, "x0"),
        (ChatBody, {"messages": [0] * MANY}, "messages.0"),
        (ChatBody, {"messages": [{"role": "user", "content": [0] * MANY}]}, "messages.0.content.(list).0"),
        (DetokenizeBody, {"tokens": [None] * MANY}, "tokens.0"),
    ],
)  # fmt: skip
def test_a_body_of_many_errors_has_one(kind: type[Body], body: dict[str, Any], place: str) -> None:
    """Validation runs in the server's loop: it stops at the first."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "m"} | body)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors(include_input=False)] == [place]


def test_a_refusal_names_the_field_and_the_limit(address: Address) -> None:
    def refused(path: str, **body: Any) -> tuple[str, str]:
        status, _, found = ask(f"{address.url}/v1/{path}", {"model": "low"} | body)
        assert status == 400
        return found["error"]["param"], found["error"]["message"]

    assert refused("completions", prompt="a", stop=["b"] * 17)[1].startswith("stop: List should have at most 16 items")
    assert refused("completions", prompt="a", stop=["b" * 130] * 16) == (
        "stop", "stop: at most 2048 characters together, not 2080",
    )  # fmt: skip
    assert refused("completions", prompt=[1, "b"]) == ("prompt.1", "prompt.1: Input should be a valid integer")
    assert refused("completions", prompt=3)[1].startswith("prompt: must be a text, token ids")
    assert refused("completions", prompt="a", logit_bias={str(i): 1 for i in range(301)})[1].endswith("not 301")
    for key in ("01", "+1", " 1", "1_0", "288"):
        assert refused("completions", prompt="a", logit_bias={key: 1})[0] == "logit_bias"
    assert refused("chat/completions", messages=[0]) == ("messages.0", "messages.0: must be an object")


def test_too_many_sequences_are_refused_before_anything_is_built(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: object) -> None:
        raise AssertionError

    low = address.service.models["low"]
    body = CompletionBody(model="low", prompt="a", n=3, seed=7)
    made = requests(body, [[1, 2], [3]], [1, 1], None, False, low, 1.0)
    assert [r.prompt for r in made] == [(1, 2)] * 3 + [(3,)] * 3
    assert len({id(r.prompt) for r in made}) == 2
    assert [r.sampling.seed for r in made] == [7, 8, 9] * 2
    for name in ("prompts", "chat"):
        monkeypatch.setattr(Served, name, built)
    for prompt, n in ((["a"] * 5, 13), ([[1]] * 65, 1), ([[1]] * 1024, 64)):
        found = ask(f"{address.url}/v1/completions", {"model": "low", "prompt": prompt, "n": n})[2]["error"]
        assert (found["param"], found["message"]) == (
            "n", f"{len(prompt) * n} sequences in one request, the queue holds 64",
        )  # fmt: skip


def test_a_loopback_server_answers_to_its_own_names_only(address: Address) -> None:
    """Or else a web page whose name is made to point to 127.0.0.1 could read it."""
    port = address.url.rpartition(":")[2]
    for host in (f"localhost:{port}", "LOCALHOST", "127.0.0.1", f"[::1]:{port}"):
        assert ask(f"{address.url}/health", Host=host)[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]"):
        for path in ("/health", "/v1/models", "/openapi.json"):
            status, _, found = ask(address.url + path, Host=host)
            assert (status, found["error"]["type"]) == (403, "permission_error")
    assert ask(f"{address.url}/v1/models/org/name")[2]["error"]["message"].startswith("no model 'org/name' here")


def test_a_long_answer_is_built_beside_the_loop(models: list[Served], monkeypatch: pytest.MonkeyPatch) -> None:
    """And a token is spelled once."""
    low, decoded, threads = models[0], Counter[int](), set[int]()

    class Told(Completions):
        def _table(self, index: int, tokens: Sequence[Token]) -> Any:
            threads.add(threading.get_ident())
            return super()._table(index, tokens)

    def decode(served: Served, ids: Sequence[int]) -> str:
        decoded[ids[-1]] += 1
        return str(low.tokenizer.decode(list(ids)))

    async def asked() -> AsyncIterator[tuple[int, Event]]:
        yield 0, Scored(tuple(Token(7, -1.0, ((8, -0.5), (7, -1.0))) for _ in range(50)))
        yield 0, Done("length", 50, 0)

    async def use(stream: bool) -> Any:
        kind = Told("low", "d", low.spell, ["a" * 50], 2)
        events: Any = asked()
        if stream:
            return [piece async for piece in pieces(events, kind, 1, 50, False)]
        return await whole(events, kind, 1, 50)

    monkeypatch.setattr(Served, "decode", decode)
    low._spelled.clear()
    assert len(asyncio.run(use(stream=False)).choices[0].logprobs.tokens) == 50
    assert len(asyncio.run(use(stream=True))) == 4
    assert decoded[7] == decoded[8] == 1
    assert threads
    assert threading.get_ident() not in threads


def test_bodies_have_a_size_and_a_time(slow: Address) -> None:
    url = f"{slow.url}/v1/completions"
    assert ask(url, b"x" * 2001, **AUTH)[0] == 413
    host, port = slow.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: {AUTH['Authorization']}\r\n"
    chunks = "Transfer-Encoding: chunked\r\n\r\n" + "3e8\r\n" + "y" * 1000 + "\r\n"
    for rest, status in ((chunks + "3e8\r\n" + "y" * 1000 + "\r\n" + "1\r\ny\r\n", 413), (chunks, 408)):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall((head + rest).encode())
            assert connection.recv(100).startswith(f"HTTP/1.1 {status}".encode())


def test_a_key_opens_everything_but_health_and_the_page(slow: Address) -> None:
    for key in ({}, {"Authorization": "Bearer open"}, {"Authorization": "Basic open sesame"}, {"Authorization": "é"}):
        status, headers, found = ask(f"{slow.url}/v1/models", **key)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert found["error"]["code"] == "invalid_api_key"
    assert ask(f"{slow.url}/v1/models", **AUTH)[0] == 200
    status, _, health = ask(f"{slow.url}/health")
    assert (status, health["status"]) == (200, "ok")
    assert health["models"]["slow"]["slots"] == 1
    with urlopen(f"{slow.url}/") as answer:
        assert "script-src" in answer.headers["Content-Security-Policy"]
        assert b"<html" in answer.read()


def test_a_full_queue_says_when_and_metrics_count(slow: Address) -> None:
    url = f"{slow.url}/v1/completions"
    batcher = slow.service.models["slow"].engine.batcher
    first = urlopen(Request(url, json.dumps(ENDLESS).encode(), {"Content-Type": "application/json"} | AUTH))
    until(lambda: batcher.load().running == 1)
    second = urlopen(Request(url, json.dumps(ENDLESS).encode(), {"Content-Type": "application/json"} | AUTH))
    until(lambda: batcher.load().waiting == 1)
    status, headers, found = ask(url, ENDLESS, **AUTH)
    assert (status, found["error"]["code"]) == (429, "queue_full")
    assert int(headers["retry-after"]) >= 1
    with urlopen(Request(f"{slow.url}/metrics", headers=AUTH)) as answer:
        counted = dict(re.findall(r"^(lowbit_\S+?)(?:\{[^}]*\})? (\S+)$", answer.read().decode(), re.MULTILINE))
    assert counted["lowbit_waiting"] == counted["lowbit_running"] == "1.0"
    assert float(counted["lowbit_kv_bytes"]) > 0
    assert counted["lowbit_sequences_total"] == "1.0"  # the one that was refused
    first.close()  # the second has its place, until it goes too
    until(lambda: batcher.load()[:2] == (0, 1))
    second.close()
    until(lambda: idle(slow))


def test_a_client_that_is_killed_or_hangs_up_frees_its_slot(slow: Address) -> None:
    host, port = slow.url.removeprefix("http://").split(":")
    for stream in (True, False):
        body = json.dumps(ENDLESS | {"stream": stream})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: {AUTH['Authorization']}\r\n"
        sent = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        script = (
            "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
            "s.sendall(sys.argv[3].encode())\nwhile s.recv(4096): pass"
        )
        client = subprocess.Popen([sys.executable, "-S", "-E", "-c", script, host, port, sent])
        until(lambda: not idle(slow))
        client.kill()
        client.wait()
        until(lambda: idle(slow))
    short = ENDLESS | {"max_tokens": 3, "stream": False}
    assert ask(f"{slow.url}/v1/completions", short, **AUTH)[2]["usage"]["completion_tokens"] == 3


def test_time_is_limited_and_the_end_is_told(tokenizer: Any) -> None:
    """A request beyond its time; then a server that stops: new ones are refused, the running one is told."""
    served = endless(tokenizer)
    with serving([served], Limits(seconds=0.5, grace=0.2)) as address:
        url = f"{address.url}/v1/completions"
        status, _, found = ask(url, ENDLESS | {"stream": False})
        assert (status, found["error"]["code"], found["error"]["type"]) == (504, "timeout", "timeout_error")
    assert not served.engine.alive
    again = endless(tokenizer)
    with serving([again], Limits(grace=0.2)) as address:
        url, said = f"{address.url}/v1/completions", []
        running = urlopen(Request(url, json.dumps(ENDLESS).encode(), {"Content-Type": "application/json"}))
        reader = threading.Thread(target=lambda: said.extend(running.read().decode().split("\n\n")))
        reader.start()
        until(lambda: again.engine.batcher.load().running == 1)
        address.service.stopping = True
        assert ask(url, ENDLESS)[0] == 503
        assert ask(f"{address.url}/health")[2]["status"] == "stopping"
    reader.join(10)
    running.close()
    assert said[-2:] == ["data: [DONE]", ""]
    assert json.loads(said[-3].removeprefix("data: "))["error"]["code"] == "shutdown"
