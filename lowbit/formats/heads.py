"""Formats of the KV cache: how keys and values are rounded when they are written.

    TYPE-head[-sym][-hadamard]        one scale a token and head
    TYPE-g32[-sym][-hadamard]         groups of 32 (or any number) along a head
    TYPE-channelG[-sym][-hadamard]    one scale a channel and G tokens; the last, unfinished group stays raw (KIVI,
                                      arXiv 2402.02750)
    raw                               as the model makes them

TYPE is ``int2`` to ``int8``, ``fp8-e4m3`` or ``fp8-e5m2``. Keys are those after the rotary embedding. ``-hadamard``
rotates each head by a Walsh-Hadamard matrix before rounding and back after (QuaRot, arXiv 2404.00456), which spreads
outlier channels over all. Scales are float16, zeros have the bits of the codes; each row of zeros starts on a byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lowbit.arrays import Float, Tensor, UInt8
from lowbit.errors import FormatError, RecipeError, nearest
from lowbit.formats.blocks import Block
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import IntGrid, Table
from lowbit.formats.hadamard import hadamard
from lowbit.formats.pack import Codes, pack, unpack


class Packed(NamedTuple):
    """Rows of rounded numbers: packed codes, a float16 scale a block, packed zeros (asymmetric grids)."""

    codes: UInt8[Tensor, "batch heads rows bytes"]
    scale: Float[Tensor, "batch heads rows blocks"]
    zero: UInt8[Tensor, "batch heads rows zero_bytes"] | None


@dataclass(frozen=True)
class HeadFormat:
    """A format for the keys, or the values, of one head. ``tokens``: how many share a row (1, or a channel's group)."""

    name: str
    format: Format
    tokens: int
    rotated: bool

    def check(self, width: int) -> None:
        """Raises FormatError for heads of a width that cannot be rotated."""
        if self.rotated and width & (width - 1):
            raise FormatError(
                f"a head of {width} numbers has no Hadamard matrix", where=self.name, why="it is no power of two",
                fix=self.name.removesuffix("-hadamard"),
            )  # fmt: skip

    def encode(self, x: Float[Tensor, "batch heads t d"]) -> Packed:
        """Round and pack ``t`` tokens, a multiple of ``tokens``. Cost a few passes over them."""
        batch, heads, t, d = x.shape
        rows = hadamard(x.to(torch.float32), d) if self.rotated else x.to(torch.float32)
        if self.tokens > 1:  # a row is a channel
            rows = rows.reshape(batch, heads, t // self.tokens, self.tokens, d).transpose(-1, -2)
        rows = rows.reshape(-1, rows.shape[-1])
        block, params, shape = self.format.block, self.format.fit(rows), tuple(rows.shape)
        zero = None if params.zero is None else block.spread(params.zero, shape)
        codes = self.format.snap(rows, block.spread(params.step, shape), zero).codes

        def shaped(part: Tensor) -> Tensor:
            return part.view(batch, heads, -1, part.shape[-1])

        levels = self.format.grid.levels
        zeros = None if params.zero is None else shaped(pack(params.zero, levels))
        return Packed(shaped(pack(codes, levels)), shaped(params.step.to(torch.float16)), zeros)

    def decode(self, packed: Packed, d: int, dtype: torch.dtype) -> Float[Tensor, "batch heads t d"]:
        """The numbers that attention sees, computed in float32. Cost a few passes over them."""
        batch, heads, count = packed.codes.shape[:3]
        grid, block, columns = self.format.grid, self.format.block, d if self.tokens == 1 else self.tokens
        shape = (batch * heads * count, columns)
        scale = packed.scale.flatten(0, 2).to(torch.float32)  # (rows, blocks)
        q = unpack(packed.codes.flatten(0, 2), columns, grid.levels)
        if isinstance(grid, Table):
            rows = grid.lookup(q.to(torch.int32))
        elif packed.zero is None:
            rows = q.to(torch.float32).sub_(grid.levels // 2)
        else:
            zero = unpack(packed.zero.flatten(0, 2), scale.shape[1], grid.levels).to(torch.float32)
            rows = q.to(torch.float32).sub_(block.spread(zero, shape))
        rows = rows.mul_(block.spread(scale, shape))
        if self.tokens > 1:
            rows = rows.view(batch, heads, count // d, d, self.tokens).transpose(-1, -2)
        rows = rows.reshape(batch, heads, -1, d)
        return (hadamard(rows, d) if self.rotated else rows).to(dtype)

    def bits(self, d: int) -> float:
        """Bits a number of a head of ``d`` once it is packed, scales and zeros included."""
        columns, levels = d if self.tokens == 1 else self.tokens, self.format.grid.levels
        blocks = self.format.block.count((1, columns))[1]
        zero = Codes.nbytes(1, blocks, levels) if self.format.asymmetric else 0
        return 8 * (Codes.nbytes(1, columns, levels) + 2 * blocks + zero) / columns


RAW = "raw"
NAMES = [RAW, *(f"{t}-{b}" for t in ("int8", "int4", "int3", "int2", "fp8-e4m3") for b in ("head", "g32", "channel32"))]
"""The usual spellings."""
_SPELLING = re.compile(
    r"(?:int(?P<bits>[2-8])|fp8-(?P<table>e4m3|e5m2))-(?P<block>head|g[1-9]\d{0,5}|channel[1-9]\d{0,5})"
    r"(?P<symmetric>-sym)?(?P<rotated>-hadamard)?"
)


def head_format(name: str) -> HeadFormat | None:
    """The format of a spelling, None for ``raw``; raises RecipeError with the nearest known name."""
    if name == RAW:
        return None
    match = _SPELLING.fullmatch(name)
    if match is None or (match["table"] and match["symmetric"]):
        raise RecipeError(f"unknown KV format {name!r}", fix=nearest(name, NAMES))
    grid = Table(match["table"]) if match["table"] else IntGrid(int(match["bits"]), bool(match["symmetric"]))
    spelled, block, tokens = match["block"], Block("row"), 1
    if spelled.startswith("channel"):
        tokens = int(spelled.removeprefix("channel"))
    elif spelled != "head":
        block = Block("group", (int(spelled[1:]),))
    return HeadFormat(name, Format(name, grid, block, Stored(torch.float16)), tokens, bool(match["rotated"]))


@dataclass(frozen=True)
class CacheFormat:
    """How a model's cache is rounded. The first ``sink`` and the last ``window`` tokens stay raw.

    Raises RecipeError for unknown formats and negative counts.
    """

    key: str
    value: str
    sink: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        for name in (self.key, self.value):
            head_format(name)
        if min(self.sink, self.window) < 0:
            raise RecipeError(f"sink {self.sink} and window {self.window} are counts of tokens", where=self.key)

    def __str__(self) -> str:
        counts = "".join(f",{name}={n}" for name, n in (("sink", self.sink), ("window", self.window)) if n)
        return (self.key if self.key == self.value else f"{self.key}:{self.value}") + counts

    @classmethod
    def parse(cls, text: str) -> CacheFormat:
        """From ``FORMAT`` or ``KEY:VALUE``, and ``,sink=4,window=32``; the inverse of ``str``. Raises RecipeError."""
        formats, *pairs = text.split(",")
        key, colon, value = formats.partition(":")
        counts: dict[str, int] = {}
        for pair in pairs:
            name, _, number = pair.partition("=")
            if name not in ("sink", "window") or name in counts or not re.fullmatch(r"\d{1,9}", number):
                raise RecipeError(f"{pair!r} is no option of a KV format", where=text, fix="sink=4 or window=32")
            counts[name] = int(number)
        return cls(key, value if colon else key, **counts)
