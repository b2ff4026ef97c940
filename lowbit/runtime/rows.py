"""Rows: the caches of requests of unlike length as one batch, for one token each.

    rows = Rows(model.config, kv)
    rows.join(cache, length)            # a request's own cache, as its prompt left it
    model(**rows.inputs(tokens), ...)   # one new token a row
    rows.advance()
    rows.leave(0)                       # the last row takes its place

All rows end at the same column; shorter ones have padding before them, which is how transformers' own models take
batches of unlike length, whatever their positions are (rotary, learned, ALiBi, sliding).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from lowbit.arrays import Float, Tensor
from lowbit.formats.heads import CacheFormat, head_format
from lowbit.runtime.growing import growing_cache
from lowbit.runtime.kvcache import KVCache, KVLayer, Store
from lowbit.runtime.row_stores import row_store

One = Float[Tensor, "rows heads one d"]
_IN_FULL = CacheFormat("raw", "raw")


def own_cache(config: PreTrainedConfig, kv: CacheFormat | None) -> Cache:
    """The cache of one request. Raises ModelError for models that keep anything but keys and values."""
    packed = KVCache(config, kv or _IN_FULL)
    return packed if kv is not None else growing_cache(config)


class Rows(Cache):  # type: ignore[misc]
    """Raises ModelError for a model with layers that cache anything but keys and values.

    Memory: rows x the longest of them, packed where there is a KV format (:attr:`nbytes`).
    """

    def __init__(self, config: PreTrainedConfig, kv: CacheFormat | None) -> None:
        self.lengths: list[int] = []  # tokens that every row has seen; one list for all layers
        fmt = kv or _IN_FULL
        like = KVCache(config, fmt).layers
        self._held = [_Layer(fmt, self.lengths, layer.sliding_window) for layer in like if isinstance(layer, KVLayer)]
        super().__init__(layers=[*self._held])

    def join(self, cache: Cache, length: int) -> None:
        """Add a row: a cache of batch 1 that has seen ``length`` tokens."""
        self.lengths.append(length)
        for rows, layer in zip(self._held, cache.layers, strict=True):
            rows.join(layer)

    def leave(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        for rows in self._held:
            rows.leave(row)
        self.lengths[row] = self.lengths[-1]
        self.lengths.pop()

    def inputs(self, tokens: list[int], device: torch.device) -> dict[str, Tensor]:
        """One token a row, with the positions of all, and a mask where rows are of unlike length."""
        longest = max(self.lengths)
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        given = {"input_ids": torch.tensor(tokens, device=device)[:, None], "position_ids": lengths}
        if min(self.lengths) < longest:
            mask = torch.arange(longest + 1, device=device)[None] >= longest - lengths
            given["attention_mask"] = mask.to(torch.long)
        return given

    def advance(self) -> None:
        """After a pass: every row has seen one token more."""
        self.lengths[:] = [n + 1 for n in self.lengths]

    def clear(self) -> None:
        """Forget all rows."""
        while self.lengths:
            self.leave(len(self.lengths) - 1)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated for keys and values."""
        return _size(part for layer in self._held for part in layer.parts())


def row_of(cache: Cache, row: int, length: int) -> Cache:
    """One row of the cache of several prompts that were padded on the left: views of its last ``length`` tokens."""
    found = DynamicCache()
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)  # what own_cache gives without a KV format
        assert layer.keys is not None  # prompts were read
        assert layer.values is not None
        one = DynamicLayer()
        one.keys, one.values = layer.keys[row : row + 1, :, -length:], layer.values[row : row + 1, :, -length:]
        found.layers.append(one)
    return found


def nbytes(cache: Cache) -> int:
    """Bytes of the keys and values of one request."""
    if isinstance(cache, KVCache):
        return cache.nbytes
    layers = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    return _size(part for layer in layers for part in (layer.keys, layer.values) if part is not None)


def _size(parts: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parts)


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of all rows."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, kv: CacheFormat, lengths: list[int], window: int | None) -> None:
        super().__init__()
        self.lengths, self.window, self.is_sliding = lengths, window, window is not None
        self.stores = [row_store(head_format(name), kv, lengths, window) for name in (kv.key, kv.value)]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Rows bring their own."""

    def join(self, layer: Any) -> None:
        """Take a request's own layer; its length is the last of ``lengths``."""
        for rows, store in zip(self.stores, _stores(layer), strict=True):
            rows.join(store, self.kept())

    def leave(self, row: int) -> None:
        """Let the last row take this one's place."""
        for rows in self.stores:
            rows.leave(row)

    def update(self, key_states: One, value_states: One, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.stores
        width = self.kept() + 1
        return keys.update(key_states, width), values.update(value_states, width)

    def parts(self) -> Iterator[Tensor]:
        """Every tensor that is held."""
        for rows in self.stores:
            yield from rows.parts()

    def kept(self) -> int:
        """Tokens of the longest row that the next one may attend to."""
        seen = max(self.lengths, default=0)
        return seen if self.window is None else min(seen, self.window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kept() + query_length, max(self.lengths, default=0) - self.kept()

    def get_seq_length(self) -> int:
        return max(self.lengths, default=0)

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window


def _stores(layer: CacheLayerMixin) -> list[Store]:
    """The keys and the values of a request's own layer."""
    if isinstance(layer, KVLayer):
        return layer.stores
    assert layer.keys is not None  # a prompt was read
    assert layer.values is not None
    return [Store.raw(layer.keys), Store.raw(layer.values)]
