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

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from lowbit.arrays import Float, Tensor
from lowbit.formats.heads import CacheFormat
from lowbit.runtime.kvcache import KVCache, KVLayer

One = Float[Tensor, "rows heads one d"]
_IN_FULL = CacheFormat("raw", "raw")


def own_cache(config: PreTrainedConfig, kv: CacheFormat | None) -> Cache:
    """The cache of one request. Raises ModelError for models that keep anything but keys and values."""
    packed = KVCache(config, kv or _IN_FULL)
    return packed if kv is not None else DynamicCache(config=config)


class Rows(Cache):  # type: ignore[misc]
    """Raises ModelError for a model with layers that cache anything but keys and values.

    Memory: with a KV format, what the rows have packed; without, rows x the longest of them (:attr:`nbytes`).
    """

    def __init__(self, config: PreTrainedConfig, kv: CacheFormat | None) -> None:
        self.lengths: list[int] = []  # tokens that every row has seen; one list for all layers
        kind = _Packed if kv is not None else _Raw
        like = KVCache(config, kv or _IN_FULL).layers
        self._held: list[_Layer] = [
            kind(self.lengths, layer.sliding_window) for layer in like if isinstance(layer, KVLayer)
        ]
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
        """One token a row, with the mask and the positions of all."""
        longest = max(self.lengths)
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        mask = torch.arange(longest + 1, device=device)[None] >= longest - lengths
        ids = torch.tensor(tokens, device=device)[:, None]
        return {"input_ids": ids, "attention_mask": mask.to(torch.long), "position_ids": lengths}

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

    def __init__(self, lengths: list[int], window: int | None) -> None:
        super().__init__()
        self.lengths, self.window, self.is_sliding = lengths, window, window is not None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Rows bring their own."""

    @abstractmethod
    def join(self, layer: Any) -> None:
        """Take a request's own layer; its length is the last of ``lengths``."""

    @abstractmethod
    def leave(self, row: int) -> None:
        """Let the last row take this one's place."""

    @abstractmethod
    def parts(self) -> Iterator[Tensor]:
        """Every tensor that is held."""

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


class _Packed(_Layer):
    """Rows that keep their own low-bit layers: each is decoded and put beside the others at every token."""

    def __init__(self, lengths: list[int], window: int | None) -> None:
        super().__init__(lengths, window)
        self.rows: list[KVLayer] = []

    def join(self, layer: KVLayer) -> None:
        self.rows.append(layer)

    def leave(self, row: int) -> None:
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def update(self, key_states: One, value_states: One, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        width = self.kept() + 1
        news = zip(self.rows, key_states.split(1), value_states.split(1), strict=True)
        seen = [row.update(key, value) for row, key, value in news]
        return _beside([keys for keys, _ in seen], width), _beside([values for _, values in seen], width)

    def parts(self) -> Iterator[Tensor]:
        for row in self.rows:
            yield from row.parts()


class _Raw(_Layer):
    """Rows in one buffer, all ending at column ``end``: a new token is one column, and attention reads a view."""

    def __init__(self, lengths: list[int], window: int | None) -> None:
        super().__init__(lengths, window)
        self.end = 0
        self.buffers: tuple[Tensor, Tensor] | None = None  # keys, values: (room for rows, heads, room for columns, d)

    def join(self, layer: CacheLayerMixin) -> None:
        row, (keys, values) = len(self.lengths) - 1, (layer.keys, layer.values)
        assert keys is not None  # a prompt was read
        assert values is not None
        new = int(keys.shape[2])
        if self.buffers is None or row == self.buffers[0].shape[0] or new > self.end:
            self._make_room(max(4, 2 * row) if row else 1, max(new, self.kept()), (keys, values))
        assert self.buffers is not None
        for buffer, part in zip(self.buffers, (keys, values), strict=True):
            buffer[row, :, : self.end - new] = 0  # of another request, perhaps not finite
            buffer[row, :, self.end - new : self.end] = part[0]

    def leave(self, row: int) -> None:
        assert self.buffers is not None  # there is a row
        last = len(self.lengths) - 1
        for buffer in self.buffers:
            if row != last:
                buffer[row] = buffer[last]
        if last == 0:
            self.buffers, self.end = None, 0

    def update(self, key_states: One, value_states: One, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.buffers is not None
        rows, width = len(self.lengths), self.kept() + 1
        if self.end == self.buffers[0].shape[2]:
            self._make_room(self.buffers[0].shape[0], width - 1, self.buffers)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, self.end] = new[:, :, 0]
        self.end += 1
        keys, values = (buffer[:rows, :, self.end - width : self.end] for buffer in self.buffers)
        return keys, values

    def _make_room(self, rows: int, end: int, like: tuple[Tensor, Tensor]) -> None:
        """New buffers whose rows end at ``end``, with columns to grow by a quarter; what no row sees is left behind."""
        old, columns = self.buffers, end + max(32, end // 4)
        made = []
        for i, part in enumerate(like):
            buffer = part.new_zeros(rows, part.shape[1], columns, part.shape[3])
            if old is not None:
                held, width = min(old[i].shape[0], rows), min(self.end, end)
                buffer[:held, :, end - width : end] = old[i][:held, :, self.end - width : self.end]
            made.append(buffer)
        self.buffers, self.end = (made[0], made[1]), end

    def parts(self) -> Iterator[Tensor]:
        yield from self.buffers or ()


def _beside(parts: list[Tensor], width: int) -> Float[Tensor, "rows heads width d"]:
    """Rows of unlike length, padded with zeros on the left; a row alone is not copied."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    out = first.new_zeros(len(parts), first.shape[1], width, first.shape[3])
    for row, part in zip(out, parts, strict=True):
        row[:, width - part.shape[2] :] = part[0]
    return out
