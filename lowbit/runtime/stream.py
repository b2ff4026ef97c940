"""Ring: the buffers that streamed blocks pass through, read in the order in which they are used.

    ring = Ring(reader, extents)          # reads of the first blocks begin
    bytes = ring.acquire(0)               # waits for block 0
    ...                                   # use views of bytes
    ring.release()                        # its buffer takes the next block, while others are used

The order is a circle: behind the last block of a pass comes the first of the next one, so that reading never pauses
between tokens.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from lowbit.arrays import Tensor, UInt8
from lowbit.errors import StorageError
from lowbit.runtime.reader import Buffer, Reader, Ticket
from lowbit.runtime.schedule import BUFFERS
from lowbit.runtime.stream_shard import Extent


class Flight(NamedTuple):
    """A read ahead: which extent, into which buffer."""

    turn: int
    buffer: Buffer
    ticket: Ticket


class Ring:
    """``extents`` in the order of use; ``reader`` reads their files, in the same order."""

    def __init__(self, reader: Reader, extents: Sequence[Extent], buffers: int = BUFFERS) -> None:
        self.reader, self.extents = reader, tuple(extents)
        size = max(extent.nbytes for extent in extents)
        self._free = [Buffer(size) for _ in range(min(buffers, len(extents)))]
        self._ahead: deque[Flight] = deque()
        self._held: Flight | None = None
        self._user = 0  # the thread that acquired last
        self._restart(0)

    @property
    def buffers(self) -> list[Buffer]:
        """All of them, whatever they are used for."""
        held = [] if self._held is None else [self._held.buffer]
        return [*self._free, *(flight.buffer for flight in self._ahead), *held]

    def acquire(self, turn: int) -> UInt8[Tensor, "n"]:
        """The bytes of extent ``turn``, valid until ``release``; waits for them.

        Out of turn (a pass that was given up, blocks run alone) the reads ahead are dropped and begin again here.
        Raises StorageError when they cannot be read; the next call tries again.
        """
        user = threading.get_ident()
        if self._held is not None and self._user != user:
            raise StorageError(
                "two threads run one streamed model", where=str(self.reader.paths[turn]),
                why="a buffer serves one pass at a time", fix="one thread, or a lock around a whole pass",
            )  # fmt: skip
        self._user = user
        if self._held is not None:
            self.release()
        if not self._ahead or self._ahead[0].turn != turn:
            self._restart(turn)
        flight = self._ahead.popleft()
        try:
            self.reader.wait(flight.ticket)
        except StorageError:
            self._free.append(flight.buffer)
            raise
        self._held = flight
        return flight.buffer.bytes

    def release(self) -> None:
        """Give back what was acquired: its buffer is filled anew at once, and its bytes mean nothing any more."""
        if self._held is not None:
            held, self._held = self._held, None
            self._free.append(held.buffer)
            self._read_ahead((self._ahead[-1].turn if self._ahead else held.turn) + 1)

    def close(self) -> None:
        """Stop reading. Nothing can be acquired afterwards."""
        self.reader.close()

    def _restart(self, turn: int) -> None:
        while self._ahead:
            flight = self._ahead.popleft()
            self._free.append(flight.buffer)
            try:
                self.reader.wait(flight.ticket)
            except StorageError:
                continue  # nobody needs these bytes now; whoever does will be told
        self._read_ahead(turn)

    def _read_ahead(self, turn: int) -> None:
        """Fill every free buffer, from ``turn`` on."""
        while self._free:
            extent = self.extents[turn := turn % len(self.extents)]
            buffer = self._free[-1]
            self._ahead.append(Flight(turn, buffer, self.reader.submit(turn, extent.offset, extent.length, buffer)))
            self._free.pop()
            turn += 1
