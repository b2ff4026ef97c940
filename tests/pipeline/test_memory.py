"""Out of memory, a walk goes on with fewer windows at once, says so, and ends with the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sinks import Kept, recipe

from lowbit.models.source import of_directory
from lowbit.models.stream import Stream
from lowbit.pipeline import encode
from lowbit.pipeline.memory import is_out_of_memory
from lowbit.pipeline.walk import Progress, walk


def _little_memory(monkeypatch: pytest.MonkeyPatch, windows: int, error: Exception) -> None:
    plain = Stream.run_with_gradients

    def run(self: Stream, i: int, block: Any, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[0] > windows:
            raise error
        return plain(self, i, block, hidden)

    monkeypatch.setattr(Stream, "run_with_gradients", run)


@pytest.mark.parametrize(
    ("line", "lockstep"),
    [("gptq:int3-g32,damp=0.1", True), ("smoothquant+gptq:int3-g32,damp=0.1", False)],
)
def test_smaller_chunks_give_the_codes_of_smaller_chunks(
    llama: Path, tokens: torch.Tensor, line: str, lockstep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not lockstep:
        monkeypatch.setattr(encode.BlockWork, "_fits", lambda self: False)
    small, shrunk, notes = Kept(), Kept(), []
    walk(of_directory(llama), recipe(line, batch=2), tokens, small)
    _little_memory(monkeypatch, 2, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"))
    walk(of_directory(llama), recipe(line, batch=6), tokens, shrunk, on_progress=lambda p: notes.append(p.note))
    said = [note for note in notes if note]
    assert said == [
        "out of memory with 6 windows at once; going on with 3",
        "out of memory with 3 windows at once; going on with 1",
    ]
    differ = [float((small.codes[site].decode() != q.decode()).float().mean()) for site, q in shrunk.codes.items()]
    assert max(differ) < 0.01  # sums over other chunks: a code on an edge may fall either way


def test_an_undisturbed_walk_says_nothing_and_a_real_error_is_raised(
    llama: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []
    walk(of_directory(llama), recipe("gptq:int3-g32,damp=0.1"), tokens, Kept(), on_progress=seen.append)
    assert not any(p.note for p in seen)
    _little_memory(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        walk(of_directory(llama), recipe("gptq:int3-g32,damp=0.1"), tokens, Kept())


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
