"""Scoring a model that is never whole in memory: all windows go through one block, then through the next.

    scorer = BlockScorer(dense(root), weights, memory=2 << 30)      # or low_bit(root, dtype), for a native checkpoint
    reference = scorer.reference(windows)

Every weight is read once, whatever the number of windows. In memory at once: a block and the embedding, or the head
and the reference's (once where they are the same); the activations of ``batch`` windows; and the hidden states of all,
where the limit leaves room for them, else they are in a temporary file. What is computed is what ``Scorer`` computes,
with the same kernels.
"""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from lowbit.arrays import Float, Int, Tensor
from lowbit.codec.container import DTYPES, open_tensors
from lowbit.errors import ModelError, RecipeError, StorageError
from lowbit.evaluation.head import Head
from lowbit.evaluation.protocol import Windows
from lowbit.evaluation.scorer import ROWS, WindowScorer
from lowbit.formats.heads import CacheFormat
from lowbit.io import native
from lowbit.io.opening import plain_config, skeleton
from lowbit.models.graph import is_linear, matrix
from lowbit.models.source import Source, of_directory
from lowbit.models.store import Files, read_json
from lowbit.models.stream import Stream
from lowbit.pipeline.spill import Hidden
from lowbit.runtime.facade import use_kernels
from lowbit.runtime.linear import QLinear
from lowbit.runtime.schedule import mebibytes
from lowbit.runtime.stream_model import SLACK
from lowbit.runtime.transformers_quantizer import install

_LIBC = ctypes.CDLL(None)
_LOGITS, _DECODING = 5, 3
"""Arrays of one number a logit, and of four bytes a weight of the linear that is being decoded."""


class BlockScorer(WindowScorer):
    """A model in files, to be scored in ``memory`` bytes of the whole process; ``base`` are those that it has already,
    by default what it has when scoring begins.

    The identity says that blocks were run one by one, since sums may be made in another order than in a whole model;
    it does not depend on ``memory``. Raises RecipeError for a memory that is too small, with the smallest that is not,
    when windows are scored; and EvidenceError for a ``kv`` format, which needs a chunk.
    """

    def __init__(
        self, source: Source, weights: str, *, memory: int, dtype: torch.dtype = torch.float32, batch: int = 1,
        kv: CacheFormat | None = None, base: int | None = None,
        on_block: Callable[[int, int], object] = lambda _done, _total: None,
    ) -> None:  # fmt: skip
        super().__init__(source.skeleton, weights, batch, kv, None)
        self.source, self.memory, self.base, self.on_block = source, memory, base, on_block
        self._dtype = dtype
        self._stream: Stream | None = None
        self._left = 0  # bytes of memory for hidden states

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def _device(self) -> str:
        return "cpu"

    def _run(self) -> list[Any]:
        return [*super()._run(), "block by block"]

    def least(self, length: int) -> int:
        """Bytes held at the worst moment, hidden states apart, for windows of ``length`` tokens.

        Of the block, the embedding and the head: the weights as they are multiplied, and what is stored of them, where
        that is another dtype. Then activations, logits of ROWS tokens, this process as it is, and SLACK.
        """
        text = self.structure.config.get_text_config(decoder=True)
        head, stored = self.words.numel(), _beside(self.source, self.dtype)
        blocks = [self.structure.get_submodule(name) for name in self.source.blocks]
        end = head * (self.dtype.itemsize + stored + 1)  # 1: whether every value is finite
        block = max(_block_bytes(block, self.dtype.itemsize, stored) for block in blocks)
        widest = max((max(shape) for block in blocks for shape in _shapes(block)), default=0)
        passing = self.batch * length * 4 * (8 * int(text.hidden_size) + 4 * widest)
        logits = _LOGITS * ROWS * self.words.shape[0] * 4
        return self._base() + SLACK + max(end + block + passing, 2 * end + logits)

    def _base(self) -> int:
        return int(psutil.Process().memory_info().rss) if self.base is None else self.base

    def _final(self, windows: Windows) -> Iterable[Float[Tensor, "batch length d"]]:
        _give_back()
        least = self.least(windows.ids.shape[1])
        self._left = self.memory - least
        if self._left < 0:
            raise RecipeError(
                f"{mebibytes(self.memory)} of memory cannot hold a block of this model and its windows, the smallest "
                f"is {mebibytes(least)}", where=self.source.name,
                why=f"{mebibytes(self._base())} are there already; then the largest block, the embedding and the head",
                fix=f"--memory {mebibytes(least)}",
            )  # fmt: skip
        self._stream = stream = Stream(self.source, self.dtype)
        hidden, count = self._embedded(stream, windows.ids), len(self.source.blocks)
        stream.close()
        for i in range(count):
            _reopen(self.source)
            hidden.advance(stream, i, stream.load(i))
            _give_back()
            self.on_block(i + 1, count)
        _reopen(self.source)
        return (stream.finish(hidden.data[part]) for part in hidden.batches())

    def _head(self, sample: Int[Tensor, "length"]) -> Head:
        """Checked on made-up hidden states: that logits are a linear map of them does not depend on what they are."""
        assert self._stream is not None  # scoring computes hidden states first
        return Head.of_stream(self._stream)

    def _embedded(self, stream: Stream, ids: Int[Tensor, "windows length"]) -> Hidden:
        first = stream.embed(ids[: self.batch])
        data = self._place(*ids.shape, first.shape[-1])
        for start in range(0, len(ids), self.batch):
            part = slice(start, start + self.batch)
            data[part] = stream.embed(ids[part]) if start else first
        return Hidden(data, self.batch, None)

    def _place(self, *shape: int) -> Tensor:
        """In memory as long as there is room, then in a temporary file that goes with the last tensor over it."""
        size = math.prod(shape) * self.dtype.itemsize
        if size <= self._left:
            self._left -= size
            return torch.empty(shape, dtype=self.dtype)
        with tempfile.NamedTemporaryFile(prefix="lowbit-hidden-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a crash at some write
            except OSError as error:
                raise StorageError(
                    f"no room for {size / 2**30:.1f} GiB of hidden states: {error.strerror}",
                    where=tempfile.gettempdir(), fix="TMPDIR on a larger disk, or fewer windows",
                ) from error  # fmt: skip
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=self.dtype).view(shape)


class Passing:
    """The files of a model, opened again with ``reopen``: a mapping keeps the pages that were read through it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reopen()

    def reopen(self) -> None:
        """Let everything that was read so far leave memory, once the tensors made of it are gone."""
        self._files = Files(self.root)

    def names(self) -> Iterable[str]:
        return self._files.names()

    def get(self, name: str, index: int | None = None) -> Tensor:
        return self._files.get(name, index)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def nbytes(self) -> int:
        return self._files.nbytes()

    def digest(self) -> str:
        return self._files.digest()

    def beside(self, dtype: torch.dtype) -> int:
        """Bytes a weight that lie in memory beside it in ``dtype``: none where the files hold matrices in it."""
        found: set[str] = set()
        for path in self._files.files:
            with open_tensors(path) as file:
                slices = (file.get_slice(name) for name in file.keys())  # noqa: SIM118 - safe_open is no mapping
                found |= {part.get_dtype() for part in slices if len(part.get_shape()) > 1}
        return max((DTYPES[name].itemsize for name in found if name in DTYPES and DTYPES[name] != dtype), default=0)


def dense(root: Path) -> Source:
    """A model directory, to be read block by block. Raises ModelError, also for low-bit files of other ecosystems."""
    if "quantization_config" in read_json(root / "config.json"):
        raise ModelError(
            "holds low-bit weights in another layout", where=str(root), why="they are not read block by block",
            fix=f"lowbit import {root} -o OUT, or no --memory",
        )  # fmt: skip
    source = of_directory(root)
    source.store = Passing(root)
    return source


def low_bit(root: Path, dtype: torch.dtype) -> Source:
    """A native checkpoint, every byte checked, to be read block by block; each block is decoded when it runs."""
    native.verify(root)
    source = skeleton(root.name, plain_config(root), Passing(root), root)
    install(source.skeleton, native.settings(root), dtype)
    use_kernels(source.skeleton, "dense")
    return source


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps what it has freed, hundreds of megabytes after a few blocks."""
    if (trim := getattr(_LIBC, "malloc_trim", None)) is not None:
        trim(0)


def _reopen(source: Source) -> None:
    if isinstance(source.store, Passing):
        source.store.reopen()


def _beside(source: Source, dtype: torch.dtype) -> int:
    return source.store.beside(dtype) if isinstance(source.store, Passing) else 0


def _block_bytes(block: nn.Module, itemsize: int, stored: int) -> int:
    """A block with its weights, as they are multiplied and as they are stored; low-bit ones while they are decoded."""
    held = sum(p.numel() for p in block.parameters()) * (itemsize + stored)
    linears = [m for m in block.modules() if isinstance(m, QLinear)]
    sizes = [m.out_features * m.in_features for m in linears]
    packed = sum(part.numel() * part.element_size() for m in linears for part in m.buffers())
    return held + packed + sum(sizes) * itemsize + _DECODING * 4 * max(sizes, default=0)


def _shapes(block: nn.Module) -> Iterator[tuple[int, ...]]:
    for module in block.modules():
        if isinstance(module, QLinear):
            yield module.weight.shape
        elif is_linear(module):
            yield tuple(matrix(module).shape)
