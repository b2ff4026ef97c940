"""One request on its way through a batch: what was read and written, and what its listener has been told."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lowbit.arrays import Float, Tensor
from lowbit.runtime.detokenize import Stops, TextStream
from lowbit.runtime.requests import Done, Progress, Reason, Request
from lowbit.runtime.sampling import Sampler, Token, judged


class Sequence:
    """A request on its way."""

    def __init__(self, number: int, request: Request, tokenizer: Any, ends: frozenset[int]) -> None:
        self.number, self.request = number, request
        self.cache: Cache | None = None  # while its prompt is read
        self.read, self.written, self.last = 0, 0, -1
        self.scored = [Token(request.prompt[0])] if request.score else []
        self._ends = request.ends if request.ignore_end else request.ends | ends
        self._sampler = Sampler(request.sampling, request.prompt)
        self._stream, self._stops = TextStream(tokenizer, request.prompt), Stops(request.stop)
        self._tokens: list[Token] = []

    def late(self, now: float) -> bool:
        return self.request.deadline is not None and now > self.request.deadline

    def take(self, logits: Float[Tensor, "vocab"]) -> bool:
        """Choose the next token and tell what it adds; whether the request has ended."""
        request, token = self.request, self._sampler.draw(logits)
        self.last, self.written = token, self.written + 1
        top = request.logprobs
        self._tokens.append(Token(token) if top is None else judged(logits[None], [token], top)[0])
        ended = token in self._ends
        text = self._stops.push("" if ended else self._stream.push(token))
        if not self._stops.found and (ended or self.written == request.max_tokens):
            text += self._stops.push(self._stream.finish())
            text += self._stops.finish()
        reason: Reason | None = "stop" if ended or self._stops.found else None
        if reason is None and self.written == request.max_tokens:
            reason = "length"
        if text or reason:
            request.on_event(Progress(text, tuple(self._tokens)))
            self._tokens = []
        if reason:
            request.on_event(Done(reason, len(request.prompt), self.written))
        return reason is not None


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the generation configuration's, else the tokenizer's."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    if named is None:
        named = tokenizer.eos_token_id
    return frozenset() if named is None else frozenset(named if isinstance(named, list) else [named])
