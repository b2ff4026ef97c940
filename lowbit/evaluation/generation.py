"""Greedy generation in batches, with a record of how it ended and how sure every step was.

Prompts with a common prefix (few-shot examples) share its keys and values, as in prefix.py, where the model can hide
what fills shorter prompts behind it; in other models every prompt is run whole, padded on the left. Rows that have
ended leave the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from lowbit.arrays import Tensor
from lowbit.evaluation.head import Head
from lowbit.evaluation.prefix import Stem, Trunk, fork, paddable, shareable, stems
from lowbit.formats.heads import CacheFormat
from lowbit.runtime.detokenize import TextStream
from lowbit.runtime.kvcache import KVCache

Stop = Literal["stop", "eos", "length"]


class Written(NamedTuple):
    """What a model wrote after a prompt."""

    tokens: tuple[int, ...]
    """All tokens that were taken, an end token or those of a stop text included."""
    text: str
    """Up to the stop text, special tokens left out."""
    stop_reason: Stop
    """"stop" a stop text, "eos" an end token, "length" it had not ended after ``new_tokens``."""
    margin: float
    """The smallest margin between the probabilities of the first two choices over all steps."""


@dataclass(frozen=True)
class Limits:
    """When writing ends: at any of the texts, at any of the end tokens, or after ``new_tokens``."""

    new_tokens: int
    stops: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()


@dataclass
class _Row:
    """One prompt's answer while it grows."""

    index: int
    stream: TextStream
    """What the tokens add to the prompt: decoded alone, many tokenizers would drop the first one's space."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    margin: float = 1.0


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, head: Head, tokenizer: Any, prompts: Sequence[Sequence[int]], limits: Limits,
    *, batch: int = 1, kv: CacheFormat | None = None, on_done: Callable[[int], object] = lambda _: None,
) -> list[Written]:  # fmt: skip
    """The most likely token again and again, for prompts of at least one token, in the order given.

    ``on_done`` is told how many prompts have ended since. With ``kv`` keys and values are rounded as they are written,
    and every prompt is run by itself, whole. O(tokens) forward passes of up to ``batch`` rows.
    """
    found: dict[int, Written] = {}
    places: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt), []).append(i)
    trunks = [Trunk(ids, len(ids), {(): rows}) for ids, rows in places.items()]
    plain = kv is None and shareable(model.config)
    for stem in stems(trunks) if plain and paddable(model) else [Stem(0, trunks)]:
        length, members = stem
        members = sorted(members, key=lambda t: -len(t.ids))
        cache: Any = None
        if length:
            cache = DynamicCache(config=model.config)
            first = torch.tensor([members[0].ids[:length]], device=model.device)
            model.base_model(input_ids=first, past_key_values=cache, use_cache=True)
        for start in range(0, len(members), batch if plain else 1):
            rows = members[start : start + (batch if plain else 1)]
            state = _fresh(model, kv) if cache is None else fork(cache, torch.zeros(len(rows), dtype=torch.long))
            written = _Batch(model, head, tokenizer, limits, state, [t.ids for t in rows], length).run()
            for trunk, answer in zip(rows, written, strict=True):
                found |= dict.fromkeys(trunk.branches[()], answer)
                on_done(len(trunk.branches[()]))
    return [found[i] for i in range(len(prompts))]


def _fresh(model: PreTrainedModel, kv: CacheFormat | None) -> Any:
    return DynamicCache(config=model.config) if kv is None else KVCache(model.config, kv)


class _Batch:
    """Prompts that grow side by side: padded on the left, their first ``seen`` tokens are in the cache already."""

    def __init__(
        self, model: PreTrainedModel, head: Head, tokenizer: Any, limits: Limits, cache: Any,
        prompts: list[tuple[int, ...]], seen: int,
    ) -> None:  # fmt: skip
        self.model, self.head, self.limits, self.cache = model, head, limits, cache
        news = [p[seen:] for p in prompts]
        width = max(map(len, news))
        self.ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in news], device=model.device)
        mask = [[1] * seen + [0] * (width - len(p)) + [1] * len(p) for p in news]
        self.mask = torch.tensor(mask, device=model.device)
        self.padded = any(len(p) < width for p in news)
        self.positioned = "position_ids" in inspect.signature(model.base_model.forward).parameters
        self.live = [_Row(i, TextStream(tokenizer, p)) for i, p in enumerate(prompts)]

    def run(self) -> list[Written]:
        """Grow until all have ended."""
        found: dict[int, Written] = {}
        while self.live:
            self.step()
            ended = {r: w for r, row in enumerate(self.live) if (w := self.ending(row)) is not None}
            found |= {self.live[r].index: w for r, w in ended.items()}
            if ended:
                self.keep([r for r in range(len(self.live)) if r not in ended])
        return [found[i] for i in range(len(found))]

    def step(self) -> None:
        """One more token for every row."""
        extra: dict[str, Tensor] = {}
        if self.padded:
            extra["attention_mask"] = self.mask
            if self.positioned:
                extra["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -self.ids.shape[1] :]
        out = self.model.base_model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, **extra)
        logits = self.head(out.last_hidden_state[:, -1])
        chosen = logits.topk(2, dim=-1)
        high, low = torch.exp(chosen.values - torch.logsumexp(logits, -1, keepdim=True)).cpu().unbind(1)
        first = logits.argmax(-1)  # the lowest of equals, which topk does not promise
        for row, token, margin in zip(self.live, first.tolist(), (high - low).tolist(), strict=True):
            row.tokens.append(token)
            row.text += row.stream.push(token)
            row.margin = min(row.margin, margin)
        self.ids = first[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], dim=1)

    def ending(self, row: _Row) -> Written | None:
        """What was written, if this row has ended."""
        if row.tokens[-1] in self.limits.ends:
            return self.written(row, "eos")
        if any(stop in row.text for stop in self.limits.stops):
            return self.written(row, "stop")
        return self.written(row, "length") if len(row.tokens) >= self.limits.new_tokens else None

    def written(self, row: _Row, reason: Stop) -> Written:
        text = row.text + row.stream.finish()
        for stop in self.limits.stops:
            text = text.partition(stop)[0]
        return Written(tuple(row.tokens), text, reason, row.margin)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if rows:
            kept = torch.tensor(rows, device=self.model.device)
            self.cache.batch_select_indices(kept)
            self.ids, self.mask = self.ids[kept], self.mask[kept]
        self.live = [self.live[r] for r in rows]


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = [] if own is None else own if isinstance(own, list) else [own]
    return frozenset(int(t) for t in (*listed, tokenizer.eos_token_id) if t is not None)
