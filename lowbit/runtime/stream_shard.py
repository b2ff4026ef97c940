"""Where in a shard the packed parts of a block are, and views of them once the bytes are in a buffer."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.arrays import Tensor, UInt8
from lowbit.codec.header import CODED
from lowbit.errors import CheckpointError
from lowbit.formats.spec import Leaf, Spec
from lowbit.runtime.reader import PAGE

_LONGEST = 64 << 20  # of a header


@dataclass(frozen=True)
class Place:
    """One part: where its bytes begin in the extent, and what they are."""

    start: int
    leaf: Leaf

    def view(self, bytes: UInt8[Tensor, "n"]) -> Tensor:
        """The part in the bytes of its extent, not copied."""
        dtype: torch.dtype = getattr(torch, self.leaf.dtype)
        return bytes[self.start : self.start + self.leaf.nbytes].view(dtype).view(self.leaf.shape)


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

    def parts(self, bytes: UInt8[Tensor, "n"]) -> dict[str, dict[str, Tensor]]:
        """Views of all parts, by site and path, in a buffer that the extent was read into."""
        return {site: {path: place.view(bytes) for path, place in at.items()} for site, at in self.places.items()}


def extent(path: Path, specs: Mapping[str, Spec]) -> Extent | None:
    """Where the parts of these sites are in a verified shard; None for a shard without any.

    Raises CheckpointError for a header that says otherwise than the specs, and for coded parts.
    """
    entries, data = _header(path)
    wanted = {
        (site, part): (f"{site}.weight.{part}", leaf)
        for site, spec in specs.items() for part, leaf in spec.paths().items()
    }  # fmt: skip
    if not wanted:
        return None
    found: dict[tuple[str, str], tuple[int, int, Leaf]] = {}
    for key, (name, leaf) in wanted.items():
        try:
            first, last = (int(n) for n in entries[name]["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the part {name!r} has no place", where=str(path)) from error
        if last - first != leaf.nbytes or first < 0:
            raise CheckpointError(f"the part {name!r} has {last - first} bytes, not {leaf.nbytes}", where=str(path))
        found[key] = first + data, last + data, leaf
    offset = min(first for first, _, _ in found.values()) // PAGE * PAGE
    end = max(last for _, last, _ in found.values())
    places: dict[str, dict[str, Place]] = {}
    for (site, part), (first, _, leaf) in found.items():
        places.setdefault(site, {})[part] = Place(first - offset, leaf)
    return Extent(path, offset, end - offset, places)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The table of a safetensors file, and where its data begin."""
    with path.open("rb") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        if size > _LONGEST:
            raise CheckpointError(f"a header of {size} bytes", where=str(path))
        table = json.loads(f.read(size))
    if CODED in table.get("__metadata__", {}):
        raise CheckpointError(
            "holds coded parts, which cannot be read in place", where=str(path), fix="lowbit decompress first"
        )
    return table, 8 + size
