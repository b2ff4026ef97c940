"""A cache of keys and values in full that grows without being copied at every token.

transformers' own layers make a new tensor for each token: over a long text that reads and writes all keys and values
once more a token. Here a layer has room for a quarter more than it holds.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from lowbit.arrays import Float, Tensor

New = Float[Tensor, "batch heads new d"]
Seen = Float[Tensor, "batch heads seen d"]
_LEAST = 64  # tokens of room


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """transformers' cache for a model, with plain layers that grow in place; those with a window stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """``keys`` and ``values`` are views of what is filled; whatever replaces them is copied once, and grows again."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: list[Tensor | None] = [None, None]

    def update(self, key_states: New, value_states: New, *_: Any, **__: Any) -> tuple[Seen, Seen]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended(0, self.keys, key_states)
        self.values = self._appended(1, self.values, value_states)
        return self.keys, self.values

    def _appended(self, which: int, held: Tensor | None, new: New) -> Seen:
        """``held`` and ``new``, one behind the other; what is held is a view of the room unless it was replaced."""
        if held is None or held.ndim != 4:  # nothing was written yet
            held = new[:, :, :0]
        if len(held) != len(new):
            raise ValueError(f"keys or values of {len(new)} rows behind those of {len(held)}")
        seen, end, room = held.shape[2], held.shape[2] + new.shape[2], self._rooms[which]
        grows = room is not None and held.data_ptr() == room.data_ptr() and len(held) == len(room)
        if room is None or not grows or end > room.shape[2]:
            batch, heads, _, d = new.shape
            room = self._rooms[which] = new.new_empty(batch, heads, end + max(_LEAST, end // 4), d)
            room.narrow(2, 0, seen).copy_(held)
        room.narrow(2, seen, end - seen).copy_(new)
        return room.narrow(2, 0, end)
