"""Bit fields of ggml blocks, and every block type as data.

A field reads whole numbers from many blocks at once, and writes them into blocks of zeros by OR, so that fields which
share bytes are written one after another. Layouts: ``ggml-common.h`` of ggml (MIT), as reference for bytes only; what
they decode to is checked against the ``gguf`` package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

Blocks = UInt8[np.ndarray, "blocks bytes"]
Numbers = UInt8[np.ndarray, "blocks n"]


@runtime_checkable
class Field(Protocol):
    """Some whole numbers of a block."""

    def get(self, blocks: Blocks) -> Numbers: ...
    def put(self, blocks: Blocks, numbers: Numbers) -> None: ...


class Planes(NamedTuple):
    """Bytes cut into chunks; each chunk holds 8 / bits planes, one a bit position, of consecutive numbers."""

    start: int
    stop: int
    bits: int
    chunk: int

    def get(self, blocks: Blocks) -> Numbers:
        chunks = blocks[:, self.start : self.stop].reshape(len(blocks), -1, 1, self.chunk)
        planes = chunks >> self._shifts & np.uint8((1 << self.bits) - 1)
        numbers: Numbers = planes.reshape(len(blocks), -1)
        return numbers

    def put(self, blocks: Blocks, numbers: Numbers) -> None:
        planes = numbers.reshape(len(blocks), -1, 8 // self.bits, self.chunk) << self._shifts
        blocks[:, self.start : self.stop] |= np.bitwise_or.reduce(planes, axis=2).reshape(len(blocks), -1)

    @property
    def _shifts(self) -> UInt8[np.ndarray, "planes 1"]:
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]


class Split(NamedTuple):
    """Numbers whose low and high bits lie apart."""

    low: Planes
    high: Planes

    def get(self, blocks: Blocks) -> Numbers:
        numbers: Numbers = self.low.get(blocks) | self.high.get(blocks) << np.uint8(self.low.bits)
        return numbers

    def put(self, blocks: Blocks, numbers: Numbers) -> None:
        self.low.put(blocks, numbers & np.uint8((1 << self.low.bits) - 1))
        self.high.put(blocks, numbers >> np.uint8(self.low.bits))


class Signed(NamedTuple):
    """Signed bytes, read with 128 added."""

    start: int
    stop: int

    def get(self, blocks: Blocks) -> Numbers:
        return blocks[:, self.start : self.stop] ^ np.uint8(128)

    def put(self, blocks: Blocks, numbers: Numbers) -> None:
        blocks[:, self.start : self.stop] |= numbers ^ np.uint8(128)


class Sixes(NamedTuple):
    """Eight numbers of six bits, of the two sets that share twelve bytes (Q4_K, Q5_K).

    The first four are the low six bits of four bytes; the upper two bits of these are those of the last four, whose low
    four bits are nibbles of four more bytes.
    """

    first: int
    nibbles: int
    shift: int

    def get(self, blocks: Blocks) -> Numbers:
        own, shared = (blocks[:, at : at + 4] for at in (self.first, self.nibbles))
        last = shared >> np.uint8(self.shift) & np.uint8(15) | own >> np.uint8(6) << np.uint8(4)
        return np.concatenate([own & np.uint8(63), last], axis=1)

    def put(self, blocks: Blocks, numbers: Numbers) -> None:
        first, last = numbers[:, :4], numbers[:, 4:]
        blocks[:, self.first : self.first + 4] |= first | last >> np.uint8(4) << np.uint8(6)
        blocks[:, self.nibbles : self.nibbles + 4] |= (last & np.uint8(15)) << np.uint8(self.shift)


class Nibbles(NamedTuple):
    """The low (shift 0) or high (4) half of each byte."""

    start: int
    stop: int
    shift: int

    def get(self, blocks: Blocks) -> Numbers:
        return blocks[:, self.start : self.stop] >> np.uint8(self.shift) & np.uint8(15)

    def put(self, blocks: Blocks, numbers: Numbers) -> None:
        blocks[:, self.start : self.stop] |= numbers << np.uint8(self.shift)


_TRITS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))  # bytes from, to; digits in each


class Trits(NamedTuple):
    """256 numbers below three, five to a byte (the last sixteen: four), as the fraction n / 243 of 256, rounded up.

    Digit i of a byte is the first one of ``byte * 3^i mod 256`` (TQ1_0).
    """

    start: int

    def get(self, blocks: Blocks) -> Numbers:
        found = []
        for first, last, digits in _TRITS:
            data = blocks[:, None, self.start + first : self.start + last]
            shifted = data * (3 ** np.arange(digits)).astype(np.uint8)[:, None]  # modulo 256
            found.append((shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(blocks), -1))
        return np.concatenate(found, axis=1)

    def put(self, blocks: Blocks, numbers: Numbers) -> None:
        at = 0
        for first, last, digits in _TRITS:
            count = (last - first) * digits
            run = numbers[:, at : at + count].reshape(len(blocks), digits, last - first).astype(np.uint16)
            value = (run * (3 ** (4 - np.arange(digits)))[:, None]).sum(axis=1)
            blocks[:, self.start + first : self.start + last] |= ((value * 256 + 242) // 243).astype(np.uint8)
            at += count


class Scales(NamedTuple):
    """Scales, and offsets, that are whole numbers times the block's own: one for ``each`` weights."""

    each: int
    levels: int
    zero: int
    scales: Field
    offsets: Field | None = None


@dataclass(frozen=True)
class Kind:
    """A block type: ``values`` weights in ``nbytes`` bytes.

    A weight is ``d * (code - zero)``; with ``offset``, ``d * code + m``; with ``table``, ``d * table[code]``. ``scale``
    and ``offset`` are where the block has d and m as float16; with ``coded``, d is that times ``number - zero``, and m
    is minus that times its number.
    """

    name: str
    values: int
    nbytes: int
    levels: int
    codes: Field
    scale: int
    offset: int | None = None
    table: str = ""
    coded: Scales | None = None

    @property
    def zero(self) -> int:
        """The code of value 0, without an offset or a table."""
        return 1 if self.name in ("tq1_0", "tq2_0") else self.levels // 2

    @property
    def scales(self) -> Field | None:
        """Where whole numbers of the scales are, if they are coded."""
        return self.coded.scales if self.coded else None

    @property
    def offsets(self) -> Field | None:
        """Where those of the offsets are."""
        return self.coded.offsets if self.coded else None

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.coded.each if self.coded else self.values


def _low(start: int, stop: int, chunk: int) -> Planes:
    return Planes(start, stop, 4, chunk)


_Q2 = Scales(16, 16, 0, Nibbles(0, 16, 0), Nibbles(0, 16, 4))
_Q3 = Scales(16, 64, 32, Split(_low(96, 104, 8), Planes(104, 108, 2, 4)))
_Q4 = Scales(32, 64, 0, Sixes(4, 12, 0), Sixes(8, 12, 4))
_Q6 = Scales(16, 256, 128, Signed(192, 208))
_XS = Scales(32, 64, 32, Split(_low(4, 8, 1), Planes(2, 4, 2, 1)))

KINDS = {
    kind.name: kind
    for kind in (
        Kind("q4_0", 32, 18, 16, _low(2, 18, 16), 0),
        Kind("q4_1", 32, 20, 16, _low(4, 20, 16), 0, 2),
        Kind("q5_0", 32, 22, 32, Split(_low(6, 22, 16), Planes(2, 6, 1, 1)), 0),
        Kind("q5_1", 32, 24, 32, Split(_low(8, 24, 16), Planes(4, 8, 1, 1)), 0, 2),
        Kind("q8_0", 32, 34, 256, Signed(2, 34), 0),
        Kind("q2_k", 256, 84, 4, Planes(16, 80, 2, 32), 80, 82, coded=_Q2),
        Kind("q3_k", 256, 110, 8, Split(Planes(32, 96, 2, 32), Planes(0, 32, 1, 32)), 108, coded=_Q3),
        Kind("q4_k", 256, 144, 16, _low(16, 144, 32), 0, 2, coded=_Q4),
        Kind("q5_k", 256, 176, 32, Split(_low(48, 176, 32), Planes(16, 48, 1, 32)), 0, 2, coded=_Q4),
        Kind("q6_k", 256, 210, 64, Split(_low(0, 128, 64), Planes(128, 192, 2, 32)), 208, coded=_Q6),
        Kind("iq4_nl", 32, 18, 16, _low(2, 18, 16), 0, table="iq4nl"),
        Kind("iq4_xs", 256, 136, 16, _low(8, 136, 16), 0, table="iq4nl", coded=_XS),
        Kind("tq1_0", 256, 54, 3, Trits(0), 52),
        Kind("tq2_0", 256, 66, 4, Planes(0, 64, 2, 32), 64),
        Kind("mxfp4", 32, 17, 16, _low(1, 17, 16), 0, table="e2m1"),
    )
}  # fmt: skip
"""By the name of the type in lower case. The scale of ``mxfp4`` is one byte, the exponent of a power of two."""
