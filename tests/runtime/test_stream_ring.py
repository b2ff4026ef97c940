"""The ring over a disk that poisons every buffer it is given, until the bytes are waited for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.arrays import Tensor
from lowbit.errors import StorageError
from lowbit.runtime.reader import PAGE, Buffer, Reader, Ticket
from lowbit.runtime.stream import Ring
from lowbit.runtime.stream_shard import Extent

POISON = 0xEE


class Poisoning(Reader):
    """Stands for a Reader: a buffer is spoiled when a read into it begins, and right when it was waited for."""

    def __init__(self) -> None:
        self.flying: dict[int, Buffer] = {}
        self.order: list[int] = []
        self.broken: set[int] = set()

    def submit(self, file: int, offset: int, length: int, buffer: Buffer) -> Ticket:
        assert all(buffer is not other for other in self.flying.values())
        buffer.bytes.fill_(POISON)
        self.flying[len(self.order)] = buffer
        self.order.append(file)
        return Ticket(file, len(self.order) - 1)

    def wait(self, ticket: Ticket) -> None:
        buffer = self.flying.pop(ticket.number)
        if ticket.file in self.broken:
            raise StorageError("cannot be read", where=str(ticket.file))
        buffer.bytes.fill_(ticket.file)

    def close(self) -> None:
        pass


def ring(turns: int, buffers: int) -> tuple[Ring, Any]:
    extents = [Extent(Path(str(i)), 0, PAGE, {}) for i in range(turns)]
    disk: Any = Poisoning()
    return Ring(disk, extents, buffers), disk


def is_block(bytes: Tensor, turn: int) -> bool:
    return bool(torch.all(bytes == turn))


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("turns", [1, 2, 3, 5])
def test_passes_find_their_blocks_and_read_ahead_of_them(turns: int, buffers: int) -> None:
    held, disk = ring(turns, buffers)
    for _ in range(4):
        for turn in range(turns):
            bytes = held.acquire(turn)
            assert is_block(bytes, turn)
            assert disk.order[-1] == (turn + min(buffers, turns) - 1) % turns  # as far ahead as there is room
            assert is_block(bytes, turn)
            held.release()
    assert disk.order == [i % turns for i in range(len(disk.order))]  # nothing is read twice
    assert len(held.buffers) == min(buffers, turns)


def test_any_order_finds_its_blocks_and_never_one_that_is_in_use() -> None:
    draw = random.Random(0)
    for buffers in (1, 2, 3):
        held, disk = ring(6, buffers)
        for _ in range(300):
            turn = draw.randrange(6)
            bytes = held.acquire(turn)
            assert is_block(bytes, turn)
            if draw.random() < 0.7:  # else the pass was given up: no release
                held.release()
                assert not is_block(bytes, turn)  # given back, spoiled at once
            assert len(held.buffers) == buffers
            assert len(disk.flying) <= buffers


def test_a_read_that_failed_is_told_once_it_is_needed_and_tried_again() -> None:
    held, disk = ring(4, 2)
    disk.broken = {1}
    held.acquire(0)
    held.release()
    for _ in range(2):
        with pytest.raises(StorageError):
            held.acquire(1)
    disk.broken = set()
    assert is_block(held.acquire(1), 1)
    held.release()
    assert is_block(held.acquire(2), 2)
    assert len(held.buffers) == 2
