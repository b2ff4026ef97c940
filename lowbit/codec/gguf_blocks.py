"""Blocks of GGUF files as fields: scales apart from codes, and codes of five and six bits put together again.

Layouts of blocks: ``ggml-common.h`` of ggml, as reference for bytes only. Each is a bijection between the bytes of a
block and its fields, whatever the values mean; types that are not here are coded as bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from lowbit.codec.fields import LAYOUTS, Bytes, Layout, Part

Columns = UInt8[np.ndarray, "_ _"]


class _Piece(NamedTuple):
    """Some bytes of a block: their ``layout``, and which field their codes go to."""

    name: str
    start: int
    stop: int
    layout: str


def _flat(columns: Columns) -> Bytes:
    flat: Bytes = np.ascontiguousarray(columns).reshape(-1)
    return flat


def _cut(name: str, width: int, *pieces: _Piece) -> Layout:
    """A block whose pieces are coded one by one, each in a layout of plain tensors."""

    def split(data: Bytes) -> tuple[Bytes, ...]:
        blocks = data.reshape(-1, width)
        return tuple(f for p in pieces for f in LAYOUTS[p.layout].split(_flat(blocks[:, p.start : p.stop])))

    def join(fields: Sequence[Bytes]) -> Bytes:
        taken, given = [], iter(fields)
        for p in pieces:
            layout = LAYOUTS[p.layout]
            taken.append((p, layout.join([next(given) for _ in layout.parts])))
        out = np.empty((taken[0][1].size // (pieces[0].stop - pieces[0].start), width), np.uint8)
        for p, piece in taken:
            out[:, p.start : p.stop] = piece.reshape(out.shape[0], p.stop - p.start)
        whole: Bytes = out.reshape(-1)
        return whole

    parts = []
    for p in pieces:
        layout = LAYOUTS[p.layout]
        repeats = (p.stop - p.start) // layout.width
        for part in layout.parts:
            name_of = p.name if len(layout.parts) == 1 else f"{p.name}: {part.name}"
            parts.append(Part(name_of, part.codes * repeats, part.bits, part.signed))
    return Layout(name, width, tuple(parts), split, join)


def _fused(base: Layout, low: str, high: str, bits: int, at: tuple[int, ...]) -> Layout:
    """``base`` with two of its fields, low and high bits of the same codes, as one of ``bits`` bits.

    ``at``: for every code of a block, in the order of its low bits, where its high bits are among those of the block.
    Fields of a layout are in planes over all blocks; in a block, both are seen in the order of ``unpack_bits``.
    """
    names = [part.name for part in base.parts]
    i, j = names.index(low), names.index(high)
    count, shift = base.parts[i].codes, base.parts[i].bits
    order = np.array(at)
    back = np.argsort(order)
    kept = [k for k in range(len(names)) if k not in (i, j)]

    def split(data: Bytes) -> tuple[Bytes, ...]:
        fields = base.split(data)
        upper = _by_block(fields[j], base.parts[j])[:, order]
        codes = _by_block(fields[i], base.parts[i]) | upper << np.uint8(shift)
        return (*(fields[k] for k in kept), codes.reshape(-1))

    def join(fields: Sequence[Bytes]) -> Bytes:
        codes = fields[-1].reshape(-1, count)
        whole = dict(zip(kept, fields, strict=False))
        whole[i] = _in_planes(codes & np.uint8((1 << shift) - 1), base.parts[i])
        whole[j] = _in_planes((codes >> np.uint8(shift))[:, back], base.parts[j])
        return base.join([whole[k] for k in range(len(names))])

    parts = (*(base.parts[k] for k in kept), Part("codes", count, bits))
    return Layout(base.name, base.width, parts, split, join)


def _by_block(codes: Bytes, part: Part) -> Columns:
    """Codes in planes over all blocks as one row a block, the planes of the block one after another."""
    per = 8 // part.bits
    planes = codes.reshape(per, -1, part.codes // per)  # (planes, blocks, bytes of a block)
    return np.ascontiguousarray(planes.transpose(1, 0, 2)).reshape(planes.shape[1], part.codes)


def _in_planes(codes: Columns, part: Part) -> Bytes:
    per = 8 // part.bits
    planes = codes.reshape(codes.shape[0], per, part.codes // per)
    return np.ascontiguousarray(planes.transpose(1, 0, 2)).reshape(-1)


def _scales_6(base: Layout, name: str) -> Layout:
    """``base`` with twelve bytes ``name`` of a block as the eight scales and eight minima of six bits that they hold.

    Bytes 0..3 and 4..7 have the first four of each in their low six bits; the upper two are the upper bits of the last
    four, whose low four bits are the nibbles of bytes 8..11.
    """
    k = [part.name for part in base.parts].index(name)

    def split(data: Bytes) -> tuple[Bytes, ...]:
        fields = list(base.split(data))
        b = fields[k].reshape(-1, 12)
        top = b[:, :8] >> 6 << 4
        last = np.concatenate([b[:, 8:] & 15, b[:, 8:] >> 4], axis=1) | top
        codes = np.concatenate([b[:, :8] & 63, last], axis=1)  # scales 0-3, minima 0-3, scales 4-7, minima 4-7
        scales, minima = codes.reshape(-1, 2, 2, 4).transpose(2, 0, 1, 3)
        fields[k : k + 1] = [_flat(scales.reshape(-1, 8)), _flat(minima.reshape(-1, 8))]
        return tuple(fields)

    def join(fields: Sequence[Bytes]) -> Bytes:
        pair = np.stack([field.reshape(-1, 2, 4) for field in fields[k : k + 2]])  # (scale or minimum, block, half, 4)
        codes = pair.transpose(1, 2, 0, 3).reshape(-1, 16)
        b = np.empty((codes.shape[0], 12), np.uint8)
        b[:, :8] = codes[:, :8] | codes[:, 8:] >> 4 << 6
        b[:, 8:] = codes[:, 8:12] & 15 | (codes[:, 12:] & 15) << 4
        return base.join([*fields[:k], b.reshape(-1), *fields[k + 2 :]])

    halves = (Part("scales", 8, 6), Part("minima", 8, 6))
    return Layout(base.name, base.width, (*base.parts[:k], *halves, *base.parts[k + 1 :]), split, join)


def _where(high_of: Sequence[tuple[int, int]], bits: int, nbytes: int) -> tuple[int, ...]:
    """Positions for :func:`_fused`: (byte, shift) of the high bits of every code among ``nbytes`` bytes, as planes."""
    return tuple(shift // bits * nbytes + byte for byte, shift in high_of)


def _blocks() -> dict[str, Layout]:
    half = "fp16"
    d, m = _Piece("scale", 0, 2, half), _Piece("minimum", 2, 4, half)
    q4_0 = _cut("q4_0", 18, d, _Piece("codes", 2, 18, "packed-4"))
    q4_1 = _cut("q4_1", 20, d, m, _Piece("codes", 4, 20, "packed-4"))
    q8_0 = _cut("q8_0", 34, d, _Piece("codes", 2, 34, "int8"))
    # the fifth bit of code e is bit e % 8 of byte e // 8; low nibbles are codes 0-15, high ones 16-31
    fifth = _where([(e // 8, e % 8) for e in range(32)], 1, 4)
    q5_0 = _cut("q5_0", 22, d, _Piece("high", 2, 6, "packed-1"), _Piece("low", 6, 22, "packed-4"))
    q5_1 = _cut("q5_1", 24, d, m, _Piece("high", 4, 8, "packed-1"), _Piece("low", 8, 24, "packed-4"))
    q2_k = _cut(
        "q2_k", 84, _Piece("scales, minima", 0, 16, "packed-4"), _Piece("codes", 16, 80, "packed-2"),
        _Piece("scale", 80, 82, half), _Piece("minimum", 82, 84, half),
    )  # fmt: skip
    # chunk of 128 codes n, plane j of two bits: the third bit is bit 4 n + j of byte l of the mask
    third = _where([(b % 32, 4 * (b // 32) + j) for j in range(4) for b in range(64)], 1, 32)
    q3_k = _cut(
        "q3_k", 110, _Piece("high", 0, 32, "packed-1"), _Piece("low", 32, 96, "packed-2"),
        _Piece("scales", 96, 108, "packed-2"), _Piece("scale", 108, 110, half),
    )  # fmt: skip
    k = (_Piece("scale", 0, 2, half), _Piece("minimum", 2, 4, half), _Piece("scales of blocks", 4, 16, "bytes"))
    q4_k = _cut("q4_k", 144, *k, _Piece("codes", 16, 144, "packed-4"))
    # chunk of 64 codes c: low nibbles have bit 2 c of byte l, high nibbles bit 2 c + 1
    fifth_k = _where([(b % 32, 2 * (b // 32) + j) for j in range(2) for b in range(128)], 1, 32)
    q5_k = _cut("q5_k", 176, *k, _Piece("high", 16, 48, "packed-1"), _Piece("low", 48, 176, "packed-4"))
    # half n of 128 codes: byte l < 64 of its low nibbles has bits 2 (l // 32) of byte l % 32, its high nibbles 4 more
    sixth = _where([(32 * (b // 64) + b % 32, 2 * (b % 64 // 32) + 4 * j) for j in range(2) for b in range(128)], 2, 64)
    q6_k = _cut(
        "q6_k", 210, _Piece("low", 0, 128, "packed-4"), _Piece("high", 128, 192, "packed-2"),
        _Piece("scales of blocks", 192, 208, "int8"), _Piece("scale", 208, 210, half),
    )  # fmt: skip
    found = [
        q4_0, q4_1, q8_0, _fused(q5_0, "low", "high", 5, fifth), _fused(q5_1, "low", "high", 5, fifth), q2_k,
        _fused(q3_k, "low", "high", 3, third), _scales_6(q4_k, "scales of blocks"),
        _scales_6(_fused(q5_k, "low", "high", 5, fifth_k), "scales of blocks"), _fused(q6_k, "low", "high", 6, sixth),
    ]  # fmt: skip
    return {layout.name: layout for layout in found}


BLOCKS = _blocks()
"""Layouts by name; a GGUF type has that of its own name in lower case."""
