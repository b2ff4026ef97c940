"""A conversation with a model: messages in its own chat template, answers token by token, one cache for all turns.

Of every turn only what the cache has not seen is read, as long as the template writes earlier turns as they were read;
where it does not, the conversation is read again. The answers are the same either way.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lowbit.arrays import Float, Tensor
from lowbit.errors import ModelError, RecipeError
from lowbit.formats.heads import CacheFormat
from lowbit.runtime.detokenize import TextStream
from lowbit.runtime.growing import growing_cache
from lowbit.runtime.kvcache import KVCache
from lowbit.runtime.sampling import GREEDY, Sampler, Sampling

_CHUNK = 256  # tokens of a prompt that are read between two looks at ``stop``


@dataclass(frozen=True)
class Answer:
    """What was written, and at what speed. Seconds count from the question."""

    text: str
    tokens: int
    """Written, the one that ends the answer included."""
    read: int
    """Tokens of the conversation that were read for it; those in the cache already are not among them."""
    first_s: float
    """When the first token was known."""
    seconds: float
    finish: str
    """``stop``: the model ended it; ``length``: all tokens were written; ``interrupted``."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None for less than two."""
        return (self.tokens - 1) / (self.seconds - self.first_s) if self.tokens > 1 else None


class Conversation:
    """``messages`` is the history, in OpenAI's form. ``kv`` None keeps keys and values as they are.

    Raises ModelError for a model whose tokenizer has no chat template.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, kv: CacheFormat | None = None, sampling: Sampling = GREEDY,
        context: int = 4096,
    ) -> None:  # fmt: skip
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "has no chat template", where=str(model.name_or_path),
                why="what a turn looks like is part of what a chat model was trained on",
                fix="a model that was tuned to chat, or lowbit generate -p, which continues a text",
            )  # fmt: skip
        self._model, self._tokenizer, self._kv = model, tokenizer, kv
        self.sampling, self.context = sampling, context
        self._takes = inspect.signature(model.forward).parameters
        ends = model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self.reset()

    def reset(self) -> None:
        """Begins anew: no messages, not even the system's, and draws as at the start."""
        self.messages: list[dict[str, str]] = []
        self._draws = Sampler(self.sampling)
        self._forget()

    def system(self, text: str) -> None:
        """Sets the system's message, before all others; empty takes it away."""
        self.messages = [m for m in self.messages if m["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are stored."""
        if isinstance(self._cache, KVCache):
            return self._cache.nbytes
        held = (getattr(layer, part, None) for layer in self._cache.layers for part in ("keys", "values"))
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    @torch.inference_mode()
    def ask(
        self, text: str, max_tokens: int, on_text: Callable[[str], object] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Answer:  # fmt: skip
        """The answer to one more message; both join the history, also when ``stop`` ended it.

        Pieces of text go to ``on_text`` as soon as they are certain. Raises RecipeError, with the history as it was,
        when the conversation does not fit ``context`` or the template refuses it.
        """
        started = time.perf_counter()
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._ids(asked)
        if len(ids) + max_tokens > self.context:
            raise RecipeError(
                f"{len(ids)} tokens of conversation and {max_tokens} new ones, at most {self.context} fit",
                where="chat", fix="/reset, or fewer new tokens",
            )  # fmt: skip
        known = len(self._seen)
        if self._seen != ids[:known] or known >= len(ids):
            self._forget()
            known = 0
        stream, pieces, written, first_s, finish = TextStream(self._tokenizer, ids), [""], 0, 0.0, "length"
        try:
            logits = self._read(ids[known:], stop)
            while logits is not None and written < max_tokens:
                token = self._draws.draw(logits)
                written += 1
                first_s = first_s or time.perf_counter() - started
                if token in self._ends:
                    finish = "stop"
                    break
                pieces.append(stream.push(token))
                on_text(pieces[-1])
                if written < max_tokens:
                    logits = self._read([token], stop)
            else:
                finish = "length" if written == max_tokens else "interrupted"
        except BaseException:
            self._forget()  # what was being written when it broke is in some layers and not in others
            raise
        pieces.append(stream.finish())
        on_text(pieces[-1])
        answer = "".join(pieces)
        if written:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        return Answer(answer, written, len(ids) - known, first_s, time.perf_counter() - started, finish)

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, ValueError) as error:
            raise RecipeError(f"the chat template refuses these messages: {error}", where="chat") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _read(self, ids: list[int], stop: Callable[[], bool]) -> Float[Tensor, "vocab"] | None:
        """Logits after these tokens, which the cache then holds; None as soon as ``stop`` says so."""
        logits = None
        for start in range(0, len(ids), _CHUNK):
            if stop():
                return None
            part, before = ids[start : start + _CHUNK], len(self._seen)
            device, end = self._model.device, before + len(part)
            inputs: dict[str, Any] = {
                "input_ids": torch.tensor([part], device=device),
                "position_ids": torch.arange(before, end, device=device)[None],
                "attention_mask": torch.ones(1, end, dtype=torch.long, device=device),
                "logits_to_keep": 1,
            }
            given = {name: value for name, value in inputs.items() if name in self._takes}
            logits = self._model(**given, past_key_values=self._cache, use_cache=True).logits[0, -1]
            self._seen += part
        return logits

    def _forget(self) -> None:
        self._seen: list[int] = []
        config = self._model.config
        self._cache: Cache = growing_cache(config) if self._kv is None else KVCache(config, self._kv)
