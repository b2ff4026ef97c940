"""Large reads of a model's files, past the page cache, many in flight: what a model larger than memory is read by.

    reader = Reader([path])
    ticket = reader.submit(0, offset, length, buffer)     # returns at once
    reader.wait(ticket)                                    # the bytes are in buffer.bytes[:length]

Reads go by O_DIRECT where the file system has it, through io_uring where the kernel lets us, else through a few
threads; elsewhere what was read is dropped from the page cache. See ``native/reader.cpp``.
"""

from __future__ import annotations

import ctypes
import mmap
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from lowbit import _native
from lowbit.arrays import Tensor, UInt8
from lowbit.errors import StorageError

PAGE = 4096
"""Offsets and addresses of direct reads are multiples of this."""
DEPTH, REQUEST = 8, 4 << 20
Engine = Literal["auto", "uring", "threads"]


class Buffer:
    """Memory that direct reads may fill: whole pages, given back to the system when it is dropped."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // PAGE) * PAGE
        self._map = mmap.mmap(-1, max(self.nbytes, PAGE))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.bytes: UInt8[Tensor, "n"] = torch.frombuffer(self._map, dtype=torch.uint8)


class Ticket(NamedTuple):
    """A read under way."""

    file: int
    number: int


class Reader:
    """Reads of some files; usable by one thread at a time.

    ``engine`` is ``auto`` or the one to insist on; ``direct=False`` reads through the page cache. Raises StorageError
    for a file that cannot be opened, and where ``uring`` is insisted on and the kernel refuses it.
    """

    def __init__(
        self, paths: Sequence[Path], *, engine: Engine = "auto", direct: bool = True,
        depth: int = DEPTH, request: int = REQUEST,
    ) -> None:  # fmt: skip
        self.paths = tuple(paths)
        try:
            self._native = _native.Reader([str(path) for path in paths], depth, request, engine, direct)
        except RuntimeError as error:
            raise StorageError(f"cannot be read: {error}", where=str(paths[0].parent if paths else "")) from error
        self._filled: dict[int, Buffer] = {}
        # memory that the kernel still writes to must outlive the reads, also when all of this is collected at once
        self._closing = weakref.finalize(self, self._native.close)

    @property
    def engine(self) -> str:
        return str(self._native.engine)

    @property
    def direct(self) -> bool:
        """Whether no file went through the page cache so far."""
        return bool(self._native.direct)

    def submit(self, file: int, offset: int, length: int, buffer: Buffer) -> Ticket:
        """Begin to read ``length`` bytes at ``offset`` (a whole page) of ``paths[file]`` into ``buffer``."""
        if not 0 < length <= buffer.nbytes:
            raise ValueError(f"{length} bytes into a buffer of {buffer.nbytes}")
        try:
            number = int(self._native.submit(file, offset, length, buffer.address))
        except RuntimeError as error:
            raise StorageError(f"cannot be read: {error}", where=str(self.paths[file])) from error
        self._filled[number] = buffer
        return Ticket(file, number)

    def wait(self, ticket: Ticket) -> None:
        """Until all of it has arrived. Raises StorageError, naming the file, when it was cut short or unreadable."""
        problem = self._native.wait(ticket.number)
        del self._filled[ticket.number]
        if problem:
            raise StorageError(
                f"cannot be read: {problem}", where=str(self.paths[ticket.file]),
                why="it was cut short or altered, or the disk failed", fix="copy the checkpoint again",
            )  # fmt: skip

    def close(self) -> None:
        """Forget what has not begun and wait for what has; nothing can be read afterwards."""
        self._closing()


def disk_rate(paths: Sequence[Path], seconds: float = 0.5) -> float:
    """Bytes a second at which these files can be read in large pieces, past the page cache; reads for ``seconds``."""
    reader = Reader(paths)
    sizes = [path.stat().st_size for path in paths]
    buffers = [Buffer(16 << 20), Buffer(16 << 20)]
    pieces = [
        (file, at, min(16 << 20, size - at)) for file, size in enumerate(sizes) for at in range(0, size, 16 << 20)
    ]
    if not pieces:
        raise StorageError("has no bytes to measure the disk by", where=str(paths[0] if paths else ""))
    done, turn = 0, 0
    flying: list[tuple[Ticket, int]] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or flying:
        if len(flying) == len(buffers) or time.perf_counter() - started >= seconds:
            ticket, length = flying.pop(0)
            reader.wait(ticket)
            done += length
        else:
            file, at, length = pieces[turn % len(pieces)]
            flying.append((reader.submit(file, at, length, buffers[turn % 2]), length))
            turn += 1
    rate = done / (time.perf_counter() - started)
    reader.close()
    return rate
