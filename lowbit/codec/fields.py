"""Bytes of a tensor as fields of like codes, and back: what an entropy coder can use is seldom the byte.

A *layout* says how records of a few bytes split: bfloat16 into its exponent and the rest (sign and mantissa are noise),
packed integers into one code a byte, a matrix of int32 into its byte planes. Splitting is a bijection; every code has
at most eight bits. Which layout fits bytes of a dtype is tried, not declared (:func:`candidates`): packed 4-bit codes
come as U8 and as I32.

Sources: exponents of weights carry about 2.6 bits of 8 (DFloat11, arXiv 2504.11651); coding scales, zeros and codes
apart is what recovers the few per cent that low-bit files have to give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from lowbit import _native

Bytes = UInt8[np.ndarray, "_"]
"""The bytes of a tensor, or codes of at most eight bits."""
Split = Callable[[Bytes], tuple[Bytes, ...]]
Join = Callable[[Sequence[Bytes]], Bytes]
Into = Callable[[Sequence[Bytes], Bytes], None]


class Part(NamedTuple):
    """One field of a layout: ``codes`` codes of ``bits`` bits a record; signed ones are read as int8 when coded."""

    name: str
    codes: int
    bits: int
    signed: bool = False


@dataclass(frozen=True)
class Layout:
    """Records of ``width`` bytes as fields. ``split`` takes whole records; the order of codes in a field is its own.

    Where every field has one code a record, in the order of the records, ``into`` joins any run of them into its place:
    codes, then the bytes to be written. A field may be the very memory of the place where records are of one byte.
    """

    name: str
    width: int
    parts: tuple[Part, ...]
    split: Split
    join: Join
    into: Into | None = None

    def counts(self, nbytes: int) -> tuple[int, ...] | None:
        """How many codes every field has for a tensor of ``nbytes``; None when these are no whole records."""
        if nbytes % self.width:
            return None
        return tuple(nbytes // self.width * part.codes for part in self.parts)


def _in_order(name: str, parts: tuple[Part, ...], split: Split, into: Into) -> Layout:
    """A layout with a code a record in each field: ``join`` is ``into`` of all."""

    def join(fields: Sequence[Bytes]) -> Bytes:
        out = np.empty(len(parts) * fields[0].size, np.uint8)
        into([np.ascontiguousarray(field) for field in fields], out)
        return out

    return Layout(name, len(parts), parts, split, join, into)


def candidates(dtype: str) -> tuple[str, ...]:
    """Names of layouts that bytes of a safetensors dtype, or a GGUF block type, may have; bytes for any other."""
    return _CANDIDATES.get(dtype, ("bytes",))


# Floating point. Words are little-endian; the exponent is a code of its own where it has eight bits, and the upper bits
# of one where it has fewer, so that a coder which keeps low bits raw keeps sign and mantissa.


def _split_bf16(data: Bytes) -> tuple[Bytes, ...]:
    word = data.view("<u2")
    return (word >> 7).astype(np.uint8), ((word >> 8) & 0x80 | word & 0x7F).astype(np.uint8)


def _join_bf16(fields: Sequence[Bytes], out: Bytes) -> None:
    exponent, rest = fields
    _native.join_bf16(exponent, rest, out.view("<u2"))


def _split_fp16(data: Bytes) -> tuple[Bytes, ...]:
    high, low = data[1::2], data[::2]  # s eeeee mm, mmmmmmmm
    return (high & 0x7C) << 1 | high >> 7 << 2 | high & 3, np.ascontiguousarray(low)


def _join_fp16(fields: Sequence[Bytes], out: Bytes) -> None:
    high, low = fields
    _native.join_fp16(high, low, out.view("<u2"))


def _split_fp32(data: Bytes) -> tuple[Bytes, ...]:
    word = data.view("<u4")
    sign = (word >> 24 & 0x80 | word >> 16 & 0x7F).astype(np.uint8)
    return (word >> 23).astype(np.uint8), sign, (word >> 8).astype(np.uint8), word.astype(np.uint8)


def _join_fp32(fields: Sequence[Bytes], out: Bytes) -> None:
    exponent, rest, middle, low = fields
    _native.join_fp32(exponent, rest, middle, low, out.view("<u4"))


def _split_e4m3(data: Bytes) -> tuple[Bytes, ...]:
    return ((data & 0x78) << 1 | data >> 7 << 3 | data & 7,)


def _join_e4m3(fields: Sequence[Bytes], out: Bytes) -> None:
    (code,) = fields
    out[:] = code >> 1 & 0x78 | (code & 8) << 4 | code & 7


def _split_e5m2(data: Bytes) -> tuple[Bytes, ...]:
    return ((data & 0x7C) << 1 | data >> 7 << 2 | data & 3,)


def _join_e5m2(fields: Sequence[Bytes], out: Bytes) -> None:
    (code,) = fields
    out[:] = code >> 1 & 0x7C | (code & 4) << 5 | code & 3


# Integers: as bytes, as planes of the bytes of wider ones, and as codes packed densely, least significant bits first.


def _same(data: Bytes) -> tuple[Bytes, ...]:
    return (data,)


def _joined_same(fields: Sequence[Bytes], out: Bytes) -> None:
    if fields[0] is not out:
        out[:] = fields[0]


def _planes(width: int, signed_top: bool = False) -> Layout:
    def split(data: Bytes) -> tuple[Bytes, ...]:
        return tuple(np.ascontiguousarray(data[i::width]) for i in range(width))

    def join(fields: Sequence[Bytes], out: Bytes) -> None:
        for i, field in enumerate(fields):
            out[i::width] = field

    parts = tuple(Part(f"byte {i}", 1, 8, signed_top and i == width - 1) for i in range(width))
    return _in_order(f"planes-{width}", parts, split, join)


def unpack_bits(data: Bytes, bits: int) -> Bytes:
    """Codes of ``bits`` bits in whole groups of ``bits`` bytes, eight codes to a group; in planes, not in order."""
    if bits in (1, 2, 4):
        mask = np.uint8((1 << bits) - 1)
        return np.concatenate([data >> shift & mask for shift in range(0, 8, bits)])
    word = np.zeros(data.size // bits, np.uint64)
    for k in range(bits):
        word |= data[k::bits].astype(np.uint64) << np.uint64(8 * k)
    mask64 = np.uint64((1 << bits) - 1)
    return np.concatenate([(word >> np.uint64(i * bits) & mask64).astype(np.uint8) for i in range(8)])


def pack_bits(codes: Bytes, bits: int) -> Bytes:
    """The inverse of :func:`unpack_bits`; a multiple of eight codes (of 8 / bits where that is whole)."""
    out = np.empty(codes.size * bits // 8, np.uint8)
    _native.pack_bits(np.ascontiguousarray(codes), out, bits)
    return out


def _packed(bits: int) -> Layout:
    whole = bits in (1, 2, 4)
    return Layout(
        f"packed-{bits}", 1 if whole else bits, (Part("codes", 8 // bits if whole else 8, bits),),
        lambda data: (unpack_bits(data, bits),), lambda fields: pack_bits(fields[0], bits),
    )  # fmt: skip


def _split_trits(data: Bytes) -> tuple[Bytes, ...]:
    digits = [data // np.uint8(3**k) % np.uint8(3) for k in range(4)]
    return (np.concatenate([*digits, data // np.uint8(81)]),)  # the last is 3 in the few bytes that are no five trits


def _join_trits(fields: Sequence[Bytes]) -> Bytes:
    digits = fields[0].reshape(5, fields[0].size // 5)
    out = digits[0].copy()
    for k in range(1, 5):
        out += digits[k] * np.uint8(3**k)
    joined: Bytes = out
    return joined


def _layouts() -> dict[str, Layout]:
    byte, signed = (Part("codes", 1, 8),), (Part("codes", 1, 8, signed=True),)
    bf16 = (Part("exponent", 1, 8), Part("sign, mantissa", 1, 8))
    fp16 = (Part("exponent, sign", 1, 8), Part("mantissa", 1, 8))
    fp32 = (*bf16, Part("mantissa 2", 1, 8), Part("mantissa 3", 1, 8))
    found = [
        _in_order("bytes", byte, _same, _joined_same), _in_order("int8", signed, _same, _joined_same),
        _in_order("bf16", bf16, _split_bf16, _join_bf16), _in_order("fp16", fp16, _split_fp16, _join_fp16),
        _in_order("fp32", fp32, _split_fp32, _join_fp32), _in_order("fp8-e4m3", byte, _split_e4m3, _join_e4m3),
        _in_order("fp8-e5m2", byte, _split_e5m2, _join_e5m2), *(_planes(n) for n in (2, 4, 8)),
        *(_packed(bits) for bits in range(1, 8)),
        Layout("trits", 1, (Part("codes", 5, 2),), _split_trits, _join_trits),
    ]  # fmt: skip
    return {layout.name: layout for layout in found}


LAYOUTS = _layouts()

_PACKED = ("packed-4", "packed-2", "packed-3", "packed-1", "packed-5", "packed-6", "packed-7", "trits")
_CANDIDATES = {
    "BF16": ("bf16",), "F16": ("fp16",), "F32": ("fp32",), "F64": ("planes-8",), "F8_E4M3": ("fp8-e4m3",),
    "F8_E5M2": ("fp8-e5m2",), "F4": ("packed-4",), "I8": ("int8", "packed-4", "packed-2"), "U8": ("bytes", *_PACKED),
    "BOOL": ("bytes",), "I16": ("planes-2",), "U16": ("planes-2",),
    "I32": ("planes-4", "packed-4", "packed-2", "packed-3"), "U32": ("planes-4", "packed-4", "packed-2", "packed-3"),
    "I64": ("planes-8",), "U64": ("planes-8",),
}  # fmt: skip
