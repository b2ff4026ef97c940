"""The keys, or the values, of one layer for all rows of a batch: in full, rounded token by token, or in groups.

Every store gives what attention reads as one tensor whose rows end at the last column, zeros before the shorter ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from lowbit.arrays import Float, Tensor
from lowbit.formats.heads import CacheFormat, HeadFormat, Packed
from lowbit.runtime.kvcache import Store, joined

New = Float[Tensor, "rows heads one d"]
Seen = Float[Tensor, "rows heads width d"]


def row_store(fmt: HeadFormat | None, kv: CacheFormat, lengths: list[int], window: int | None) -> RowStore:
    """An empty store. ``lengths``: tokens that every row has seen, kept by the caller; ``window``: how far the layer
    looks back, None for without end."""
    if fmt is None:
        return RawRows()
    return TokenRows(fmt, kv, lengths) if fmt.tokens == 1 else GroupRows(fmt, window)


class RowStore(ABC):
    """Keys, or values, of all rows."""

    @abstractmethod
    def join(self, store: Store, kept: int) -> None:
        """Add a row, which a request has written alone; then the longest row needs ``kept`` tokens."""

    @abstractmethod
    def leave(self, row: int) -> None:
        """Remove a row; the last one takes its place."""

    @abstractmethod
    def update(self, new: New, width: int) -> Seen:
        """Write a token a row; returns the last ``width``, decoded."""

    @abstractmethod
    def parts(self) -> Iterator[Tensor]:
        """Every tensor that is held."""


class RawRows(RowStore):
    """In full: attention reads a view."""

    def __init__(self) -> None:
        self._columns = Columns()

    def join(self, store: Store, kept: int) -> None:
        self._columns.join((store.around([]),), kept)

    def leave(self, row: int) -> None:
        self._columns.leave(row)

    def update(self, new: New, width: int) -> Seen:
        self._columns.append((new,), width - 1)
        return self._columns.last(width)[0]

    def parts(self) -> Iterator[Tensor]:
        yield from self._columns.buffers


class TokenRows(RowStore):
    """A format that rounds each token by itself: one call encodes the new tokens of all rows, one decodes all they see.

    Packed is all that is older than the raw window, sinks too: their raw numbers are laid over what was decoded, which
    keeps the columns of all rows in step.
    """

    def __init__(self, fmt: HeadFormat, kv: CacheFormat, lengths: list[int]) -> None:
        self.fmt, self.window, self.sink, self.lengths = fmt, kv.window, kv.sink, lengths
        self._packed, self._recent = Columns(), Columns()
        self._sinks: list[Tensor] = []  # a row: (heads, sink, d)

    def join(self, store: Store, kept: int) -> None:
        assert store.sink is not None  # a prompt was read
        assert store.tail is not None
        packed = store.packed
        if packed is None:
            one = self.fmt.encode(torch.zeros_like(store.around([])[:, :, :1]))
            packed = Packed(one.codes[:, :, :0], one.scale[:, :, :0], None if one.zero is None else one.zero[:, :, :0])
        self._packed.join(_held(packed), max(kept - self.window, 0))
        if self.window:
            self._recent.join((store.tail,), self.window)
        _, heads, count, d = store.sink.shape
        sink, end = store.sink.new_zeros(heads, self.sink, d), self.sink - store.to_sink
        sink[:, end - count : end] = store.sink[0]  # a sliding window may have forgotten the first
        self._sinks.append(sink)

    def leave(self, row: int) -> None:
        self._packed.leave(row)
        if self.window:
            self._recent.leave(row)
        self._sinks[row] = self._sinks[-1]
        self._sinks.pop()

    def update(self, new: New, width: int) -> Seen:
        ready, old = new, max(width - self.window, 0)
        if self.window:
            self._recent.append((new,), self.window)
            ready = self._recent.last(self.window + 1)[0][:, :, :1]
        self._packed.append(_held(self.fmt.encode(ready)), max(old - 1, 0))
        parts = []
        if old:
            parts.append(self.fmt.decode(_packed(self._packed.last(old)), new.shape[-1], new.dtype))
        if self.window:
            parts += self._recent.last(width - old)
        out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        if self.sink:
            out = out.clone() if not old else out  # else a view of what is held
            self._lay_sinks(new, out)
        return out

    def _lay_sinks(self, new: New, out: Seen) -> None:
        for row, (sink, length) in enumerate(zip(self._sinks, self.lengths, strict=True)):
            if length < self.sink:
                sink[:, length] = new[row, :, 0]
            first = length + 1 - out.shape[2]  # the position in the first column, negative before the row begins
            begin, end = max(first, 0), min(self.sink, length + 1)
            if begin < end:
                out[row, :, begin - first : end - first] = sink[:, begin:end]

    def parts(self) -> Iterator[Tensor]:
        yield from (*self._packed.buffers, *self._recent.buffers, *self._sinks)


class GroupRows(RowStore):
    """A format of groups of tokens, which begin elsewhere in every row: each writes alone, one call decodes all."""

    def __init__(self, fmt: HeadFormat, window: int | None) -> None:
        self.fmt, self.window = fmt, window
        self._stores: list[Store] = []

    def join(self, store: Store, kept: int) -> None:
        self._stores.append(store)

    def leave(self, row: int) -> None:
        self._stores[row] = self._stores[-1]
        self._stores.pop()

    def update(self, new: New, width: int) -> Seen:
        for store, one in zip(self._stores, new.split(1), strict=True):
            store.write(one)
        out = new.new_zeros(len(self._stores), new.shape[1], width, new.shape[3])
        for row, store, middle in zip(out, self._stores, self._decoded(new), strict=True):
            seen = store.around(middle)[0, :, -width:]
            row[:, width - seen.shape[1] :] = seen
            if self.window is not None:
                store.forget(self.window - 1)
        return out

    def _decoded(self, like: New) -> list[list[Tensor]]:
        """Of every row what it has packed; none where that is nothing."""
        packed = [store.packed for store in self._stores if store.packed is not None]
        if not packed:
            return [[] for _ in self._stores]
        counts = [store.packed_tokens() for store in self._stores if store.packed is not None]
        parts = iter(self.fmt.decode(joined(packed), like.shape[-1], like.dtype).split(counts, dim=2))
        return [[] if store.packed is None else [next(parts)] for store in self._stores]

    def parts(self) -> Iterator[Tensor]:
        for store in tuple(self._stores):
            yield from store.parts()


class Columns:
    """Tensors with a column a token, all rows ending at column ``end``: a new token is one column more.

    Memory: the longest row and a quarter for all rows, and twice as many rows as came when there was no room.
    """

    def __init__(self) -> None:
        self.rows, self.end = 0, 0
        self.buffers: tuple[Tensor, ...] = ()  # each (room for rows, heads, room for columns, numbers)

    def join(self, parts: tuple[Tensor, ...], keep: int) -> None:
        """Add a row, each part (1, heads, columns, numbers); ``keep`` columns of all rows at least are held."""
        row, new = self.rows, int(parts[0].shape[2])
        room = self.buffers[0].shape[0] if self.buffers else 0
        if row == room or max(new, keep) > self.end:
            more = max(4, 2 * row) if row else 1
            self._make_room(more if row == room else room, max(new, keep), parts)
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer[row, :, : self.end - new] = 0  # of another request, perhaps not finite
            buffer[row, :, self.end - new : self.end] = part[0]
        self.rows += 1

    def leave(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        self.rows -= 1
        for buffer in self.buffers:
            if row != self.rows:
                buffer[row] = buffer[self.rows]
        if self.rows == 0:
            self.buffers, self.end = (), 0

    def append(self, parts: tuple[Tensor, ...], keep: int) -> None:
        """One column, each part (rows, heads, 1, numbers); of the columns before it at least ``keep`` are held."""
        if self.end == self.buffers[0].shape[2]:
            self._make_room(self.buffers[0].shape[0], keep, self.buffers)
        for buffer, part in zip(self.buffers, parts, strict=True):
            self._used(buffer).select(2, self.end).copy_(part.select(2, 0))
        self.end += 1

    def last(self, width: int) -> tuple[Tensor, ...]:
        """Views of the last columns."""
        first = self.end - width
        return tuple([self._used(buffer).narrow(2, first, width) for buffer in self.buffers])

    def _used(self, buffer: Tensor) -> Tensor:
        return buffer if len(buffer) == self.rows else buffer.narrow(0, 0, self.rows)

    def _make_room(self, rows: int, end: int, like: tuple[Tensor, ...]) -> None:
        """New buffers whose rows end at ``end``, with columns to grow by a quarter; what no row sees is left behind."""
        old, columns = self.buffers, end + max(32, end // 4)
        made = []
        for i, part in enumerate(like):
            buffer = part.new_zeros(rows, part.shape[1], columns, part.shape[3])
            if old:
                held, width = min(old[i].shape[0], rows), min(self.end, end)
                buffer[:held, :, end - width : end] = old[i][:held, :, self.end - width : self.end]
            made.append(buffer)
        self.buffers, self.end = tuple(made), end


def _held(packed: Packed) -> tuple[Tensor, ...]:
    return tuple(part for part in packed if part is not None)


def _packed(parts: tuple[Tensor, ...]) -> Packed:
    return Packed(parts[0], parts[1], parts[2] if len(parts) == 3 else None)
