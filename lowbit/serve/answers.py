"""Events as the bodies of OpenAI's API: whole, or piece by piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from lowbit.runtime.requests import Done, Event, Progress, Reason, Scored
from lowbit.runtime.sampling import Token
from lowbit.serve import protocol as p
from lowbit.serve.asking import Asked
from lowbit.serve.errors import ApiError

Spell = Callable[[int], str]


@runtime_checkable
class Kind(Protocol):
    """Completions or chat completions: how an answer is spelled."""

    def begin(self, index: int) -> BaseModel | None:
        """The first piece of a choice."""

    def piece(self, index: int, event: Event) -> BaseModel | None:
        """What an event adds to a stream."""

    def usage_piece(self, usage: p.Usage) -> BaseModel:
        """The last piece, when it was asked for."""

    def whole(self, choices: Sequence[Gathered], usage: p.Usage) -> BaseModel: ...


@dataclass
class Gathered:
    """A choice as it has come so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: Reason = "length"


async def whole(asked: Asked, kind: Kind, count: int, read: int) -> BaseModel:
    """The whole answer. ``count`` choices, ``read`` tokens of prompts. Raises ApiError when a sequence failed."""
    choices, written = [Gathered() for _ in range(count)], 0
    async for index, event in asked:
        choice = choices[index]
        if isinstance(event, Done):
            choice.reason = event.reason
            written += event.written
        elif isinstance(event, Progress):
            choice.text += event.text
            choice.tokens += event.tokens
        elif isinstance(event, Scored):
            choice.tokens += event.tokens
    return await run_in_threadpool(kind.whole, choices, _usage(read, written))


async def pieces(asked: Asked, kind: Kind, count: int, read: int, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events; a failure is the last event, in the shape of an error."""
    written = 0
    try:
        for index in range(count):
            if (first := kind.begin(index)) is not None:
                yield _event(first)
        async for index, event in asked:
            if isinstance(event, Done):
                written += event.written
            if isinstance(event, Scored):  # a whole prompt, which may be long; the others are a token or few
                text = await run_in_threadpool(_told, kind, index, event)
            else:
                text = _told(kind, index, event)
            if text:
                yield text
        if with_usage:
            yield _event(kind.usage_piece(_usage(read, written)))
    except ApiError as error:
        yield f"data: {error.json()}\n\n"
    yield "data: [DONE]\n\n"


def _usage(read: int, written: int) -> p.Usage:
    return p.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def _told(kind: Kind, index: int, event: Event) -> str:
    piece = kind.piece(index, event)
    return "" if piece is None else _event(piece)


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json()}\n\n"


class _Named:
    """What every piece of an answer carries."""

    prefix = ""

    def __init__(self, model: str, digest: str, spell: Spell) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created, self.model, self.digest, self.spell = int(time.time()), model, digest, spell


class Completions(_Named):
    """``prompts`` are the texts to repeat before each choice, None without ``echo``."""

    prefix = "cmpl"

    def __init__(
        self, model: str, digest: str, spell: Spell, prompts: Sequence[str] | None, logprobs: int | None
    ) -> None:
        super().__init__(model, digest, spell)
        self._prompts, self._logprobs = prompts, logprobs
        self._offsets: dict[int, int] = {}

    def begin(self, index: int) -> BaseModel | None:
        if self._prompts is None:
            return None
        return self._one(p.CompletionChoice(index=index, text=self._prompts[index]))

    def piece(self, index: int, event: Event) -> BaseModel | None:
        choice = p.CompletionChoice(index=index, text="")
        if isinstance(event, Progress):
            choice.text, choice.logprobs = event.text, self._table(index, event.tokens)
        elif isinstance(event, Scored):
            choice.logprobs = self._table(index, event.tokens)
        elif isinstance(event, Done):
            choice.finish_reason = event.reason
        return self._one(choice)

    def usage_piece(self, usage: p.Usage) -> BaseModel:
        return self._body([], usage)

    def whole(self, choices: Sequence[Gathered], usage: p.Usage) -> BaseModel:
        made = []
        for i, choice in enumerate(choices):
            before = "" if self._prompts is None else self._prompts[i]
            table = self._table(i, choice.tokens)
            made.append(
                p.CompletionChoice(index=i, text=before + choice.text, logprobs=table, finish_reason=choice.reason)
            )
        return self._body(made, usage)

    def _one(self, choice: p.CompletionChoice) -> BaseModel:
        return self._body([choice], None)

    def _body(self, choices: list[p.CompletionChoice], usage: p.Usage | None) -> BaseModel:
        return p.Completion(
            id=self.id, created=self.created, model=self.model, system_fingerprint=self.digest, choices=choices,
            usage=usage,
        )  # fmt: skip

    def _table(self, index: int, tokens: Sequence[Token]) -> p.Logprobs | None:
        if self._logprobs is None:
            return None
        spelled = [self.spell(token.id) for token in tokens]
        offsets, at = [], self._offsets.get(index, 0)
        for text in spelled:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        likeliest: list[dict[str, float] | None] = []
        for text, token in zip(spelled, tokens, strict=True):
            if token.logprob is None:
                likeliest.append(None)
                continue
            found: dict[str, float] = {}
            for other, value in token.top:
                found.setdefault(self.spell(other), value)  # of two tokens with one text, the likelier
            found.setdefault(text, token.logprob)
            likeliest.append(found)
        return p.Logprobs(
            tokens=spelled, token_logprobs=[t.logprob for t in tokens], top_logprobs=likeliest, text_offset=offsets
        )


class Chat(_Named):
    prefix = "chatcmpl"

    def __init__(self, model: str, digest: str, spell: Spell, logprobs: int | None) -> None:
        super().__init__(model, digest, spell)
        self._logprobs = logprobs

    def begin(self, index: int) -> BaseModel | None:
        return self._one(p.ChatChunkChoice(index=index, delta={"role": "assistant", "content": ""}))

    def piece(self, index: int, event: Event) -> BaseModel | None:
        if isinstance(event, Progress):
            table = self._table(event.tokens)
            return self._one(p.ChatChunkChoice(index=index, delta={"content": event.text}, logprobs=table))
        if isinstance(event, Done):
            return self._one(p.ChatChunkChoice(index=index, delta={}, finish_reason=event.reason))
        return None

    def usage_piece(self, usage: p.Usage) -> BaseModel:
        return self._chunk([], usage)

    def whole(self, choices: Sequence[Gathered], usage: p.Usage) -> BaseModel:
        made = [
            p.ChatChoice(
                index=i, message=p.ChatMessage(content=choice.text), logprobs=self._table(choice.tokens),
                finish_reason=choice.reason,
            )
            for i, choice in enumerate(choices)
        ]  # fmt: skip
        return p.ChatCompletion(
            id=self.id, created=self.created, model=self.model, system_fingerprint=self.digest, choices=made,
            usage=usage,
        )  # fmt: skip

    def _one(self, choice: p.ChatChunkChoice) -> BaseModel:
        return self._chunk([choice], None)

    def _chunk(self, choices: list[p.ChatChunkChoice], usage: p.Usage | None) -> BaseModel:
        return p.ChatChunk(
            id=self.id, created=self.created, model=self.model, system_fingerprint=self.digest, choices=choices,
            usage=usage,
        )  # fmt: skip

    def _table(self, tokens: Sequence[Token]) -> p.ChatLogprobs | None:
        if self._logprobs is None:
            return None
        content = []
        for token in tokens:
            assert token.logprob is not None  # those of a prompt are not asked for
            own = self._spelled(token.id, token.logprob)
            likeliest = [self._spelled(other, value) for other, value in token.top]
            content.append(p.ChatToken(**own.model_dump(), top_logprobs=likeliest))
        return p.ChatLogprobs(content=content)

    def _spelled(self, token: int, logprob: float) -> p.TopLogprob:
        text = self.spell(token)
        whole = text != f"token_id:{token}"
        return p.TopLogprob(token=text, logprob=logprob, bytes=list(text.encode()) if whole else None)
