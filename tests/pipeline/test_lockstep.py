"""Lockstep: threads are used again, and let go of what they held."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from lowbit.models.stream import Stream
from lowbit.pipeline import lockstep
from lowbit.pipeline.lockstep import Lockstep
from lowbit.pipeline.spill import Hidden


class FourBatches(Hidden):
    """Four batches of one window."""

    def __init__(self) -> None:
        super().__init__(torch.arange(4.0).view(4, 1, 1), 1, None)


class Threads(Stream):
    """Notes which threads run a block."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def run(self, i: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        self.threads.add(threading.get_ident())
        out: torch.Tensor = block(hidden)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x) == 3 and getattr(self, "fails", False):
            raise ValueError("third batch")
        with torch.no_grad():
            return self.gate(x * 2) + 1


@pytest.fixture
def made() -> tuple[Threads, Block, FourBatches]:
    lockstep._IDLE.clear()
    return Threads(), Block(), FourBatches()


def a_pass(stream: Threads, block: Block, hidden: FourBatches) -> None:
    seen: list[float] = []
    with Lockstep(stream, 0, block, hidden, [block.gate]) as batches:
        batches.until(block.gate, lambda x: seen.append(float(x)))
        assert seen == [2 * float(x) for x in hidden.data.flatten()]
        block.gate.weight.data.fill_(10.0)
        block.gate.bias.data.zero_()
        batches.finish()


def test_the_next_block_runs_in_the_same_threads(made: tuple[Threads, Block, FourBatches]) -> None:
    stream, block, hidden = made
    a_pass(stream, block, hidden)
    assert hidden.data.flatten().tolist() == [1.0, 21.0, 41.0, 61.0]
    first = set(stream.threads)
    a_pass(stream, block, hidden)
    assert stream.threads == first
    assert len(first) == 4
    assert hidden.moved == 0


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_early_frees_all_and_threads_can_be_used_again(
    made: tuple[Threads, Block, FourBatches], fails: bool
) -> None:
    stream, block, hidden = made
    block.fails = fails  # type: ignore[assignment]
    kept: list[weakref.ref[torch.Tensor]] = []

    def leave() -> None:
        with Lockstep(stream, 0, block, hidden, [block.gate]) as batches:
            batches.until(block.gate, lambda x: kept.append(weakref.ref(x)))
            raise ValueError("enough")

    with pytest.raises(ValueError, match="third batch" if fails else "enough"):
        leave()
    gc.collect()
    assert len(kept) == (3 if fails else 4)
    assert all(ref() is None for ref in kept)
    block.fails = False  # type: ignore[assignment]
    a_pass(stream, block, hidden)
    assert len(stream.threads) == 4
