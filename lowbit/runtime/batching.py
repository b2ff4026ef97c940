"""Continuous batching: requests join and leave the running batch between two tokens.

    batcher = Batcher(model, tokenizer, slots=8)
    batcher.submit(Request((1, 2, 3), on_event=print))
    while batcher.step():
        pass

A step reads pieces of prompts that wait (at most ``chunk`` tokens, so that a long prompt holds nobody up for longer
than one piece) and writes one token of every running request. What a request is told depends on nothing but the
request: pieces begin at multiples of ``chunk``, and each draws from a generator of its own. One thread calls
:meth:`Batcher.step` (an :class:`~lowbit.runtime.engine.Engine` has one); everything else may be called from any.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lowbit.arrays import Float, Tensor
from lowbit.errors import LowbitError, ModelError
from lowbit.formats.heads import CacheFormat
from lowbit.runtime.requests import Busy, Done, Failed, Request, Scored, Trouble
from lowbit.runtime.rows import Rows, nbytes, own_cache, row_of
from lowbit.runtime.sampling import judged
from lowbit.runtime.sequence import Sequence, end_tokens


class Load(NamedTuple):
    """What a batcher holds now."""

    waiting: int
    running: int
    slots: int
    kv_bytes: int


class Batcher:
    """Runs many requests on one model. ``slots`` run at a time, ``queue`` more wait.

    Raises ModelError for a model that caches anything but keys and values, and for one whose positions do not follow
    padding (found by running it); FormatError for a KV format that its heads cannot take.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *,
        kv: CacheFormat | None = None, slots: int = 8, queue: int = 64, chunk: int = 128,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.kv = model.eval(), tokenizer, kv
        self.slots, self.queue, self.chunk = slots, queue, chunk
        self.ends = end_tokens(model, tokenizer)
        self._takes = inspect.signature(model.forward).parameters.keys()
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._waiting: deque[Sequence] = deque()
        self._cancelled: set[int] = set()
        self._reading: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order of the rows
        self._rows = Rows(model.config, kv)
        self._check()

    def submit(self, request: Request) -> int:
        """Queue a request; its number serves :meth:`cancel`. Raises Busy when the queue is full."""
        sequence = Sequence(next(self._ids), request, self.tokenizer, self.ends)
        with self._lock:
            if len(self._waiting) >= self.queue:
                raise Busy(
                    f"{len(self._waiting)} requests wait already", why="more would only wait longer",
                    fix="again in a moment",
                )  # fmt: skip
            self._waiting.append(sequence)
        return sequence.number

    def cancel(self, number: int) -> None:
        """Forget a request before the next token; it is told nothing more."""
        with self._lock:
            self._cancelled.add(number)

    def load(self) -> Load:
        """Cost a walk over the caches; any thread."""
        caches = [s.cache for s in tuple(self._reading)]
        held = self._rows.nbytes + sum(nbytes(cache) for cache in caches if cache is not None)
        return Load(len(self._waiting), len(self._reading) + len(self._running), self.slots, held)

    @torch.inference_mode()
    def step(self) -> bool:
        """One piece of prompts, one token of every running request; False when there was nothing to do."""
        self._sort_out()
        if not self._reading and not self._running:
            return False
        budget = self.chunk
        while budget > 0 and self._reading:
            budget -= self._read()
        if self._running:
            self._write_token()
        return True

    def fail_all(self, trouble: Trouble, message: str) -> None:
        """End every request, running and waiting; the thread that steps calls it."""
        with self._lock:
            sequences = [*self._running, *self._reading, *self._waiting]
            self._waiting.clear()
            self._cancelled.clear()
        self._running.clear()
        self._reading.clear()
        self._rows = Rows(self.model.config, self.kv)  # a pass that broke off may have left them uneven
        for sequence in sequences:
            sequence.request.on_event(Failed(trouble, message))

    def _sort_out(self) -> None:
        """Let cancelled and late requests go, and waiting ones in."""
        now = time.monotonic()
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            waiting = [s for s in self._waiting if s.number not in cancelled]
            late = [s for s in waiting if s.late(now)]
            self._waiting = deque(s for s in waiting if not s.late(now))
            late += [s for s in (*self._reading, *self._running) if s.late(now) and s.number not in cancelled]
            gone = cancelled | {s.number for s in late}
            self._reading = deque(s for s in self._reading if s.number not in gone)
            for row in reversed(range(len(self._running))):
                if self._running[row].number in gone:
                    self._leave(row)
            while self._waiting and len(self._reading) + len(self._running) < self.slots:
                self._reading.append(self._waiting.popleft())
        for sequence in late:
            sequence.request.on_event(Failed("timeout", "the time for this request is over"))

    def _read(self) -> int:
        """Read a piece of the first prompt, or several short ones whole. Returns the tokens that it took."""
        short = self._short()
        if len(short) > 1:
            return self._read_together(short)
        sequence = self._reading[0]
        if sequence.cache is None:
            sequence.cache = own_cache(self.model.config, self.kv)
        ids = list(sequence.request.prompt[sequence.read : sequence.read + self.chunk])
        logits = self._pass(sequence.cache, ids, sequence.read, keep=0 if sequence.request.score else 1)
        self._has_read(sequence, len(ids), logits)
        return len(ids)

    def _short(self) -> list[Sequence]:
        """Prompts at the head of the line that fit together into one piece; a low-bit cache rounds each by itself."""
        found: list[Sequence] = []
        width = 0
        for sequence in self._reading if self.kv is None else ():
            width = max(width, len(sequence.request.prompt))
            if sequence.read or width * (len(found) + 1) > self.chunk:
                break
            found.append(sequence)
        return found

    def _read_together(self, sequences: list[Sequence]) -> int:
        """One pass over several prompts, padded on the left."""
        device, prompts = self.model.device, [s.request.prompt for s in sequences]
        width = max(map(len, prompts))
        pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)[:, None]
        places = torch.arange(width, device=device)[None] - pads
        inputs = {
            "input_ids": torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device),
            "attention_mask": (places >= 0).to(torch.long), "position_ids": places.clamp(min=0),
        }  # fmt: skip
        cache = own_cache(self.model.config, None)
        logits = self._forward(cache, inputs, keep=0 if any(s.request.score for s in sequences) else 1)
        for row, sequence in enumerate(sequences):
            sequence.cache = row_of(cache, row, len(prompts[row]))
            self._has_read(sequence, len(prompts[row]), logits[row, -len(prompts[row]) :])
        return width * len(sequences)

    def _has_read(self, sequence: Sequence, new: int, logits: Float[Tensor, "tokens vocab"]) -> None:
        """After ``new`` tokens of a prompt; with its last one comes the first token of the answer."""
        start, request = sequence.read, sequence.request
        sequence.read += new
        if request.score:
            known = request.prompt[start + 1 : sequence.read + 1]
            sequence.scored += judged(logits[: len(known)], known, request.logprobs or 0) if known else []
        if sequence.read < len(request.prompt):
            return
        self._reading.remove(sequence)
        cache, sequence.cache = sequence.cache, None  # the rows have it from here on
        if request.score:
            request.on_event(Scored(tuple(sequence.scored)))
        if request.max_tokens == 0:
            request.on_event(Done("length", sequence.read, 0))
        elif not self._take(sequence, logits[-1]):
            assert cache is not None  # it was read
            self._rows.join(cache, sequence.read)
            self._running.append(sequence)

    def _write_token(self) -> None:
        inputs = self._rows.inputs([s.last for s in self._running], self.model.device)
        logits = self._forward(self._rows, inputs, keep=1)[:, -1]
        self._rows.advance()
        for row in reversed(range(len(self._running))):  # the last row may move, and has had its turn
            if self._take(self._running[row], logits[row]):
                self._leave(row)

    def _take(self, sequence: Sequence, logits: Float[Tensor, "vocab"]) -> bool:
        """Whether the request has ended with its next token; one that cannot go on fails alone."""
        try:
            return sequence.take(logits)
        except LowbitError as error:
            sequence.request.on_event(Failed("model", str(error)))
            return True

    def _leave(self, row: int) -> None:
        self._rows.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _pass(self, cache: Cache, ids: list[int], start: int, keep: int) -> Float[Tensor, "tokens vocab"]:
        """Logits of a piece of one prompt that begins at position ``start``; of the last ``keep`` tokens, 0 of all."""
        device, end = self.model.device, start + len(ids)
        inputs = {
            "input_ids": torch.tensor([ids], device=device),
            "position_ids": torch.arange(start, end, device=device)[None],
            "attention_mask": torch.ones(1, end, dtype=torch.long, device=device),
        }
        return self._forward(cache, inputs, keep)[0]

    def _forward(self, cache: Cache, inputs: dict[str, Tensor], keep: int) -> Float[Tensor, "rows tokens vocab"]:
        given: dict[str, Any] = {name: value for name, value in inputs.items() if name in self._takes}
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = keep
        logits: Tensor = self.model(**given, past_key_values=cache, use_cache=True).logits
        return logits

    @torch.inference_mode()
    def _check(self) -> None:
        """A short and a longer row say together what each says alone, or positions do not follow padding."""
        vocab, config = int(self.model.get_input_embeddings().num_embeddings), self.model.config  # type: ignore[arg-type]
        together, expected = Rows(config, None), []
        for length in (2, 9):
            cache, alone = own_cache(config, None), Rows(config, None)
            self._pass(cache, [(7 * i + length) % vocab for i in range(length)], 0, keep=1)
            alone.join(cache, length)
            together.join(cache, length)
            expected.append(self._forward(alone, alone.inputs([1], self.model.device), keep=1)[0, -1])
        found = self._forward(together, together.inputs([1, 1], self.model.device), keep=1)[:, -1]
        wanted = torch.stack(expected)
        if not float((found - wanted).abs().max()) <= 0.05 * float(wanted.max() - wanted.min()):
            raise ModelError(
                "gives other answers in a batch than alone", where=type(self.model).__name__,
                why="its positions do not follow padding", fix="lowbit generate, one prompt at a time",
            )  # fmt: skip
        self._pass(own_cache(config, self.kv), [1, 1], 0, keep=1)  # refuses a KV format that its heads cannot take
