"""A real server on a free port of this machine, and what a model writes alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.serve.app import create_app
from lowbit.serve.limits import Limits
from lowbit.serve.run import Server, bound
from lowbit.serve.served import Served
from lowbit.serve.service import Service


@dataclass(frozen=True)
class Address:
    """A running server: where it is, and what is behind it."""

    url: str
    service: Service
    server: Server


@contextmanager
def serving(models: list[Served], limits: Limits) -> Iterator[Address]:
    """A server in a thread of its own; engines stop with it."""
    started = threading.Event()
    urls: list[str] = []

    def on_start(url: str) -> None:
        urls.append(url)
        started.set()

    app = create_app(models, limits)
    server = Server(app, bound("127.0.0.1", 0), on_start)
    thread = threading.Thread(target=server.listen)
    thread.start()
    assert started.wait(20)
    try:
        yield Address(urls[0], app.state.service, server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def greedy(model: Any, tokenizer: Any, text: str, new: int) -> list[int]:
    """What transformers writes after a text."""
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return [int(i) for i in out[0, ids.shape[1] :]]
