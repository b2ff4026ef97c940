"""Plain safetensors and GGUF files as tables of tensors and the bytes around them; nothing in them is interpreted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from lowbit.codec.fields import Bytes
from lowbit.codec.header import BITS
from lowbit.errors import ModelError


class Placed(NamedTuple):
    """A tensor of a file: where its bytes are, and what they are."""

    dtype: str
    shape: tuple[int, ...]
    at: int
    nbytes: int


@dataclass(frozen=True)
class Tensors:
    """An open file whose tensors do not overlap; ``tensors`` in the order of the file."""

    path: Path
    kind: str
    nbytes: int
    tensors: Mapping[str, Placed]
    file: BinaryIO

    def read(self, name: str) -> Bytes:
        """The bytes of a tensor."""
        placed = self.tensors[name]
        return np.frombuffer(self._bytes(placed.at, placed.nbytes), np.uint8)

    def rest(self) -> bytes:
        """The bytes outside of all tensors, in order."""
        pieces, reached = [], 0
        for placed in sorted(self.tensors.values(), key=lambda t: (t.at, t.nbytes)):
            pieces.append(self._bytes(reached, placed.at - reached))
            reached = placed.at + placed.nbytes
        return b"".join([*pieces, self._bytes(reached, self.nbytes - reached)])

    def _bytes(self, at: int, size: int) -> bytes:
        self.file.seek(at)
        data = self.file.read(size)
        if len(data) != size:
            raise ModelError(f"ends at byte {at + len(data)}", where=str(self.path), why="it was cut short")
        return data


@contextmanager
def open_plain(path: Path) -> Iterator[Tensors]:
    """Open a safetensors or GGUF file; raises ModelError for anything else, and for a file that is not whole."""
    with path.open("rb") as file:
        magic = file.read(4)
        if magic == b"GGUF":
            kind, tensors = "gguf", _gguf(path)
        else:
            kind, tensors = "safetensors", _safetensors(path, file)
        found = Tensors(path, kind, path.stat().st_size, tensors, file)
        reached = 0
        for name, placed in sorted(tensors.items(), key=lambda item: (item[1].at, item[1].nbytes)):
            if placed.at < reached:
                raise ModelError(f"the tensor {name!r} overlaps another", where=str(path))
            reached = placed.at + placed.nbytes
        yield found


def _safetensors(path: Path, file: BinaryIO) -> dict[str, Placed]:
    try:
        with safe_open(path, framework="pt"):
            pass  # its own rules: offsets within the file, no holes, sizes that agree with shapes
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"is no safetensors or GGUF file: {error}", where=str(path), why="it is another format, or was cut short"
        ) from error
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    table = json.loads(file.read(length))
    table.pop("__metadata__", None)
    placed = {}
    for name, entry in table.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in BITS:
            raise ModelError(f"{name}: dtype {entry['dtype']} is not known", where=str(path))
        if name.startswith("lowbit."):
            raise ModelError(f"{name}: names that begin with 'lowbit.' are reserved", where=str(path))
        placed[name] = Placed(entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return placed


def _gguf(path: Path) -> dict[str, Placed]:
    from gguf import GGUFReader

    from lowbit.models.gguf import check

    check(path)
    return {
        t.name: Placed(_GGUF.get(t.tensor_type.name, t.tensor_type.name), _shape(t), int(t.data_offset), int(t.n_bytes))
        for t in GGUFReader(path).tensors
    }


def _shape(tensor: object) -> tuple[int, ...]:
    """Rows first, as everywhere but in the file."""
    return tuple(int(n) for n in reversed(tensor.shape))  # type: ignore[attr-defined]


_GGUF = {name: name for name in ("F16", "BF16", "F32", "F64", "I8", "I16", "I32", "I64")}
"""Types that are safetensors dtypes under the same name; blocks keep their GGUF name."""
