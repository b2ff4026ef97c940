"""A look through the header of an untrusted GGUF file before a reader that trusts it is let in.

The ``gguf`` reader maps the file and follows its counts: an array that claims 2^60 numbers keeps it busy for ever, and
dimensions whose product overflows give a tensor of another size, and every element of an array becomes an object of
Python. This walks the same header with every count, length and offset held against the size of the file, arrays
against the largest that a vocabulary needs, and allocates nothing that is larger.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from lowbit.errors import ModelError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # plain types by number
_STRING, _ARRAY = 8, 9
_MAX_HEADER = 1 << 30
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 1 << 40
_MAX_ALIGNMENT = 1 << 20
_MAX_ARRAY = 1 << 20  # entries; vocabularies and their merges are a quarter of it
_MAX_ARRAYS = 1 << 22  # entries of all arrays


class _Header:
    """The bytes of a file from its beginning; raises ValueError past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size, self.at, self._entries = file, size, 0, 0

    def number(self, form: str) -> int:
        return int(struct.unpack("<" + form, self.take(struct.calcsize(form)))[0])

    def take(self, count: int) -> bytes:
        self._room(count)
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._room(count)
        self._file.seek(count, 1)

    def _room(self, count: int) -> None:
        if count > min(self.size, _MAX_HEADER) - self.at:
            raise ValueError(f"{count} bytes at byte {self.at} reach beyond the end of the header or the file")
        self.at += count

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> None:
        """Skip a value, unless it is none that a file may hold."""
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            self._entries += count
            if count > _MAX_ARRAY or self._entries > _MAX_ARRAYS:
                raise ValueError(f"an array of {count} entries, {self._entries} in all arrays")
            if inner in _SIZES:
                self.skip(count * _SIZES[inner])
            elif inner == _STRING:
                for _ in range(count):
                    self.skip(self.number("Q"))
            else:
                raise ValueError(f"an array of values of type {inner}")
        else:
            raise ValueError(f"a value of type {kind}")


def check_header(path: Path) -> None:
    """Raises ModelError unless counts, strings, types, dimensions and offsets all fit the file.

    Cost one pass over the header, which holds the vocabulary.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _Header(file, size)
            if header.take(4) != b"GGUF":
                raise ValueError("its first bytes are not GGUF")
            if (version := header.number("I")) not in (2, 3):
                raise ValueError(f"version {version}")
            tensors, pairs = header.number("Q"), header.number("Q")
            if max(tensors, pairs) > size // 8:
                raise ValueError(f"{tensors} tensors and {pairs} values in {size} bytes")
            alignment, names = 32, set()
            for _ in range(pairs):
                key, kind = header.string(), header.number("I")
                if key == "general.alignment":
                    if kind != 4 or not 1 <= (alignment := header.number("I")) <= _MAX_ALIGNMENT:
                        raise ValueError(f"alignment {alignment} of type {kind}")
                else:
                    header.value(kind)
            ends = 0
            for _ in range(tensors):
                name, dimensions = header.string(), header.number("I")
                if not 1 <= dimensions <= _MAX_DIMENSIONS or name in names:
                    raise ValueError(f"tensor {name!r} of {dimensions} dimensions, or there twice")
                names.add(name)
                shape = [header.number("Q") for _ in range(dimensions)]
                kind, offset = header.number("I"), header.number("Q")
                block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
                if math.prod(shape) > _MAX_ELEMENTS or 0 in shape or shape[0] % block:
                    raise ValueError(f"tensor {name!r} of shape {tuple(reversed(shape))}")
                if offset % alignment:
                    raise ValueError(f"tensor {name!r} at byte {offset}, which is not aligned")
                ends = max(ends, offset + math.prod(shape) // block * nbytes)
            start = -(-header.at // alignment) * alignment
            if ends and start + ends > size:
                raise ValueError(f"tensors end at byte {start + ends}, the file at {size}")
    except FileNotFoundError:
        raise ModelError("does not exist", where=str(path)) from None
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(
            f"is no whole GGUF file: {error}", where=str(path),
            why="it was cut short or altered", fix="download or copy it again",
        )  from error  # fmt: skip
