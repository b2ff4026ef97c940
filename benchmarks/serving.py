"""Serving: tokens a second, time to the first token and memory at 1, 4 and 16 streams, beside other servers.

    python benchmarks/serving.py --lowbit OUT --dense MODEL [--gguf FILE --llama-python PYTHON] [--tokens 64]

Each server is a process of its own on this machine, one after the other, asked by the same client over HTTP for the
same greedy continuations of prompts of unlike length; a JSON line each, medians over ``--repeats``. ``lowbit`` serves
OUT (``--kv`` adds a second run with keys and values in few bits), ``lowbit dense`` serves MODEL; ``transformers`` is
its own ``transformers serve``, plain and with continuous batching; ``llama.cpp`` is ``python -m llama_cpp.server``,
which answers one request at a time. A server that does not start or fails is reported with what it said. Tokens are
counted as the pieces of text that arrive; a first token is the first piece. Memory is the most that the process held.
Peers may end a text early; rates are of what came.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil

TEXT = (
    "The river was quiet in the morning, and the lamps along the quay had just been put out. Seven boats lay under the "
    "ice of the harbour, and the men who owned them stood on the stones and spoke of the price of salt, as they had "
    "done every winter since the great fire, when half of the town had moved to the other side of the water."
)

_WAIT = [
    "--interrupt_requests",
    "false",
]  # llama_cpp.server otherwise ends a stream when another request comes


class Peer(NamedTuple):
    """A server: its command line, what requests call its model, and what else they say."""

    name: str
    command: list[str]
    model: str
    extra: dict[str, Any]


class Stream(NamedTuple):
    first_s: float
    seconds: float
    tokens: int


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server of ours ends with us
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowbit", type=Path, required=True, help="a native checkpoint")
    parser.add_argument("--dense", type=Path, help="the original, for lowbit's dense run and transformers serve")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-python", default=sys.executable, help="a Python with llama-cpp-python[server]")
    parser.add_argument("--kv", default="", help="a KV format for one more run of lowbit")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=48, help="words of the longest prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--only", nargs="*", help="names of servers to run")
    a = parser.parse_args()
    facts = {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": a.threads, "load": os.getloadavg()[0]}
    print(json.dumps(facts | {"tokens": a.tokens, "prompt_words": a.prompt, "repeats": a.repeats}), flush=True)
    for peer in peers(a):
        if a.only and peer.name not in a.only:
            continue
        try:
            for row in measured(peer, a):
                print(json.dumps(row), flush=True)
        except (OSError, RuntimeError, ValueError) as error:
            print(json.dumps({"server": peer.name, "failed": f"{type(error).__name__}: {error}"[:1500]}), flush=True)


def peers(a: argparse.Namespace) -> Iterator[Peer]:
    slots = ["--slots", str(max(a.streams)), "--kernels", a.kernels, "--port", "PORT", "--name", "m"]
    ours = [sys.executable, "-m", "lowbit.cli", "serve"]
    full = {"ignore_eos": True}
    yield Peer("lowbit", [*ours, str(a.lowbit), *slots], "m", full)
    if a.kv:
        yield Peer(f"lowbit {a.kv}", [*ours, str(a.lowbit), *slots, "--kv", a.kv], "m", full)
    if a.dense:
        yield Peer("lowbit dense", [*ours, str(a.dense), *slots], "m", full)
        model = str(a.dense.resolve())
        theirs = [
            str(Path(sys.executable).parent / "transformers"),
            "serve",
            model,
            "--port",
            "PORT",
            "--device",
            "cpu",
        ]
        yield Peer("transformers", theirs, model, {})
        yield Peer("transformers batching", [*theirs, "--continuous-batching"], model, {})
    if a.gguf:
        llama = [a.llama_python, "-m", "llama_cpp.server", "--model", str(a.gguf), "--port", "PORT"]
        never = {"logit_bias": {str(token): -100 for token in ends(a.lowbit)}}
        yield Peer("llama.cpp", [*llama, "--n_threads", str(a.threads), "--model_alias", "m", *_WAIT], "m", never)


def ends(checkpoint: Path) -> list[int]:
    """The tokens that end a text, which a server without ``ignore_eos`` is told never to write."""
    found = json.loads((checkpoint / "config.json").read_text())["eos_token_id"]
    return found if isinstance(found, list) else [found]


def measured(peer: Peer, a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with running(peer, a.threads) as (url, process):
        ask(url, peer, prompt(0, a.prompt), 4)  # its first request is another matter
        for count in a.streams:
            runs = [together(url, peer, count, a) for _ in range(a.repeats)]
            streams = [stream for run in runs for stream in run]
            rates = [sum(s.tokens for s in run) / max(s.seconds for s in run) for run in runs]
            yield {
                "server": peer.name, "streams": count, "tokens_per_s": round(statistics.median(rates), 2),
                "tokens_per_s_all": [round(rate, 2) for rate in rates],
                "first_token_s": round(statistics.median(s.first_s for s in streams), 4),
                "first_token_s_worst": round(max(s.first_s for s in streams), 4),
                "tokens": statistics.median(s.tokens for s in streams), "memory_mb": round(peak(process) / 1e6),
            }  # fmt: skip


@contextmanager
def running(peer: Peer, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server that answers. Raises RuntimeError with what it said when it does not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(port) if part == "PORT" else part for part in peer.command]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = psutil.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
            while not answers(url):
                if process.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    raise RuntimeError(f"{command[:4]} does not answer: {said.read()[-800:]}")
                time.sleep(0.2)
            yield url, process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/v1/models", timeout=5) as answer:
            return bool(answer.status == 200)
    except HTTPError:
        return True  # transformers lists models of the hub only
    except OSError:
        return False


def together(url: str, peer: Peer, count: int, a: argparse.Namespace) -> list[Stream]:
    """So many streams at once; raises RuntimeError when one of them fails."""
    found: list[Stream | Exception] = []

    def one(i: int) -> None:
        try:
            found.append(ask(url, peer, prompt(i, a.prompt), a.tokens))
        except (OSError, ValueError) as error:
            found.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = [stream for stream in found if isinstance(stream, Stream)]
    if len(good) < count:
        raise RuntimeError(f"{count - len(good)} of {count} streams failed: {found}")
    return good


def ask(url: str, peer: Peer, text: str, tokens: int) -> Stream:
    body = {"model": peer.model, "prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True, **peer.extra}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    start, first, pieces = time.perf_counter(), 0.0, 0
    with urlopen(request, timeout=1200) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"])
            if event.get("choices") and event["choices"][0].get("text"):
                first = first or time.perf_counter() - start
                pieces += 1
    if not pieces:
        raise ValueError("no text came")
    return Stream(first, time.perf_counter() - start, pieces)


def prompt(i: int, words: int) -> str:
    """Prompts of a quarter to the whole of ``words``, none the beginning of another."""
    known = TEXT.split()
    length = words // 4 + i * 7 % (words - words // 4 + 1)
    return " ".join([f"Chapter {i + 1}.", *(known[(i * 5 + k) % len(known)] for k in range(length))])


def peak(process: psutil.Process) -> int:
    """The most memory that a process held, in bytes."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel tells no VmHWM")


if __name__ == "__main__":
    main()
