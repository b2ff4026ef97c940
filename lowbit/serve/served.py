"""A model as the server knows it: its engine, its tokenizer, its name and its digest."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel

from lowbit.formats.heads import CacheFormat
from lowbit.runtime.batching import Batcher
from lowbit.runtime.engine import Engine
from lowbit.serve.errors import ApiError
from lowbit.serve.protocol import Message, ModelCard, ModelHealth

_CONTEXT = 2048  # where a configuration names none


@dataclass(frozen=True, eq=False)
class Served:
    """``digest`` is of the weights' bytes and ``context`` what the model reads at most, new tokens included."""

    name: str
    digest: str
    tokenizer: Any
    engine: Engine
    context: int
    vocab: int
    weights_bytes: int
    bits: float | None
    kv: CacheFormat | None
    created: int
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _spelled: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, digest: str, model: PreTrainedModel, tokenizer: Any, *, kv: CacheFormat | None = None,
        slots: int = 8, queue: int = 64, chunk: int = 128, context: int | None = None, bits: float | None = None,
    ) -> Served:  # fmt: skip
        """Start an engine for a loaded model. Raises what :class:`Batcher` raises."""
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or _CONTEXT
        batcher = Batcher(model, tokenizer, kv=kv, slots=slots, queue=queue, chunk=chunk)
        held = itertools.chain(model.parameters(), model.buffers())
        return cls(
            name, digest, tokenizer, Engine(batcher), min(longest, context or longest),
            int(model.get_input_embeddings().num_embeddings),  # type: ignore[arg-type]
             sum(p.numel() * p.element_size() for p in held), bits, kv,
            int(time.time()),
        )  # fmt: skip

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text. One thread at a time, for a tokenizer is no more patient than that."""
        with self._turn:
            return list(self.tokenizer.encode(text, add_special_tokens=special))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def admit(self, sequences: int) -> None:
        """Raises ApiError for more sequences in one request than the queue could ever hold."""
        room = self.engine.batcher.queue
        if sequences > room:
            raise ApiError(400, f"{sequences} sequences in one request, the queue holds {room}", param="n")

    def prompts(self, given: Sequence[str | list[int]]) -> list[tuple[int, ...]]:
        """The tokens of texts; token ids as they are."""
        return [tuple(self.encode(prompt) if isinstance(prompt, str) else prompt) for prompt in given]

    def texts(self, given: Sequence[str | list[int]]) -> list[str]:
        """Texts as they are; those of token ids."""
        return [prompt if isinstance(prompt, str) else self.decode(prompt) for prompt in given]

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Messages as the model's own template writes them. Raises ApiError without one, and for what it refuses."""
        if not self.tokenizer.chat_template:
            raise ApiError(
                400, f"{self.name} has no chat template: use /v1/completions, or serve a model that was tuned to chat",
                param="messages", code="no_chat_template",
            )  # fmt: skip
        turns = [{"role": _role(m), "content": _content(m)} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, ValueError) as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
        return self.encode(str(text), special=False)

    def check(self, prompt: Sequence[int], new: int, param: str) -> None:
        """Raises ApiError for a prompt that the model cannot read, with what it shall write."""
        if not prompt:
            raise ApiError(400, "the prompt has no tokens", param=param)
        if max(prompt) >= self.vocab:
            raise ApiError(400, f"token {max(prompt)} of a vocabulary of {self.vocab}", param=param)
        if len(prompt) + new > self.context:
            raise ApiError(
                400, f"{len(prompt)} tokens of prompt and {new} new ones; {self.name} reads at most {self.context}",
                param=param, code="context_length_exceeded",
            )  # fmt: skip

    @functools.cached_property
    def _anchor(self) -> list[int]:
        return self.encode("a", special=False)[-1:]

    def spell(self, token: int) -> str:
        """A token's own text, its leading space too; ``token_id:N`` where it has none, such as half a character.

        Cost two short decodes the first time, then a look-up; at most the vocabulary is kept.
        """
        if token not in self._spelled:
            before = self.decode(self._anchor)
            text = self.decode([*self._anchor, token])[len(before) :]
            broken = not text or "\N{REPLACEMENT CHARACTER}" in text
            self._spelled[token] = f"token_id:{token}" if broken else text
        return self._spelled[token]

    def card(self) -> ModelCard:
        return ModelCard(
            id=self.name, created=self.created, digest=self.digest, max_model_len=self.context,
            bits_per_weight=self.bits, memory_bytes=self.weights_bytes, kv="raw" if self.kv is None else str(self.kv),
            chat_template=bool(self.tokenizer.chat_template),
        )  # fmt: skip

    def health(self) -> ModelHealth:
        load = self.engine.batcher.load()
        return ModelHealth(digest=self.digest, memory_bytes=self.weights_bytes, **load._asdict())


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _content(message: Message) -> str:
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
