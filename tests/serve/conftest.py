"""Two tiny models behind a real server."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Address, serving
from tiny import family_model

import lowbit
from lowbit.serve.limits import Limits
from lowbit.serve.served import Served

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
