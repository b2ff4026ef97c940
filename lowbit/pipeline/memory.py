"""Going on after an out-of-memory: fewer windows at once, said aloud."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from lowbit.models.stream import Stream
from lowbit.pipeline.spill import Hidden

T = TypeVar("T")


class Chunks:
    """Runs work over hidden states; out of memory, halves the windows run at once and starts that work again.

    Sums over other chunks may differ from an undisturbed run's in the last bits of a float.
    """

    def __init__(self, stream: Stream, hidden: list[Hidden], note: Callable[[str], None]) -> None:
        self._stream, self._hidden, self._note = stream, hidden, note

    def run(self, work: Callable[[], T]) -> T:
        """The result of ``work``; raises what it raises once a single window does not fit either."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._halve():
                    raise

    def attempt(self, work: Callable[[], object]) -> bool:
        """Whether ``work`` ran to its end; out of memory, what comes after it runs in smaller chunks."""
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not self._halve():
                raise
            return False
        return True

    def _halve(self) -> bool:
        """Whether there was something left to halve."""
        batch = max((hidden.batch for hidden in self._hidden), default=1)
        if batch == 1:
            return False
        for hidden in self._hidden:
            hidden.batch = batch // 2
            for part in hidden.batches():
                self._stream.learn((part.stop - part.start, hidden.data.shape[1]))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._note(f"out of memory with {batch} windows at once; going on with {batch // 2}")
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's: torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
