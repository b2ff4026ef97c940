"""Hidden states of the calibration tokens between blocks: on the device or in memory, beyond a limit in a file."""

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

LIMIT = 2 << 30  # bytes kept in the memory of the host


def room(device: torch.device) -> int:
    """Bytes of activations that may be kept on a device: LIMIT on the host, 3/4 of what is free now on a GPU."""
    if device.type != "cuda":
        return LIMIT
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) * 3 // 4


class Hidden:
    """The hidden states of all windows, visited batch by batch and replaced in place."""

    def __init__(self, data: Float[Tensor, "windows length d"], batch: int, file: Any) -> None:
        self.data, self.batch, self._file = data, batch, file
        self.moved = 0  # windows that are already what the next block reads, while a block is under way

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
        if size <= room(first.device):
            data = torch.empty(shape, dtype=first.dtype, device=first.device)
        elif size <= LIMIT:
            data = torch.empty(shape, dtype=first.dtype)
        else:
            file = _room(size)
            data = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=first.dtype).view(shape)
        data[:batch] = first
        for start in range(batch, shape[0], batch):
            data[start : start + batch] = stream.embed(tokens[start : start + batch])
        return cls(data, batch, file)

    def batches(self) -> list[slice]:
        return [slice(s, min(s + self.batch, len(self.data))) for s in range(0, len(self.data), self.batch)]

    def advance(self, stream: Stream, i: int, block: nn.Module) -> None:
        """Replace every window by what block ``i`` makes of it; interrupted, the next call goes on with the rest."""
        for start in range(self.moved, len(self.data), self.batch):
            batch = slice(start, min(start + self.batch, len(self.data)))
            stream.learn((batch.stop - batch.start, self.data.shape[1]))
            self.data[batch] = stream.run(i, block, self.data[batch])
            self.moved = batch.stop
        self.moved = 0

    def copy(self) -> Hidden:
        """The same hidden states in a place of their own (a file, where these are in one)."""
        file: Any = None
        if self._file is None:
            return Hidden(self.data.clone(), self.batch, None)
        file = _room(self.data.numel() * self.data.element_size())
        data = torch.from_file(file.name, shared=True, size=self.data.numel(), dtype=self.data.dtype)
        return Hidden(data.view(self.data.shape).copy_(self.data), self.batch, file)


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
