"""Writing coded safetensors: tensors are coded one by one into a spool; the header that they make goes before it."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from lowbit.codec.checksum import crc32c
from lowbit.codec.coding import Blob, encode_tensor, layout
from lowbit.codec.fields import Bytes, Layout
from lowbit.codec.header import ALIGN, BITS, CODED, CODED_CRC, GRAIN, PAD, REST, VERSION, Entry, Field, aligned, signed

_EXTENT = 1 << 20  # an extent of this many bytes is closed: padding then costs at most 0.4 %


class Writer:
    """A coded file in the making; bounded by the largest tensor in memory, twice the result on disk.

    with Writer(path, "safetensors") as writer:
        writer.rest(bytes_around_tensors)
        writer.add("model.norm.weight", "BF16", (576,), at, data)
        writer.finish(nbytes, sha256)

    The spool beside ``path`` is removed whatever happens. Not atomic: give it a temporary name. Raises OSError.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind
        self.entries: list[Entry] = []
        self._spool_path = path.with_name(path.name + ".spool")
        self._spool: BinaryIO = self._spool_path.open("w+b")
        self._table: dict[str, Any] = {}
        self._extents = [0]
        self._rest = [0, 0]

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._spool.close()
        self._spool_path.unlink(missing_ok=True)

    def rest(self, data: bytes) -> None:
        """The bytes of the original outside of its tensors; first of all, since a reader needs them first."""
        packed = np.frombuffer(zlib.compress(data, 9), np.uint8)
        crc = self._put(REST, "U8", None, packed)
        self._rest = [len(data), crc]

    def add(
        self, name: str, dtype: str, shape: tuple[int, ...], at: int, data: Bytes, new_extent: bool = False
    ) -> Entry:
        """Code a tensor that lies at byte ``at`` of the original; with ``new_extent`` it can be read without others.

        Tensors are stored in the order of these calls: that of use. Cost O(bytes).
        """
        if new_extent or self._spool.tell() - self._extents[-1] >= _EXTENT:
            self._close_extent()
        coded = encode_tensor(data, dtype)
        if coded is None and data.size % GRAIN:  # what comes next must begin at a multiple, so this needs padding
            coded = _as_bytes(data)
        if coded is None:
            begin = self._spool.tell()
            own = (dtype, shape) if dtype in BITS else ("U8", (data.size,))
            crc = self._put(name, *own, data)
            entry = Entry(name, dtype, shape, data.size, at, crc, begin, begin + data.size)
        else:
            entry = self._add_coded(name, dtype, shape, at, data.size, *coded)
        self.entries.append(entry)
        return entry

    def finish(self, nbytes: int, sha256: str) -> None:
        """Write the file: ``nbytes`` and ``sha256`` are those of the original."""
        coded = json.dumps(
            {
                "version": VERSION, "kind": self.kind, "bytes": nbytes, "sha256": sha256, "rest": self._rest,
                "extents": self._extents, "tensors": {entry.name: entry.to_json() for entry in self.entries},
            }, separators=(",", ":"), ensure_ascii=False,
        )  # fmt: skip
        metadata = {"format": "pt", CODED: coded, CODED_CRC: "00000000"}
        text = json.dumps({"__metadata__": metadata, **self._table}, separators=(",", ":"), ensure_ascii=False).encode()
        text = signed(text.ljust(aligned(8 + len(text), ALIGN) - 8))
        self._spool.seek(0)
        with self.path.open("wb") as out:
            out.write(len(text).to_bytes(8, "little"))
            out.write(text)
            shutil.copyfileobj(self._spool, out, 1 << 22)
            out.flush()
            os.fsync(out.fileno())

    def _add_coded(
        self, name: str, dtype: str, shape: tuple[int, ...], at: int, nbytes: int, how: Layout, blobs: list[Blob]
    ) -> Entry:
        fields, pieces, reached = [], [], 0
        for blob in blobs:
            begin = aligned(reached)
            pieces += [np.zeros(begin - reached, np.uint8), blob.data]
            fields.append(Field(blob.codec, begin, blob.data.size, blob.codes))
            reached = begin + blob.data.size
        stored = np.concatenate([*pieces, np.zeros(aligned(reached) - reached, np.uint8)])
        begin = self._spool.tell()
        crc = self._put(name, "U8", None, stored)
        return Entry(name, dtype, shape, nbytes, at, crc, begin, begin + stored.size, how.name, tuple(fields))

    def _close_extent(self) -> None:
        reached = self._spool.tell()
        if reached == self._extents[-1]:
            return
        if padding := aligned(reached, ALIGN) - reached:
            self._put(f"{PAD}{len(self._extents)}", "U8", None, np.zeros(padding, np.uint8))
        self._extents.append(self._spool.tell())

    def _put(self, name: str, dtype: str, shape: tuple[int, ...] | None, data: Bytes) -> int:
        """Append bytes as a tensor of the outer file; returns their checksum."""
        begin = self._spool.tell()
        self._spool.write(data.data)
        shape = (data.size,) if shape is None else shape
        self._table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + data.size]}
        if name == REST and (padding := aligned(data.size) - data.size):
            self._put(f"{PAD}0", "U8", None, np.zeros(padding, np.uint8))
        return crc32c(data)


def _as_bytes(data: Bytes) -> tuple[Layout, list[Blob]]:
    return layout("bytes"), [Blob("raw", data, data.size)]
