"""Coded safetensors (docs/reference/container.md): another file's tensors in fewer bytes, each bit for bit.

Outside it is a safetensors file that any reader opens: what did not shrink is a tensor as it was, what did is a tensor
of bytes (U8) under its own name, and the metadata entry ``lowbit.coded`` says how to turn them back. The file it was
made of, whatever its format, is restored whole: tensors at their places, and the bytes around them (``REST``).

Nothing of the header is believed before it was checked: :class:`Reader` refuses a file before it allocates for it.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lowbit.arrays import Tensor
from lowbit.codec.checksum import crc32c
from lowbit.codec.coding import Blob, decode_tensor, layout
from lowbit.codec.fields import Bytes
from lowbit.codec.header import CODED, PAD, REST, Entry, Header, parse, parse_plain
from lowbit.errors import CheckpointError, FormatError

_LARGEST_HEADER = 100_000_000  # as in safetensors itself
_AHEAD = 2  # tensors that are read before they are asked for, beyond those being decoded
_CHUNK = 4 << 20  # bytes that are read before they are checked: few calls, and not yet far from the processor


def is_coded(path: Path) -> bool:
    """Whether a file is a coded one, by its header alone; False for anything that is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return CODED in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def open_tensors(path: Path, framework: str = "pt", device: Any = "cpu", **options: Any) -> Any:
    """A safetensors file, coded or plain, behind the interface of ``safe_open``, whose ``options`` are for plain ones.

    Raises SafetensorError or OSError for what is neither, CheckpointError for a damaged coded file.
    """
    plain = safe_open(path, framework=framework, device=device, **options)
    return Reader(path, device) if CODED in (plain.metadata() or {}) else plain


class Reader:
    """A coded file, opened and checked but for its contents, which are checked as they are read.

    It answers like a file of ``safetensors.safe_open`` (``keys``, ``metadata``, ``get_tensor``, ``get_slice``), and
    tensors come out as those of the original file, on ``device``. Raises CheckpointError naming file and tensor. Reads
    do not share a position: threads may use one reader.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path, self.device = path, device
        self._file: FileIO | None = None
        try:
            with safe_open(path, framework="pt"):
                pass  # safetensors' own rules first: no overlaps, no holes, nothing beyond the end
            self._file = path.open("rb", buffering=0)
            size = os.fstat(self._file.fileno()).st_size
            length = int.from_bytes(self._pread(0, 8)[0], "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise FormatError(f"a header of {length} bytes in a file of {size}")
            self.begin = 8 + length
            self.header: Header = parse(bytes(self._pread(8, length)[0]), size - self.begin)
            self.rest = self._rest()
            self._plain_metadata = parse_plain(self.header, self.rest)
        except (SafetensorError, OSError, FormatError) as error:
            self.close()
            raise CheckpointError(
                f"cannot be read: {error}", where=str(path), why="it was cut short, altered or made up",
                fix="copy it again",
            ) from error  # fmt: skip

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What the header says of every tensor, in the order of the file."""
        return self.header.entries

    def keys(self) -> list[str]:
        return list(self.header.entries)

    def metadata(self) -> dict[str, str]:
        """The metadata of the original safetensors file."""
        return self._plain_metadata

    def get_slice(self, name: str) -> Slice:
        return Slice(self, self._entry(name))

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of the original file; blocks of a GGUF file are bytes, one row of them a row."""
        return as_tensor(self._entry(name), self.read(name)).to(self.device)

    def read(self, name: str) -> Bytes:
        """The bytes that the tensor has in the original file. Cost: its stored bytes are read once and checked."""
        return self._decoded(self._entry(name), self.stored(name), torch.get_num_threads())

    def stored(self, name: str, memory: Bytes | None = None) -> Bytes:
        """The bytes of a tensor as they are stored, checked; its fields lie in them. In ``memory`` if it is enough."""
        entry = self._entry(name)
        with self._naming(name):
            return self._checked(entry.begin, entry.end, entry.crc, memory)

    def read_all(self, names: list[str] | None = None, workers: int = 2) -> Iterator[tuple[str, Bytes]]:
        """Tensors in the given order (default: that of the file), ahead of who asks for them.

        One thread reads, in order and all the time, what ``workers`` others decode. ``workers`` and three tensors are
        held at most, and as many times the coded bytes of one, in memory that is used again.
        """
        threads, free = max(1, torch.get_num_threads() // workers), list[Bytes]()

        def read(entry: Entry) -> Bytes:
            return self.stored(entry.name, free.pop() if entry.layout is not None and free else None)

        def decode(entry: Entry, stored: Future[Bytes]) -> Bytes:
            memory = stored.result()
            data = self._decoded(entry, memory, threads)
            if entry.layout is not None:
                free.append(memory if memory.base is None else memory.base)
            return data

        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(workers) as decoding:
            queue: deque[tuple[str, Future[Bytes]]] = deque()
            try:
                for name in self.keys() if names is None else names:
                    entry = self._entry(name)
                    queue.append((name, decoding.submit(decode, entry, reading.submit(read, entry))))
                    if len(queue) > workers + _AHEAD:
                        first, future = queue.popleft()
                        yield first, future.result()
                while queue:
                    first, future = queue.popleft()
                    yield first, future.result()
            finally:
                for _, future in queue:
                    future.cancel()

    def plain(self, workers: int = 2) -> Iterator[Bytes]:
        """The bytes of the original file in order, piece by piece."""
        rest = np.frombuffer(self.rest, np.uint8)
        placed = sorted((entry for entry in self.entries.values() if entry.nbytes), key=lambda entry: entry.at)
        at = used = 0
        for entry, (_, data) in zip(placed, self.read_all([e.name for e in placed], workers), strict=True):
            yield rest[used : used + entry.at - at]
            used += entry.at - at
            at = entry.at + entry.nbytes
            yield data
        yield rest[used:]

    def check_padding(self) -> None:
        """Raise CheckpointError unless what holds nothing is zero, so that no byte of a file goes unnoticed."""
        for name, (begin, end) in self.header.pads.items():
            if self._pread(self.begin + begin, end - begin)[0].any():
                raise CheckpointError("padding is not zero", where=f"{self.path}: {name}", why="it was altered")

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """What goes wrong in the body as one error that names the tensor."""
        try:
            yield
        except FormatError as error:
            raise CheckpointError(
                error.what, where=f"{self.path}: {name}", why="it was altered, or cut short", fix="copy it again"
            ) from error
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error}", where=f"{self.path}: {name}") from error

    def _entry(self, name: str) -> Entry:
        if name not in self.header.entries:
            raise CheckpointError(f"the tensor {name!r} is missing", where=str(self.path))
        return self.header.entries[name]

    def _rest(self) -> bytes:
        begin, end, nbytes, crc = self.header.rest
        try:
            unpacked = zlib.decompressobj()
            rest = unpacked.decompress(self._checked(begin, end, crc).tobytes(), nbytes + 1)
        except zlib.error as error:
            raise FormatError(f"{REST}: {error}") from error
        if len(rest) != nbytes or not unpacked.eof:
            raise FormatError(f"{REST} does not hold the {nbytes} bytes that it should")
        return rest

    def _decoded(self, entry: Entry, stored: Bytes, threads: int) -> Bytes:
        with self._naming(entry.name):
            return decoded(entry, stored, threads)

    def _checked(self, begin: int, end: int, crc: int, memory: Bytes | None = None) -> Bytes:
        data, found = self._pread(self.begin + begin, end - begin, memory)
        require(found, crc)
        return data

    def _pread(self, begin: int, size: int, memory: Bytes | None = None) -> tuple[Bytes, int]:
        """Bytes of the file and their checksum, taken of each piece while it is in cache."""
        assert self._file is not None  # while it is open
        data = np.empty(size, np.uint8) if memory is None or memory.size < size else memory[:size]
        done = crc = 0
        while done < size:
            piece = data[done : done + _CHUNK]
            got = os.preadv(self._file.fileno(), [piece.data], begin + done)
            if not got:
                raise FormatError(f"the file ends at byte {begin + done}")
            crc = crc32c(piece[:got], crc)
            done += got
        return data, crc


@dataclass(frozen=True)
class Slice:
    """A tensor that is not read yet, as ``safe_open`` gives it."""

    reader: Reader
    entry: Entry

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def get_dtype(self) -> str:
        return self.entry.dtype

    def __getitem__(self, index: Any) -> Tensor:
        whole = as_tensor(self.entry, self.reader.read(self.entry.name))
        return whole[index].to(self.reader.device)


def checked(stored: Bytes, crc: int) -> Bytes:
    """The bytes themselves; raises FormatError unless they have their checksum."""
    require(crc32c(stored), crc)
    return stored


def require(found: int, crc: int) -> None:
    """Raise FormatError unless what bytes have is the checksum that they should."""
    if found != crc:
        raise FormatError("its bytes do not have their checksum")


def decoded(entry: Entry, stored: Bytes, threads: int | None = None) -> Bytes:
    """The bytes of a tensor in the original, from those that are stored; the same array where nothing was coded.

    By up to ``threads`` threads (None: torch's number). Raises FormatError for what cannot be decoded.
    """
    if entry.layout is None:
        return stored
    fields = [Blob(f.codec, stored[f.begin : f.begin + f.length], f.codes) for f in entry.fields]
    return decode_tensor(layout(entry.layout), fields, threads)


def as_tensor(entry: Entry, data: Bytes) -> Tensor:
    """Bytes of a tensor as what its dtype and shape say; those of a dtype that torch lacks as rows of bytes."""
    flat = torch.from_numpy(data)
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        return flat.view(*entry.shape[:-1], -1) if len(entry.shape) > 1 and entry.nbytes else flat
    return flat.view(dtype).view(entry.shape) if entry.nbytes else torch.empty(entry.shape, dtype=dtype)


DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

__all__ = ["DTYPES", "PAD", "REST", "Reader", "Slice", "as_tensor", "checked", "decoded", "is_coded"]
