"""Schedule: which blocks stay in memory and which are read at every pass, and what a token then takes.

A pass reads weights in the same order every time. With M bytes of blocks, R of them kept for good, a disk of B bytes
a second and Tc seconds of arithmetic, reads that are issued ahead give

    t = max(Tc, (M - R) / B)

for *any* fixed choice of what is kept, while a cache that evicts what was used longest ago (the page cache under
mmap) has always just dropped what comes next and gives M / B. So the choice is made once; what is read is spread
evenly among what is kept, so that arithmetic and reading overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.errors import RecipeError

BUFFERS = 2
"""One block is used while the next arrives."""


@dataclass(frozen=True)
class Schedule:
    """A fixed partition of the blocks. All sizes are bytes; ``fixed`` is what is held whatever the partition."""

    blocks: tuple[int, ...]
    streamed: tuple[int, ...]
    buffers: int
    fixed: int

    @property
    def total(self) -> int:
        """M: low-bit weights of all blocks."""
        return sum(self.blocks)

    @property
    def moved(self) -> int:
        """M - R: what is read at every pass."""
        return sum(self.blocks[i] for i in self.streamed)

    @property
    def resident(self) -> int:
        """R: what is read once."""
        return self.total - self.moved

    @property
    def room(self) -> int:
        """Of the buffers that blocks are read into."""
        return self.buffers * max((self.blocks[i] for i in self.streamed), default=0)

    @property
    def held(self) -> int:
        """All memory in use."""
        return self.fixed + self.resident + self.room


def schedule(blocks: Sequence[int], memory: int | None, fixed: int, buffers: int = BUFFERS) -> Schedule:
    """The largest resident share that ``memory`` (None: any amount) holds beside ``fixed`` and the buffers.

    Raises RecipeError with the smallest memory that suffices. Cost O(n²) for n blocks.
    """
    sizes = tuple(blocks)
    options = [Schedule(sizes, spread(len(sizes), k), min(buffers, k), fixed) for k in range(len(sizes) + 1)]
    if memory is None:
        return options[0]
    for option in options:
        if option.held <= memory:
            return option
    least = min(option.held for option in options)
    raise RecipeError(
        f"{mebibytes(memory)} of memory cannot hold this model, the smallest is {mebibytes(least)}",
        why=f"{mebibytes(fixed)} for Python, embedding, head, norms, keys and values, and room for {buffers} blocks",
        fix=f"--memory {mebibytes(least)}",
    )


def spread(n: int, k: int) -> tuple[int, ...]:
    """``k`` of ``n`` places, as evenly as they go."""
    return tuple((2 * i + 1) * n // (2 * k) for i in range(k))


def mebibytes(nbytes: int) -> str:
    """Rounded up: as much memory as this suffices."""
    return f"{-(-nbytes // (1 << 20))}MiB"


@dataclass(frozen=True)
class Rates:
    """A machine and a model: ``disk`` in bytes a second, arithmetic of a whole pass for one token in seconds.

    ``decode`` is how many bytes of 16-bit weights a second the kernels get through, product included.
    """

    disk: float
    compute: float
    decode: float


@dataclass(frozen=True)
class Prediction:
    """What a schedule will do at some rates."""

    schedule: Schedule
    rates: Rates
    outside: int
    """Bytes on disk of what belongs to no block; read once."""
    sixteen: int
    """What the blocks' low-bit weights would take in 16 bit."""

    @property
    def reading(self) -> float:
        """Seconds that the disk needs for a pass."""
        return self.schedule.moved / self.rates.disk

    @property
    def token(self) -> float:
        """Seconds a token: arithmetic and reading overlap, so that the longer counts."""
        return max(self.rates.compute, self.reading)

    @property
    def load(self) -> float:
        """Seconds until the first pass can begin, after the files were checked."""
        return (self.outside + self.schedule.resident + self.schedule.room) / self.rates.disk

    @property
    def ratio(self) -> float:
        """r: how many times smaller than in 16 bit."""
        return self.sixteen / max(self.schedule.total, 1)

    @property
    def token_sixteen(self) -> float:
        """Seconds a token for the same weights in 16 bit in the same memory, arithmetic not counted."""
        kept = self.schedule.resident + self.schedule.room
        return max(self.sixteen - kept, 0) / self.rates.disk

    @property
    def break_even(self) -> float:
        """Decode rate beyond which low-bit weights are read faster than 16-bit ones when nothing overlaps: B r/(r-1).

        Reading S bytes takes S/B; S/(rB) + S/D is less when D > B r/(r-1) (arXiv 2403.01384, section 4). With overlap
        it is less when D > B.
        """
        return self.rates.disk * self.ratio / (self.ratio - 1) if self.ratio > 1 else float("inf")
