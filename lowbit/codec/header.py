"""The header of a coded file: what it says of every tensor, and everything that is checked before it is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lowbit.codec.checksum import crc32c
from lowbit.codec.coding import CODECS, REPEAT, layout
from lowbit.errors import FormatError

VERSION = 1
CODED, CODED_CRC = "lowbit.coded", "lowbit.coded.crc32c"
"""Entries of the metadata: the JSON of this module; the CRC-32C of the whole header, in eight hex digits."""
_CRC = b'"lowbit.coded.crc32c":"%s"'
UNSIGNED = _CRC % b"00000000"
"""The checksum as it is spelled while the header's checksum is made."""
REST, PAD = "lowbit.rest", "lowbit.pad."
"""Reserved names of tensors: the original's bytes outside of tensors, deflated; and padding, which is zero."""
KINDS = ("safetensors", "gguf")
ALIGN, GRAIN = 4096, 8
"""Extents begin at multiples of the first in the file, tensors and their fields at multiples of the second."""
_MOST_DIMENSIONS = 16
MOST = 1 << 40
"""No size, shape or offset is larger."""
_MOST_REST = 1 << 28
_MALFORMED = (LookupError, TypeError, AttributeError, ValueError, RecursionError)

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of a value, by safetensors dtype."""


class Field(NamedTuple):
    """Where a field of a tensor lies, from the tensor's own beginning, and how many codes it has."""

    codec: str
    begin: int
    length: int
    codes: int


@dataclass(frozen=True)
class Entry:
    """A tensor: what it is in the original (``at``: the byte where it begins), and where it is stored in the data.

    ``layout`` None: the stored bytes are the tensor's own.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    at: int
    crc: int
    begin: int
    end: int
    layout: str | None = None
    fields: tuple[Field, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Its part of ``lowbit.coded``; where it is stored is said by safetensors' own header."""
        held: dict[str, Any] = {
            "dtype": self.dtype, "shape": list(self.shape), "bytes": self.nbytes, "at": self.at, "crc": self.crc
        }  # fmt: skip
        if self.layout is not None:
            held |= {"layout": self.layout, "fields": [list(field) for field in self.fields]}
        return held


class Rest(NamedTuple):
    """The original's bytes outside of tensors: where they are stored, how many they are, the checksum as stored."""

    begin: int
    end: int
    nbytes: int
    crc: int


@dataclass(frozen=True)
class Header:
    """A header whose parts agree with each other and with the size of the file."""

    kind: str
    nbytes: int
    sha256: str
    rest: Rest
    extents: tuple[int, ...]
    entries: Mapping[str, Entry]
    pads: Mapping[str, tuple[int, int]]


def parse(text: bytes, size: int) -> Header:
    """Read an untrusted safetensors header with ``lowbit.coded`` in it; ``size`` is that of the data behind it.

    Raises FormatError, naming the tensor, on anything that is not exactly such a header.
    """
    try:
        table = json.loads(text, object_pairs_hook=_unique)
        metadata = table.pop("__metadata__")
        if signed(_unsigned(text, metadata[CODED_CRC])) != text:
            raise FormatError("the header does not have its checksum")
        held = json.loads(metadata[CODED], object_pairs_hook=_unique)
        if held["version"] != VERSION:
            raise FormatError(f"{CODED}.version is {held['version']!r}, this lowbit reads {VERSION}")
        if held["kind"] not in KINDS:
            raise FormatError(f"unknown kind of file {held['kind']!r}")
        places = {name: _place(name, entry, size) for name, entry in table.items()}
        rest = Rest(*places.pop(REST), _size(held["rest"][0], _MOST_REST), _size(held["rest"][1]))
        pads = {name: place for name, place in places.items() if name.startswith(PAD)}
        if places.keys() - pads.keys() != held["tensors"].keys():
            odd = min(held["tensors"].keys() ^ (places.keys() - pads.keys()))
            raise FormatError(f"the tensor {odd!r} is in one of the two tables only")
        entries = {}
        for name in sorted(held["tensors"], key=lambda name: places[name]):
            entries[name] = _entry(name, held["tensors"][name], table[name], places[name])
        found = Header(
            held["kind"], _size(held["bytes"]), str(held["sha256"]), rest,
            tuple(_size(extent) for extent in held["extents"]), entries, pads,
        )  # fmt: skip
    except _MALFORMED as error:
        raise FormatError(f"the header is malformed: {error!r}") from error
    _check_extents(found, 8 + len(text))
    _check_places(found)
    return found


def signed(text: bytes) -> bytes:
    """A header with its own checksum in it, in the place of ``UNSIGNED``."""
    return text.replace(UNSIGNED, _CRC % b"%08x" % crc32c(text), 1)


def _unsigned(text: bytes, crc: Any) -> bytes:
    """The bytes that a checksum was made of: it is eight zeros there itself. As they were where it is not found."""
    return text.replace(_CRC % str(crc).encode(), UNSIGNED, 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _size(value: Any, most: int = MOST) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no size")
    return value


def _place(name: str, entry: Any, size: int) -> tuple[int, int]:
    begin, end = (_size(offset) for offset in entry["data_offsets"])
    if not begin <= end <= size:
        raise FormatError(f"{name}: bytes {begin} to {end} of {size}")
    if name.startswith("lowbit.") and (entry["dtype"], entry["shape"]) != ("U8", [end - begin]):
        raise FormatError(f"{name}: is not plain bytes")
    return begin, end


def _entry(name: str, held: Any, stored: Any, place: tuple[int, int]) -> Entry:
    """One tensor, checked for itself."""
    begin, end = place
    if len(held["shape"]) > _MOST_DIMENSIONS:
        raise FormatError(f"{name}: a tensor of {len(held['shape'])} dimensions")
    dtype, shape = held["dtype"], tuple(_size(n) for n in held["shape"])
    nbytes, at, crc = (_size(held[key]) for key in ("bytes", "at", "crc"))
    if type(dtype) is not str or math.prod(shape) > MOST:
        raise FormatError(f"{name}: {dtype!r} of shape {shape} is larger than any tensor")
    if dtype in BITS and 8 * nbytes != math.prod(shape) * BITS[dtype]:
        raise FormatError(f"{name}: {nbytes} bytes are not {dtype} of shape {shape}")
    if "layout" not in held:
        own = (dtype, list(shape)) if dtype in BITS else ("U8", [nbytes])
        if (stored["dtype"], stored["shape"]) != own or end - begin != nbytes:
            raise FormatError(f"{name}: is stored as {stored['dtype']} {stored['shape']}, said to be {own}")
        return Entry(name, dtype, shape, nbytes, at, crc, begin, end)
    if (stored["dtype"], stored["shape"]) != ("U8", [end - begin]):
        raise FormatError(f"{name}: is stored as {stored['dtype']} {stored['shape']}, not as bytes")
    how = layout(held["layout"])
    counts = how.counts(nbytes)
    fields = tuple(Field(codec, *map(_size, numbers)) for codec, *numbers in held["fields"])
    if counts is None or tuple(field.codes for field in fields) != counts:
        raise FormatError(f"{name}: fields of {[f.codes for f in fields]} codes are not {nbytes} bytes of {how.name}")
    reached = 0
    for field in fields:
        if field.codec not in CODECS:
            raise FormatError(f"{name}: unknown codec {field.codec!r}")
        if field.begin != aligned(reached):
            raise FormatError(f"{name}: a field at {field.begin}, expected at {aligned(reached)}")
        if field.codes > REPEAT * max(16, field.length):
            raise FormatError(f"{name}: {field.codes} codes in {field.length} bytes")
        reached = field.begin + field.length
    if aligned(reached) != end - begin:
        raise FormatError(f"{name}: fields end at {reached}, the tensor at {end - begin}")
    return Entry(name, dtype, shape, nbytes, at, crc, begin, end, how.name, fields)


def aligned(n: int, grain: int = GRAIN) -> int:
    """The multiple of ``grain`` at or after ``n``."""
    return -(-n // grain) * grain


def _check_extents(header: Header, begin: int) -> None:
    """Extents begin at pages of the file, and no tensor lies across two."""
    if begin % ALIGN or any(extent % ALIGN for extent in header.extents):
        raise FormatError(f"extents do not begin at multiples of {ALIGN}")
    if list(header.extents) != sorted(set(header.extents)):
        raise FormatError("extents are not in order")
    bounds = [0, *header.extents, MOST + 1]
    i = 0
    for entry in header.entries.values():
        while entry.begin >= bounds[i + 1]:
            i += 1
        if entry.end > bounds[i + 1]:
            raise FormatError(f"{entry.name}: lies in two extents")


def _check_places(header: Header) -> None:
    """Tensors do not overlap in the original, and the rest is just what is between them."""
    reached = between = 0
    for entry in sorted(header.entries.values(), key=lambda entry: (entry.at, entry.nbytes)):
        if entry.at < reached:
            raise FormatError(f"{entry.name}: overlaps another tensor in the original file")
        between += entry.at - reached
        reached = entry.at + entry.nbytes
    if reached > header.nbytes or between + header.nbytes - reached != header.rest.nbytes:
        raise FormatError(f"the parts are not the {header.nbytes} bytes of the original file")


def parse_plain(header: Header, rest: bytes) -> dict[str, str]:
    """Metadata of the original safetensors file; raises FormatError when its own header says other tensors.

    So a file reads the same coded and decoded. A GGUF file has no such entry: an empty table.
    """
    if header.kind != "safetensors":
        return {}
    try:
        length = int.from_bytes(rest[:8], "little")
        table = json.loads(rest[8 : 8 + length], object_pairs_hook=_unique)
        metadata = table.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()) or table.keys() != header.entries.keys():
            raise ValueError("not the same tensors")
        for name, said in table.items():
            entry = header.entries[name]
            own = [entry.at - 8 - length, entry.at - 8 - length + entry.nbytes]
            same = (said["dtype"], said["shape"], said["data_offsets"]) == (entry.dtype, list(entry.shape), own)
            if not same or own[0] < 0:
                raise ValueError(f"{name} is another tensor there")
    except _MALFORMED as error:
        raise FormatError(f"the original header is malformed: {error}") from error
    return dict(metadata)
