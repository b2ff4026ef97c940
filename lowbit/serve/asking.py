"""From the body of a request to the sequences of an engine, and back to events in the server's loop."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Sequence

from lowbit.errors import RecipeError
from lowbit.runtime.requests import Busy, Done, Event, Failed, Progress, Request, Scored
from lowbit.runtime.sampling import Sampling
from lowbit.serve.errors import ApiError
from lowbit.serve.metrics import Metrics
from lowbit.serve.protocol import SamplingBody
from lowbit.serve.served import Served

_STATUS = {"timeout": 504, "shutdown": 503, "model": 500}


def sampling(body: SamplingBody, vocab: int) -> Sampling:
    """How the first choice is drawn. Raises ApiError."""

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    bias = []
    for name, value in (body.logit_bias or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and str(int(name)) == name and int(name) < vocab):
            raise ApiError(400, f"{name!r} is no token id below {vocab}", param="logit_bias")
        bias.append((int(name), value))
    try:
        return Sampling(
            temperature=given(body.temperature, 1.0), top_p=given(body.top_p, 1.0), top_k=body.top_k or 0,
            min_p=given(body.min_p, 0.0), presence_penalty=given(body.presence_penalty, 0.0),
            frequency_penalty=given(body.frequency_penalty, 0.0), logit_bias=tuple(bias),
            repetition_penalty=given(body.repetition_penalty, 1.0), seed=body.seed,
        )  # fmt: skip
    except RecipeError as error:
        raise ApiError(400, str(error)) from error


def requests(
    body: SamplingBody, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], logprobs: int | None, score: bool,
    served: Served, seconds: float,
) -> list[Request]:  # fmt: skip
    """``n`` sequences a prompt, in OpenAI's order: all of the first prompt, then all of the second.

    Each of the n has the seed's next. The n of a prompt share its tuple.
    """
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    first = sampling(body, served.vocab)
    how = [dataclasses.replace(first, seed=None if first.seed is None else first.seed + i) for i in range(body.n or 1)]
    deadline = time.monotonic() + seconds
    return [
        Request(
            shared, sampling=drawn, max_tokens=new, stop=stop, ends=frozenset(body.stop_token_ids or ()),
            ignore_end=bool(body.ignore_eos), logprobs=logprobs, score=score, deadline=deadline,
        )
        for shared, new in zip(map(tuple, prompts), max_tokens, strict=True) for drawn in how
    ]  # fmt: skip


class Asked:
    """The sequences of one HTTP request on their way; iterating gives (index, event) until all have ended.

    All are queued or none; :meth:`close` forgets those that still run, which frees their places at the next token.
    """

    def __init__(self, served: Served, wanted: Sequence[Request], metrics: Metrics) -> None:
        """Raises ApiError 429 when the queue is full."""
        self._served, self._metrics = served, metrics
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, int] = {}
        self._since = time.monotonic()
        self._last: dict[int, float] = {}
        try:
            for i, request in enumerate(wanted):
                self._open[i] = served.engine.submit(dataclasses.replace(request, on_event=self._listener(i)))
        except Busy as busy:
            self.close()
            load = served.engine.batcher.load()
            wait = str(max(1, math.ceil(load.waiting / load.slots)))  # seconds, as a guess: a wave of slots each
            metrics.sequences.labels(served.name, "refused").inc(len(wanted))
            raise ApiError(429, str(busy), code="queue_full", headers={"Retry-After": wait}) from busy

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Raises ApiError when a sequence failed."""
        while self._open:
            index, event = await self._events.get()
            self._count(index, event)
            if isinstance(event, Failed):
                raise ApiError(_STATUS[event.trouble], event.message, code=event.trouble)
            yield index, event

    def close(self) -> None:
        for number in self._open.values():
            self._served.engine.cancel(number)
            self._metrics.sequences.labels(self._served.name, "cancelled").inc()
        self._open.clear()

    def _listener(self, index: int) -> _Listener:
        return _Listener(self._loop, self._events, index)

    def _count(self, index: int, event: Event) -> None:
        name, now, metrics = self._served.name, time.monotonic(), self._metrics
        if isinstance(event, Progress):
            if index in self._last:
                metrics.each.labels(name).observe((now - self._last[index]) / max(len(event.tokens), 1))
            else:
                metrics.first.labels(name).observe(now - self._since)
            self._last[index] = now
        elif not isinstance(event, Scored):
            del self._open[index]
            metrics.sequences.labels(name, event.reason if isinstance(event, Done) else event.trouble).inc()
            metrics.whole.labels(name).observe(now - self._since)
        if isinstance(event, Done):
            metrics.read.labels(name).inc(event.read)
            metrics.written.labels(name).inc(event.written)


@dataclasses.dataclass(frozen=True, eq=False)
class _Listener:
    """Hands events of the engine's thread to the server's loop."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[tuple[int, Event]]
    index: int

    def __call__(self, event: Event) -> None:
        if not self.loop.is_closed():  # a server that is gone waits for nothing
            self.loop.call_soon_threadsafe(self.events.put_nowait, (self.index, event))
