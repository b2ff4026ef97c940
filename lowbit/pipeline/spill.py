"""Hidden states of the calibration tokens between blocks: in memory, or in a temporary file beyond a limit."""

from __future__ import annotations

import math
import os
import tempfile
from typing import Any

import torch
from torch import nn

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import StorageError
from lowbit.models.stream import Stream

LIMIT = 2 << 30  # bytes kept in memory


class Hidden:
    """The hidden states of all windows, visited batch by batch and replaced in place."""

    def __init__(self, data: Float[Tensor, "windows length d"], batch: int, file: Any) -> None:
        self.data, self.batch, self._file = data, batch, file

    @staticmethod
    def nbytes(windows: int, length: int, d: int, dtype: torch.dtype) -> int:
        return windows * length * d * dtype.itemsize

    @classmethod
    def embed(cls, stream: Stream, tokens: Int[Tensor, "windows length"], batch: int) -> Hidden:
        """What the first block reads, for every window."""
        stream.embed(tokens[:1])  # one window is run alone to see which linears share their inputs
        first = stream.embed(tokens[:batch])
        shape = (tokens.shape[0], tokens.shape[1], first.shape[-1])
        file: Any = None
        size = cls.nbytes(*shape, first.dtype)
        if size > LIMIT:
            file = _room(size)
            data = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=first.dtype).view(shape)
        else:
            data = torch.empty(shape, dtype=first.dtype, device=first.device)
        data[:batch] = first
        for start in range(batch, shape[0], batch):
            data[start : start + batch] = stream.embed(tokens[start : start + batch])
        return cls(data, batch, file)

    def batches(self) -> list[slice]:
        return [slice(s, min(s + self.batch, len(self.data))) for s in range(0, len(self.data), self.batch)]

    def advance(self, stream: Stream, i: int, block: nn.Module) -> None:
        """Replace every window by what block ``i`` makes of it."""
        for batch in self.batches():
            self.data[batch] = stream.run(i, block, self.data[batch])


def _room(size: int) -> Any:
    """A temporary file with its blocks allocated: a full disk is an error here, not a crash at some later write."""
    file = tempfile.NamedTemporaryFile(prefix="lowbit-hidden-")  # noqa: SIM115 - the caller keeps it open
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        raise StorageError(
            f"no room for {size / 2**30:.1f} GiB of hidden states: {error.strerror}", where=tempfile.gettempdir(),
            fix="TMPDIR on a larger disk, or fewer or shorter calibration samples",
        ) from error  # fmt: skip
    return file
