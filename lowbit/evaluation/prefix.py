"""Shared prefixes: what several sequences begin with is run through the model once.

Questions come with the same few-shot examples, and choices with the same question. So sequences form a tree:

    stem      a prefix of many contexts (few-shot examples, instructions), run once
    trunk     one context, run behind its stem
    branches  the choices, run side by side behind their trunk

Keys and values of stem and trunk stay in the cache and are copied for those that go on from there. Trunks of unlike
length share a batch where a mask and explicit positions can hide what fills the shorter ones (``paddable``); in other
models only trunks of equal length do. Every family says what it says of each sequence alone, up to the order of
floating-point sums.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowbit.arrays import Float, Int, Tensor
from lowbit.evaluation.head import Head

Ids = tuple[int, ...]
Final = Callable[[Int[Tensor, "batch length"]], Float[Tensor, "batch length d"]]

SHORTEST = 16  # tokens that a stem must save, copied keys cost something too
ROWS = 128  # positions projected to the vocabulary at a time
TOKENS = 4096  # of a batch, however many rows are allowed
PASS = 32  # tokens that cost about as much as one more pass over the weights


class Asked(NamedTuple):
    """Hidden states before every token of a continuation, and the sequences that ask for them."""

    sequences: list[int]
    hidden: Float[Tensor, "tokens d"]


@dataclass(frozen=True)
class Trunk:
    """A context with all that its continuations begin with; ``branches`` are what the model reads behind it."""

    ids: Ids
    context: int
    branches: dict[Ids, list[int]]


class Stem(NamedTuple):
    """The first ``length`` tokens of every trunk are the same."""

    length: int
    trunks: list[Trunk]


def follow(
    head: Head,
    asked: Iterator[Asked],
    continuations: Sequence[Sequence[int]],
    on_done: Callable[[int], object] = lambda _: None,
) -> list[tuple[Float[Tensor, "tokens"], bool]]:
    """log p of every continuation token, and whether greedy says the same; 128 positions are projected at a time."""
    found: dict[int, tuple[Tensor, bool]] = {}
    waiting: list[Asked] = []

    def project() -> None:
        pieces = torch.cat([a.hidden for a in waiting]).split(ROWS)
        targets = _targets(waiting, continuations)
        values, greedy, at = [], [], 0
        for piece in pieces:
            logits = head(piece)
            column = targets[at : at + len(piece)].to(logits.device)
            asked_for = logits.gather(1, column)
            highest = logits.amax(-1, keepdim=True)  # vectorised, which argmax is not
            hit = asked_for == highest
            tied = hit.any(-1).nonzero()[:, 0]  # with itself, or with a token that comes first
            hit[tied] &= column[tied] == logits[tied].argmax(-1, keepdim=True)
            greedy.append(hit.cpu())
            log_z = logits.sub_(highest).exp_().sum(-1, keepdim=True).log_() + highest
            values.append((asked_for - log_z).cpu())
            at += len(piece)
        value, best, at = torch.cat(values), torch.cat(greedy), 0
        for sequences, hidden in waiting:
            rows = slice(at, at + len(hidden))
            for k, i in enumerate(sequences):
                found[i] = value[rows, k], bool(best[rows, k].all())
            at += len(hidden)
        on_done(sum(len(a.sequences) for a in waiting))
        waiting.clear()

    for one in asked:
        waiting.append(one)
        if sum(len(a.hidden) for a in waiting) >= ROWS:
            project()
    if waiting:
        project()
    return [found[i] for i in range(len(continuations))]


def _targets(asked: Sequence[Asked], continuations: Sequence[Sequence[int]]) -> Int[Tensor, "rows most"]:
    """A column for each of the sequences that share hidden states; spare places repeat the first column."""
    most = max(len(a.sequences) for a in asked)
    rows = []
    for sequences, _ in asked:
        columns = [continuations[i] for i in sequences]
        rows.append(torch.tensor(columns + [columns[0]] * (most - len(columns))).T)
    return torch.cat(rows)


def shareable(config: PreTrainedConfig) -> bool:
    """Whether the model caches keys and values only, which can be copied and continued."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)


def paddable(model: PreTrainedModel) -> bool:
    """Whether filled places in the middle of a sequence can be hidden: explicit positions, and no sliding attention,
    whose window would count them."""
    positioned = "position_ids" in inspect.signature(model.base_model.forward).parameters
    return positioned and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def whole(final: Final, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], batch: int) -> Iterator[Asked]:
    """Every distinct input by itself, longest first in batches of like length, padded on the right."""
    inputs: dict[tuple[Ids, int], list[int]] = {}
    for i, (context, continuation) in enumerate(sequences):
        inputs.setdefault(((*context, *continuation[:-1]), len(context)), []).append(i)
    order = sorted(inputs, key=lambda key: len(key[0]), reverse=True)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for key, h in zip(rows, final(_padded([ids for ids, _ in rows])), strict=True):
            yield Asked(inputs[key], h[key[1] - 1 : len(key[0])])


def shared(
    model: PreTrainedModel, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], batch: int
) -> Iterator[Asked]:
    """As ``whole``, with shared prefixes run once; at most ``batch`` trunks side by side, with all their branches."""
    alike = not paddable(model)
    for stem in stems(trunks(sequences)):
        cache = None
        if stem.length:
            cache = DynamicCache(config=model.config)
            _run(model, _ids(model, [stem.trunks[0].ids[: stem.length]]), cache)
        for rows in _batches(stem.trunks, batch, alike):
            yield from _grow(model, rows, stem.length, cache)


def trunks(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Trunk]:
    """Sequences gathered by context."""
    inputs: dict[Ids, dict[Ids, list[int]]] = {}
    for i, (context, continuation) in enumerate(sequences):
        inputs.setdefault(tuple(context), {}).setdefault(tuple(continuation[:-1]), []).append(i)
    found = []
    for context, tails in inputs.items():
        common = _common(list(tails))
        found.append(Trunk((*context, *common), len(context), {t[len(common) :]: rows for t, rows in tails.items()}))
    return found


def stems(found: Sequence[Trunk]) -> list[Stem]:
    """Trunks gathered by a prefix that makes up at least half of each context; the longest first.

    In lexicographic order trunks with a common prefix are neighbours. A stem ends before the last token of each
    context, whose hidden state is asked for.
    """
    groups: list[Stem] = []
    for trunk in sorted(found, key=lambda t: t.ids):
        if groups:
            last = groups[-1]
            first = last.trunks[0]
            longest = last.length or first.context - 1
            common = len(_common([first.ids[:longest], trunk.ids[: trunk.context - 1]]))
            most = max(trunk.context, *(t.context for t in last.trunks))
            if common >= SHORTEST and 2 * common >= most:
                groups[-1] = Stem(common, [*last.trunks, trunk])
                continue
        groups.append(Stem(0, [trunk]))
    alone = [s.trunks[0] for s in groups if not s.length]
    return [*(s for s in groups if s.length), *([Stem(0, alone)] if alone else [])]


def fork(cache: Any, rows: Int[Tensor, "n"]) -> Any:
    """A cache that goes on from the named rows of another, which stays as it is."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    other.batch_select_indices(rows)
    return other


def _batches(found: Sequence[Trunk], batch: int, alike: bool) -> Iterator[list[Trunk]]:
    """Longest first; those with branches, of one length only if ``alike``, then those without."""
    order = sorted(found, key=lambda t: -len(t.ids))
    forked = [t for t in order if len(t.branches) > 1]
    groups = [list(same) for _, same in groupby(forked, key=lambda t: len(t.ids))] if alike else [forked]
    for rows in (*groups, [t for t in order if len(t.branches) == 1]):
        for part in parts([len(t.ids) for t in rows], batch):
            yield rows[part]


def parts(lengths: Sequence[int], most: int) -> list[slice]:
    """Cuts of rows, sorted by length with the longest first, into batches of at most ``most`` rows and 4096 tokens.

    The cuts with the least to compute: a pass costs as much as ``PASS`` tokens, and every row is filled to the longest
    of its batch. Cost: rows times ``most``.
    """
    least, start = [0.0], [0]  # of the first i rows: what they cost, and where the last batch of them begins
    for i in range(1, len(lengths) + 1):
        cost: dict[int, float] = {}
        for j in range(i - 1, max(i - most, 0) - 1, -1):
            tokens = (i - j) * lengths[j]
            if cost and tokens > TOKENS:
                break
            cost[j] = least[j] + PASS + tokens
        start.append(min(cost, key=cost.__getitem__))
        least.append(cost[start[-1]])
    cuts, end = [], len(lengths)
    while end:
        cuts.append(slice(start[end], end))
        end = start[end]
    return cuts[::-1]


def _grow(model: PreTrainedModel, rows: list[Trunk], stem: int, cache: Any) -> Iterator[Asked]:
    """Run trunks behind their stem, then all their branches behind the trunks."""
    ids = _ids(model, [t.ids[stem:] for t in rows])
    if cache is not None:
        cache = fork(cache, torch.zeros(len(rows), dtype=torch.long, device=model.device))
    elif len(rows[0].branches) > 1:
        cache = DynamicCache(config=model.config)
    hidden = _run(model, ids, cache)
    before = [h[t.context - 1 - stem : len(t.ids) - stem] for t, h in zip(rows, hidden, strict=True)]
    after: dict[tuple[int, Ids], Tensor] = {}
    tails = [(r, tail) for r, trunk in enumerate(rows) for tail in trunk.branches if tail]
    tails.sort(key=lambda owned: -len(owned[1]))
    for cut in parts([len(tail) for _, tail in tails], len(tails)):
        part = tails[cut]
        owners = torch.tensor([r for r, _ in part], device=model.device)
        further = _ids(model, [tail for _, tail in part])
        lengths = torch.tensor([len(t.ids) for t in rows], device=model.device)[owners]
        states = _run(model, further, fork(cache, owners), _hidden_places(lengths, stem + ids.shape[1], further))
        after |= {owned: h[: len(owned[1])] for owned, h in zip(part, states, strict=True)}
    for r, trunk in enumerate(rows):
        for tail, sequences in trunk.branches.items():
            yield Asked(sequences, torch.cat([before[r], after[r, tail]]) if tail else before[r])


def _hidden_places(
    lengths: Int[Tensor, "batch"], width: int, further: Int[Tensor, "batch new"]
) -> dict[str, Int[Tensor, "..."]]:
    """Mask and positions of tokens behind ``lengths`` real ones in a cache of ``width``; nothing if none is filled."""
    if bool((lengths == width).all()):
        return {}
    new = torch.arange(further.shape[1], device=lengths.device)
    seen = torch.arange(width, device=lengths.device) < lengths[:, None]
    mask = torch.cat([seen, torch.ones_like(further, dtype=torch.bool)], dim=1).long()
    return {"attention_mask": mask, "position_ids": lengths[:, None] + new}


def _run(
    model: PreTrainedModel, ids: Int[Tensor, "batch length"], cache: Any, places: Mapping[str, Tensor] = {}
) -> Float[Tensor, "batch length d"]:
    used = cache is not None
    hidden: Tensor = model.base_model(input_ids=ids, past_key_values=cache, use_cache=used, **places).last_hidden_state
    return hidden


def _ids(model: PreTrainedModel, rows: list[Ids]) -> Int[Tensor, "batch length"]:
    return _padded(rows).to(model.device)


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "batch length"]:
    """Rows filled on the right, where causal models do not look."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def _common(rows: Sequence[Ids]) -> Ids:
    """What all rows begin with."""
    low, high = min(rows), max(rows)  # of sorted tuples the first and the last differ the most
    n = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:n]
