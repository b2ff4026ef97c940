"""Two tiny models behind a real server on a free port of this machine, and what they say alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import family_model

import lowbit
from lowbit.serve.app import create_app
from lowbit.serve.limits import Limits
from lowbit.serve.run import Server, bound
from lowbit.serve.served import Served
from lowbit.serve.service import Service

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


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


@pytest.fixture(scope="session")
def low_bit() -> Any:
    """LLaMA of 128 tokens of context."""
    return lowbit.quantize(family_model("llama"), "rtn:int4-g32")


@pytest.fixture(scope="session")
def chatting(tokenizer: Any) -> Any:
    """The tokenizer with a chat template."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="session")
def models(low_bit: Any, tokenizer: Any, chatting: Any) -> list[Served]:
    """``low`` without a chat template, ``chat`` with one."""
    return [
        Served.of("low", "d" * 64, low_bit, tokenizer, slots=4, bits=4.5),
        Served.of("chat", "e" * 64, family_model("gpt2", n_layer=1), chatting, slots=16, queue=300),
    ]


@pytest.fixture(scope="session")
def address(models: list[Served]) -> Iterator[Address]:
    with serving(models, Limits(seconds=60.0)) as found:
        yield found


@pytest.fixture(scope="session")
def client(address: Address) -> Iterator[Any]:
    """OpenAI's own."""
    import openai

    with openai.OpenAI(base_url=f"{address.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def greedy(model: Any, tokenizer: Any, text: str, new: int) -> list[int]:
    """What transformers writes after a text."""
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return [int(i) for i in out[0, ids.shape[1] :]]
