"""KVCache: a cache for transformers that holds keys and values in few bits.

    cache = KVCache(model.config, CacheFormat.parse("int4-head"))
    model.generate(**inputs, past_key_values=cache)

Every token is rounded when it is written, the current one too, and attention runs on the decoded numbers: what is
measured is what is stored. Raw stay the first ``sink`` tokens (of the padded batch, where there is padding), the last
``window``, and an unfinished group of a per-channel format. A layer with sliding attention forgets what its window has
passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import FormatError, ModelError
from lowbit.formats.heads import CacheFormat, HeadFormat, Packed, head_format

New = Float[Tensor, "batch heads new d"]
Seen = Float[Tensor, "batch heads seen d"]


class KVCache(Cache):  # type: ignore[misc]
    """Raises ModelError for a model with layers that cache anything but keys and values, such as a recurrent state.

    ``mirror`` keeps the decoded numbers beside the packed ones: the same results in less time and more memory, for
    scoring token by token.
    """

    def __init__(self, config: PreTrainedConfig, kv: CacheFormat, *, mirror: bool = False) -> None:
        self.kv = kv
        super().__init__(layers=[KVLayer(kv, _window(layer, i), mirror) for i, layer in enumerate(_layers(config))])

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, scales and raw tokens included, a mirror not."""
        return sum(
            p.numel() * p.element_size() for layer in self.layers if isinstance(layer, KVLayer) for p in layer.parts()
        )


def _layers(config: PreTrainedConfig) -> list[Any]:
    """The layers that transformers itself would use."""
    return list(DynamicCache(config=config).layers)


def _window(layer: Any, i: int) -> int | None:
    """How far a layer looks back, None for without end."""
    if type(layer) is DynamicLayer:
        return None
    if type(layer) is DynamicSlidingWindowLayer:
        return int(layer.sliding_window)
    raise ModelError(
        f"layer {i} keeps a {type(layer).__name__}", why="only plain and sliding attention have a low-bit cache",
        fix="leave the KV format out",
    )  # fmt: skip


class KVLayer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one layer."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, kv: CacheFormat, sliding_window: int | None, mirror: bool) -> None:
        super().__init__()
        self.kv, self.sliding_window, self.mirror = kv, sliding_window, mirror
        self.is_sliding = sliding_window is not None
        self.reset()

    def reset(self) -> None:
        self.seen = 0
        self.stores = [Store(head_format(f), self.kv, self.mirror) for f in (self.kv.key, self.kv.value)]
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "batch heads new dk"],
        value_states: Float[Tensor, "batch heads new dv"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch heads seen dk"], Float[Tensor, "batch heads seen dv"]]:
        """Write new tokens; returns what they attend to, decoded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        visible, _ = self.get_mask_sizes(key_states.shape[-2])
        self.seen += key_states.shape[-2]
        written = zip(self.stores, (key_states, value_states), strict=True)
        keys, values = (store.append(new)[:, :, -visible:] for store, new in written)
        if self.sliding_window is not None:
            for store in self.stores:
                store.forget(self.sliding_window - 1)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens the next ``query_length`` attend to, and the position of the first."""
        kept = self.seen if self.sliding_window is None else min(self.seen, self.sliding_window - 1)
        return kept + query_length, self.seen - kept

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: raises FormatError. What was packed with its neighbours cannot be taken back."""
        if tokens_to_remove:
            raise FormatError("a low-bit cache cannot be shortened", where=str(self.kv), fix="generate without a draft")

    def reorder_cache(self, beam_idx: Int[Tensor, "batch"]) -> None:
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda part: part[indices])

    def parts(self) -> Iterator[Tensor]:
        """Every stored tensor."""
        for store in self.stores:
            yield from store.parts()

    def _map(self, f: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores:
            store.map(f)


class Store:
    """The keys, or the values, of one layer, oldest first: raw sink, packed tokens, raw tail."""

    def __init__(self, fmt: HeadFormat | None, kv: CacheFormat, mirror: bool) -> None:
        self.fmt, self.window, self.mirror = fmt, kv.window, mirror
        self.to_sink = kv.sink  # how many tokens are still to come
        self.sink: Tensor | None = None
        self.packed: Packed | None = None
        self.decoded: Tensor | None = None
        self.tail: Tensor | None = None

    @classmethod
    def raw(cls, tokens: Seen) -> Store:
        """A store that keeps these as they are."""
        store = cls(None, CacheFormat("raw", "raw"), mirror=False)
        store.sink, store.tail = tokens[:, :, :0], tokens
        return store

    def append(self, new: New) -> Seen:
        """Write tokens; returns everything that is stored, decoded."""
        self.write(new)
        return self.around(self._middle(new))

    def write(self, new: New) -> None:
        """Write tokens, packing what is ready."""
        if self.sink is None or self.tail is None:
            if self.fmt is not None:
                self.fmt.check(new.shape[-1])
            self.sink = self.tail = new[:, :, :0]
        first = new[:, :, : self.to_sink]
        self.to_sink -= first.shape[2]
        self.sink = torch.cat([self.sink, first], dim=2)
        self.tail = torch.cat([self.tail, new[:, :, first.shape[2] :]], dim=2)
        if self.fmt is not None:
            ready = max(self.tail.shape[2] - self.window, 0) // self.fmt.tokens * self.fmt.tokens
            if ready:
                self._pack(self.fmt, self.tail[:, :, :ready])
                self.tail = self.tail[:, :, ready:].clone()  # a view would hold what was packed

    def around(self, middle: list[Float[Tensor, "batch heads packed d"]]) -> Seen:
        """Everything in its order; ``middle`` is what is packed, decoded."""
        assert self.sink is not None  # something was written
        assert self.tail is not None
        return torch.cat([self.sink, *middle, self.tail], dim=2)

    def forget(self, keep: int) -> None:
        """Drop the oldest tokens beyond ``keep``; a group goes once all of it can."""
        assert self.sink is not None  # something was written
        assert self.tail is not None
        packed = self.packed_tokens()
        extra = self.sink.shape[2] + packed + self.tail.shape[2] - keep
        if extra <= 0:
            return
        raw = min(extra, self.sink.shape[2])
        self.sink, extra = self.sink[:, :, raw:].clone(), extra - raw
        unit = self.fmt.tokens if self.fmt is not None else 1
        gone = min(extra, packed) // unit * unit
        if self.packed is not None and gone:
            rows = gone * self.packed.codes.shape[2] // packed
            self.packed = _each(self.packed, lambda part: part[:, :, rows:].clone())
            self.decoded = None if self.decoded is None else self.decoded[:, :, gone:].clone()
        if gone == packed:
            self.tail = self.tail[:, :, extra - gone :].clone()

    def parts(self) -> Iterator[Tensor]:
        for part in (self.sink, *(self.packed or ()), self.tail):
            if part is not None:
                yield part

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        self.sink, self.tail, self.decoded = (None if p is None else f(p) for p in (self.sink, self.tail, self.decoded))
        self.packed = None if self.packed is None else _each(self.packed, f)

    def _pack(self, fmt: HeadFormat, tokens: New) -> None:
        new = fmt.encode(tokens)
        if self.mirror:
            plain = fmt.decode(new, tokens.shape[-1], tokens.dtype)
            self.decoded = plain if self.decoded is None else torch.cat([self.decoded, plain], dim=2)
        self.packed = new if self.packed is None else joined([self.packed, new])

    def _middle(self, like: New) -> list[Seen]:
        if self.packed is None or self.fmt is None:
            return []
        return [self.decoded if self.decoded is not None else self.fmt.decode(self.packed, like.shape[-1], like.dtype)]

    def packed_tokens(self) -> int:
        """How many tokens are packed."""
        if self.packed is None or self.fmt is None or self.tail is None:
            return 0
        rows = self.packed.codes.shape[2]
        return rows if self.fmt.tokens == 1 else rows // self.tail.shape[3] * self.fmt.tokens


def _each(packed: Packed, f: Callable[[Tensor], Tensor]) -> Packed:
    return Packed(f(packed.codes), f(packed.scale), None if packed.zero is None else f(packed.zero))


def joined(parts: Sequence[Packed]) -> Packed:
    """The rows of one after those of the other; all of one format."""
    zeros = [part.zero for part in parts if part.zero is not None]
    return Packed(
        torch.cat([part.codes for part in parts], dim=2), torch.cat([part.scale for part in parts], dim=2),
        torch.cat(zeros, dim=2) if zeros else None,
    )  # fmt: skip
