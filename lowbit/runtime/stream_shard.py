"""Where in a shard the packed parts of a block are, and the parts themselves once the bytes are in a buffer.

Parts of a plain shard are views of the buffer. Those of a coded one (docs/reference/container.md) are decoded into
memory of their own, whenever the block is used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowbit.arrays import Tensor, UInt8
from lowbit.codec import container
from lowbit.codec.header import Entry
from lowbit.errors import CheckpointError, FormatError
from lowbit.formats.spec import Leaf, Spec
from lowbit.runtime.reader import PAGE

_LONGEST = 64 << 20  # of a header


@dataclass(frozen=True)
class Place:
    """One part: where its bytes begin in the extent, what they are, and how they are coded if they are."""

    start: int
    leaf: Leaf
    entry: Entry | None = None

    def part(self, bytes: UInt8[Tensor, "n"]) -> Tensor:
        """The part in the bytes of its extent, not copied; of a coded shard, decoded. Raises FormatError."""
        dtype: torch.dtype = getattr(torch, self.leaf.dtype)
        if self.entry is None:
            return bytes[self.start : self.start + self.leaf.nbytes].view(dtype).view(self.leaf.shape)
        stored = bytes[self.start : self.start + self.entry.end - self.entry.begin].numpy()
        own = torch.from_numpy(container.decoded(self.entry, container.checked(stored, self.entry.crc)))
        return (own.clone() if self.entry.layout is None else own).view(dtype).view(self.leaf.shape)


@dataclass(frozen=True)
class Extent:
    """The contiguous bytes of a shard that hold all packed parts of a block, from a whole page on."""

    path: Path
    offset: int
    length: int
    places: dict[str, dict[str, Place]]
    """By site and by path in its tree."""

    @property
    def nbytes(self) -> int:
        """What a buffer for it takes: whole pages."""
        return -(-self.length // PAGE) * PAGE

    @property
    def coded(self) -> bool:
        return any(place.entry is not None for at in self.places.values() for place in at.values())

    @property
    def decoded(self) -> int:
        """Bytes that its parts take in memory of their own; 0 where they are views of the buffer."""
        return sum(p.leaf.nbytes for at in self.places.values() for p in at.values()) if self.coded else 0

    def parts(self, bytes: UInt8[Tensor, "n"]) -> dict[str, dict[str, Tensor]]:
        """All parts, by site and path, of a buffer that the extent was read into. Raises CheckpointError."""
        try:
            return {site: {path: place.part(bytes) for path, place in at.items()} for site, at in self.places.items()}
        except FormatError as error:
            raise CheckpointError(
                f"cannot be decoded: {error.what}", where=str(self.path), why="it was altered while it was in use",
                fix="copy the checkpoint again",
            ) from error  # fmt: skip


class _Found(NamedTuple):
    """A tensor's bytes in the file, how many it has, and how they are coded if they are."""

    first: int
    last: int
    nbytes: int
    entry: Entry | None


def extent(path: Path, specs: Mapping[str, Spec]) -> Extent | None:
    """Where the parts of these sites are in a verified shard, coded or not; None for a shard without any.

    Raises CheckpointError for a header that says otherwise than the specs.
    """
    wanted = {
        (site, part): (f"{site}.weight.{part}", leaf)
        for site, spec in specs.items() for part, leaf in spec.paths().items()
    }  # fmt: skip
    if not wanted:
        return None
    at = _coded(path) if container.is_coded(path) else _plain(path)
    found: dict[tuple[str, str], _Found] = {}
    for key, (name, leaf) in wanted.items():
        if name not in at:
            raise CheckpointError(f"the part {name!r} has no place", where=str(path))
        found[key] = at[name]
        if at[name].nbytes != leaf.nbytes or at[name].first < 0:
            raise CheckpointError(f"the part {name!r} has {at[name].nbytes} bytes, not {leaf.nbytes}", where=str(path))
    offset = min(f.first for f in found.values()) // PAGE * PAGE
    end = max(f.last for f in found.values())
    places: dict[str, dict[str, Place]] = {}
    for (site, part), f in found.items():
        places.setdefault(site, {})[part] = Place(f.first - offset, wanted[site, part][1], f.entry)
    return Extent(path, offset, end - offset, places)


def _plain(path: Path) -> dict[str, _Found]:
    """Where every tensor of a safetensors file is."""
    with path.open("rb") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        if size > _LONGEST:
            raise CheckpointError(f"a header of {size} bytes", where=str(path))
        table: dict[str, Any] = json.loads(f.read(size))
    try:
        places = {name: [int(n) for n in entry["data_offsets"]] for name, entry in table.items() if name[:2] != "__"}
        return {
            name: _Found(8 + size + first, 8 + size + last, last - first, None)
            for name, (first, last) in places.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"a tensor has no place: {error!r}", where=str(path)) from error


def _coded(path: Path) -> dict[str, _Found]:
    """The same of a coded one, whose header was checked."""
    with container.Reader(path) as reader:
        return {
            name: _Found(reader.begin + entry.begin, reader.begin + entry.end, entry.nbytes, entry)
            for name, entry in reader.entries.items()
        }
