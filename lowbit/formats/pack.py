"""Dense packing of small integers into bytes, row by row.

A row of ``n`` codes of ``b`` bits is a little-endian bit stream: code ``j`` occupies bits ``j*b .. j*b+b-1``,
bit 0 being the least significant bit of byte 0. Rows start on a byte, so any slice of rows can be unpacked
alone. Three levels are packed in base 3, five to a byte (1.6 bits), least significant digit first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Int, Tensor, UInt8
from lowbit.formats.blocks import ALL

TRITS_PER_BYTE = 5
Whole = Int[Tensor, "rows columns"] | UInt8[Tensor, "rows columns"] | Float[Tensor, "rows columns"]
"""A matrix of small whole numbers, in any dtype."""


def bits_for(levels: int) -> int:
    """Bits of one packed code with ``levels`` distinct values (2..256); 0 stands for base 3."""
    return 0 if levels == 3 else max(1, math.ceil(math.log2(levels)))


def reachable(levels: int) -> int:
    """Distinct values that packed codes of ``levels`` can unpack to, whatever the bytes."""
    return levels if levels == 3 else 1 << bits_for(levels)


def row_bytes(columns: int, levels: int) -> int:
    """Bytes that one row of ``columns`` codes occupies, padding to a whole byte included."""
    bits = bits_for(levels)
    return math.ceil(columns / TRITS_PER_BYTE) if bits == 0 else math.ceil(columns * bits / 8)


def pack(codes: Whole, levels: int) -> UInt8[Tensor, "rows bytes"]:
    """Codes in ``0..levels-1`` as bytes; cost O(rows * columns)."""
    bits, columns = bits_for(levels), codes.shape[1]
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    if bits == 0:
        digits = _runs(codes.to(torch.uint8), TRITS_PER_BYTE)  # (rows, bytes, 5)
        return (digits * _powers_of_three(codes.device)).sum(-1, dtype=torch.int32).to(torch.uint8)
    if bits in (1, 2, 4):
        per = 8 // bits
        fields = _runs(codes.to(torch.uint8), per)  # (rows, bytes, per)
        packed = fields[..., 0].clone()
        for i in range(1, per):
            packed |= fields[..., i] << (i * bits)
        return packed
    # Eight codes of b bits fill exactly b bytes: gather them in one 64-bit word.
    fields64 = _runs(codes.to(torch.int64), 8)  # (rows, words, 8)
    word = fields64[..., 0].clone()
    for i in range(1, 8):
        word |= fields64[..., i] << (i * bits)
    packed = torch.stack([(word >> (8 * k)) & 0xFF for k in range(bits)], dim=-1)  # (rows, words, b)
    return packed.to(torch.uint8).flatten(1)[:, : row_bytes(columns, levels)].contiguous()


def unpack(packed: UInt8[Tensor, "rows bytes"], columns: int, levels: int) -> UInt8[Tensor, "rows columns"]:
    """The inverse of :func:`pack`; cost O(rows * columns), at most eight bytes a code of scratch."""
    bits, rows = bits_for(levels), packed.shape[0]
    if bits == 8:
        return packed
    if bits == 0:
        digits = packed.unsqueeze(-1) // _powers_of_three(packed.device) % 3  # (rows, bytes, 5)
        return digits.flatten(1)[:, :columns]
    if bits in (1, 2, 4):
        per, mask = 8 // bits, (1 << bits) - 1
        out = packed.new_empty(rows, packed.shape[1], per)
        for i in range(per):
            torch.bitwise_and(packed >> (i * bits), mask, out=out[..., i])
        return out.flatten(1)[:, :columns]
    groups = _runs(packed.to(torch.int64), bits)  # (rows, words, b)
    word = groups[..., 0].clone()
    for k in range(1, bits):
        word |= groups[..., k] << (8 * k)
    out = packed.new_empty(rows, word.shape[1], 8)
    for i in range(8):
        out[..., i] = (word >> (i * bits)) & ((1 << bits) - 1)
    return out.flatten(1)[:, :columns]


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix of integers in ``0..levels-1``, packed densely row by row."""

    data: UInt8[Tensor, "rows bytes"]
    columns: int
    levels: int

    @classmethod
    def of(cls, codes: Whole, levels: int) -> Codes:
        return cls(pack(codes, levels), codes.shape[1], levels)

    def unpack(self, rows: slice = ALL) -> UInt8[Tensor, "rows columns"]:
        return unpack(self.data[rows], self.columns, self.levels)

    def problem(self, rows: int, columns: int) -> str:
        """Why these cannot be the codes of a (rows, columns) matrix, or nothing."""
        expected = (rows, row_bytes(columns, self.levels))
        if self.columns == columns and self.data.shape == expected:
            return ""
        found = f"{self.columns} columns in bytes of shape {tuple(self.data.shape)}"
        return f"{found}, expected {columns} columns of {self.levels} levels in {expected}"

    @property
    def logical_bits(self) -> int:
        """Stored bits without the padding of rows."""
        bits = bits_for(self.levels)
        return self.data.shape[0] * (self.columns * bits if bits else 8 * row_bytes(self.columns, self.levels))

    @staticmethod
    def nbytes(rows: int, columns: int, levels: int) -> int:
        """Bytes that such a matrix will occupy, known before it exists."""
        return rows * row_bytes(columns, levels)


def _runs(x: Tensor, n: int) -> Tensor:
    """(rows, runs, n): each row cut into runs of n, the last one filled with zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % n))
    return padded.view(x.shape[0], padded.shape[1] // n, n)


def _powers_of_three(device: torch.device) -> Tensor:
    return torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=device)
