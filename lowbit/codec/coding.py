"""One field of codes as stored bytes: the cheapest of four codecs, and how large it would be.

    constant   one value; repeated once for every 4096 codes, so that no file decodes to much more than its size
    raw        the codes packed to their bits
    tans       the stream of ``lowbit.codec.stream``
    ranked     the same over ranks of symbols by frequency, after a list of them: few symbols far from each other

Fields are flat; the coder sees them as a matrix of up to 4096 columns whose last row is padded (:func:`geometry`).
General-purpose compressors are not among them: on codes they find matches that are accidents and lose to order 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from lowbit.codec import stream
from lowbit.codec.fields import LAYOUTS, Bytes, Layout, Part, candidates, pack_bits, unpack_bits
from lowbit.codec.gguf_blocks import BLOCKS
from lowbit.errors import FormatError

Histogram = Int[np.ndarray, "256"]

CODECS = ("constant", "raw", "tans", "ranked")
REPEAT = 4096
"""Codes that one stored byte of a constant field stands for; no codec decodes to more, of more than 64 kB."""
PIECE = 6 << 17
"""Codes that are decoded before they are joined: few enough to stay in cache until then."""
_TOGETHER = 6  # segments that the decoder runs side by side
_PIECES = 128  # of a field at most, as each looks at the heads of all segments
_COLUMNS = 4096
_ALPHABET = 64  # symbols that one table of the coder holds
_GAIN = 0.995  # a coded field must be at least this much smaller than a raw one: reading raw bytes is free
_ENTRY = 160  # bytes of JSON that a coded tensor has and a plain one does not
_SAMPLE = 1 << 18  # bytes that decide the layout of a tensor


class Price(NamedTuple):
    """What a field costs: the codec, its stored bytes (estimated), and the field's order-0 entropy in bits a code."""

    codec: str
    nbytes: float
    entropy: float


class Blob(NamedTuple):
    """A field as it is stored."""

    codec: str
    data: Bytes
    codes: int


def layout(name: str) -> Layout:
    """The layout of a name; raises FormatError when there is none."""
    found = LAYOUTS.get(name) or BLOCKS.get(name)
    if found is None:
        raise FormatError(f"unknown layout {name!r}", fix="another version of lowbit")
    return found


def geometry(count: int) -> tuple[int, int]:
    """Rows and columns of the matrix that ``count`` codes are coded as."""
    columns = min(_COLUMNS, 64 * math.ceil(count / 64))
    return math.ceil(count / columns), columns


def raw_bytes(count: int, bits: int) -> int:
    """Bytes of a raw field, whole groups of eight codes (or of a byte) included."""
    per = 8 // bits if bits in (1, 2, 4, 8) else 8
    return math.ceil(count / per) * per * bits // 8


def histogram(codes: Bytes, signed: bool) -> Histogram:
    """Counts of the 256 values in ascending order; of int8 when ``signed``."""
    even = codes.size // 2 * 2
    pairs, found = np.ascontiguousarray(codes[:even]).view(np.uint16), np.bincount(codes[even:], minlength=256)
    for start in range(0, pairs.size, 1 << 20):  # bincount makes eight bytes of each, so two codes are counted at once
        table = np.bincount(pairs[start : start + (1 << 20)], minlength=1 << 16).reshape(256, 256)
        found += table.sum(0) + table.sum(1)
    return np.roll(found, 128) if signed else found


def entropy(counts: Histogram) -> float:
    """Order-0 entropy in bits a code; 0 for no codes."""
    p = counts[counts > 0] / max(1, int(counts.sum()))
    return float(-(p * np.log2(p)).sum()) + 0.0


def price(counts: Histogram, part: Part) -> Price:
    """The cheapest codec for a field with these counts, and its bytes, without encoding it."""
    total, used = int(counts.sum()), int((counts > 0).sum())
    bits = entropy(counts)
    raw = float(raw_bytes(total, part.bits))
    if used <= 1 and total:
        return Price("constant", float(math.ceil(total / REPEAT)), bits)
    if bits * total / 8 > _GAIN * raw:  # no coder is below entropy
        return Price("raw", raw, bits)
    span = np.flatnonzero(counts)
    natural = stream.cost(counts[span[0] : span[-1] + 1])
    near = span[-1] - span[0] < _ALPHABET  # then ranks would say nothing that the coder does not know
    ranked = math.inf if near else 1 + used + stream.cost(np.sort(counts[span])[::-1].copy())
    codec, best = ("tans", natural) if natural <= 1.002 * ranked else ("ranked", ranked)
    return Price(codec, best, bits) if best < _GAIN * raw else Price("raw", raw, bits)


def encode(codes: Bytes, part: Part) -> Blob:
    """A field in its cheapest codec; cost O(codes)."""
    counts = histogram(codes, part.signed)
    chosen = price(counts, part).codec
    data = _ENCODERS[chosen](codes, part, counts)
    if data.size > raw_bytes(codes.size, part.bits):
        chosen, data = "raw", _encode_raw(codes, part, counts)
    return Blob(chosen, data, codes.size)


Codes = Callable[[int, Bytes, int], Bytes]
"""Codes of a field from one on, as many as the given memory holds, by a number of threads: decoded into it, or where
they lie already."""


class Field(NamedTuple):
    """A field to be decoded, best in runs of ``piece`` codes (0: of any number), which begin at multiples of it."""

    codes: Codes
    piece: int = 0


def opened(blob: Blob, part: Part) -> Field:
    """A field to be decoded; FormatError, before allocating, unless the bytes are those of ``blob.codes`` codes."""
    if blob.codes > REPEAT * max(16, blob.data.size):
        raise FormatError(f"{blob.data.size} bytes cannot hold {blob.codes} codes")
    return _OPENERS[blob.codec](blob.data, part, blob.codes)


def decode(blob: Blob, part: Part, threads: int = 1) -> Bytes:
    """The codes of a field; raises FormatError as :func:`opened` does."""
    return opened(blob, part).codes(0, np.empty(blob.codes, np.uint8), threads)


def fit(data: Bytes, dtype: str) -> Layout | None:
    """The layout in which bytes of a dtype cost least, None where none makes them smaller; looks at a sample."""
    tried = [BLOCKS[dtype.lower()]] if dtype.lower() in BLOCKS else [LAYOUTS[name] for name in candidates(dtype)]
    bounded = []
    for order, candidate in enumerate(tried):
        if data.size and not data.size % candidate.width:
            sample = _sample(data, candidate.width)
            fields = zip(candidate.split(sample), candidate.parts, strict=True)
            counts = [(histogram(codes, part.signed), part) for codes, part in fields]
            bound = sum(entropy(c) * int(c.sum()) / 8 for c, _ in counts) / sample.size
            bounded.append((bound, order, candidate, counts, data.size / sample.size))
    best, least = None, float(data.size - _ENTRY)
    for bound, _, candidate, counts, scale in sorted(bounded, key=lambda found: found[:2]):
        if bound * data.size >= least:
            break  # no coder is below entropy, and those that follow have more
        cost = sum(price(c, part).nbytes for c, part in counts) * scale
        if cost < least:
            best, least = candidate, cost
    return best if least < _GAIN * data.size else None


def encode_tensor(data: Bytes, dtype: str) -> tuple[Layout, list[Blob]] | None:
    """The fields of a tensor as stored, or None where its bytes are best left as they are."""
    chosen = fit(data, dtype)
    if chosen is None:
        return None
    blobs = [encode(codes, part) for codes, part in zip(chosen.split(data), chosen.parts, strict=True)]
    return (chosen, blobs) if sum(b.data.size for b in blobs) + _ENTRY < _GAIN * data.size else None


def decode_tensor(chosen: Layout, blobs: Sequence[Blob], threads: int | None = None) -> Bytes:
    """The bytes of a tensor; the inverse of :func:`encode_tensor`. Raises FormatError.

    By up to ``threads`` threads (None: torch's number), piece by piece where fields are in the order of the records:
    then the result is the only memory that is touched for the first time, which costs as much as to decode into it.
    """
    threads = threads or torch.get_num_threads()
    fields = [opened(blob, part) for blob, part in zip(blobs, chosen.parts, strict=True)]
    into, width, records = chosen.into, chosen.width, blobs[0].codes
    if into is None or any(blob.codes != records for blob in blobs):  # then joining says what is wrong
        counts = (blob.codes for blob in blobs)
        return chosen.join([f.codes(0, np.empty(n, np.uint8), threads) for f, n in zip(fields, counts, strict=True)])
    out, piece = np.empty(records * width, np.uint8), max(field.piece for field in fields) or PIECE
    starts = range(0, records, piece)
    threads = min(threads, len(starts))

    def join(mine: range) -> None:
        buffers = [np.empty(min(piece, records) if width > 1 else 0, np.uint8) for _ in fields]
        for first in mine:
            place = out[first * width : (first + piece) * width]
            memory = (place if width == 1 else buffer[: place.size // width] for buffer in buffers)
            into([field.codes(first, to, 1) for field, to in zip(fields, memory, strict=True)], place)

    if threads <= 1:
        join(starts)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(join, [starts[k::threads] for k in range(threads)]))
    return out


def _sample(data: Bytes, width: int) -> Bytes:
    """All of a small tensor; of a large one sixteen runs, evenly spread, of whole records."""
    if data.size <= 2 * _SAMPLE:
        return data
    run = _SAMPLE // 16 // width * width
    starts = np.linspace(0, data.size - run, 16).astype(np.int64) // width * width
    return np.concatenate([data[start : start + run] for start in starts])


def _encode_constant(codes: Bytes, part: Part, counts: Histogram) -> Bytes:
    return np.full(math.ceil(codes.size / REPEAT), codes[0], np.uint8)


def _open_constant(data: Bytes, part: Part, count: int) -> Field:
    if data.size != math.ceil(count / REPEAT) or not count or (data != data[0]).any():
        raise FormatError(f"{data.size} bytes are no constant of {count} codes")

    def codes(first: int, out: Bytes, threads: int) -> Bytes:
        out.fill(data[0])
        return out

    return Field(codes)


def _encode_raw(codes: Bytes, part: Part, counts: Histogram) -> Bytes:
    if part.bits == 8:
        return codes
    per = 8 // part.bits if part.bits in (1, 2, 4) else 8
    return pack_bits(np.pad(codes, (0, -codes.size % per)), part.bits)


def _open_raw(data: Bytes, part: Part, count: int) -> Field:
    if data.size != raw_bytes(count, part.bits):
        raise FormatError(f"{data.size} bytes are not {count} codes of {part.bits} bits")
    return _there(data if part.bits == 8 else unpack_bits(data, part.bits))


def _there(codes: Bytes) -> Field:
    """Codes that need no decoding any more."""
    return Field(lambda first, out, threads: codes[first : first + out.size])


def _encode_tans(codes: Bytes, part: Part, counts: Histogram) -> Bytes:
    likely = (int(counts.argmax()) + (128 if part.signed else 0)) % 256  # as a byte
    rows, columns = geometry(codes.size)
    padded = np.full(rows * columns, likely, np.uint8)
    padded[: codes.size] = codes
    whole = padded.view(np.int8) if part.signed else padded
    matrix = torch.from_numpy(whole.astype(np.int16)).view(rows, columns)
    return np.ascontiguousarray(stream.encode(matrix).numpy())


def _open_tans(data: Bytes, part: Part, count: int) -> Field:
    blob, columns = torch.from_numpy(data), geometry(count)[1]
    if not count or stream.shape(blob) != geometry(count):
        raise FormatError(f"the stream is not one of {count} codes")
    dtype = torch.int8 if part.signed else torch.uint8
    segment = stream.segment_rows(blob) * columns
    segments = max(PIECE, count // _PIECES) // segment if segment else 0
    if not segments or not stream.fits(blob, dtype):
        return _there(stream.decode(blob, dtype=dtype).view(torch.uint8).numpy().reshape(-1))

    def codes(first: int, out: Bytes, threads: int) -> Bytes:
        rows = math.ceil(out.size / columns)
        whole = out if out.size == rows * columns else np.empty(rows * columns, np.uint8)
        stream.decode_rows(blob, first // columns, torch.from_numpy(whole).view(dtype).view(rows, columns), threads)
        return out if whole is out else whole[: out.size]

    return Field(codes, segment * (segments // _TOGETHER * _TOGETHER or segments))


def _encode_ranked(codes: Bytes, part: Part, counts: Histogram) -> Bytes:
    counts = np.roll(counts, -128) if part.signed else counts  # by byte
    symbols = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())].astype(np.uint8)
    rank = np.zeros(256, np.uint8)
    rank[symbols] = np.arange(symbols.size, dtype=np.uint8)
    ranked = Part(part.name, part.codes, 8)
    coded = _encode_tans(rank[codes], ranked, np.sort(counts)[::-1])
    return np.concatenate([np.array([symbols.size - 1], np.uint8), symbols, coded])


def _open_ranked(data: Bytes, part: Part, count: int) -> Field:
    used = int(data[0]) + 1 if data.size else 0
    if data.size <= used:
        raise FormatError("the list of symbols is cut short")
    symbols = np.zeros(256, np.uint8)
    symbols[:used] = data[1 : 1 + used]
    ranks = _open_tans(np.ascontiguousarray(data[1 + used :]), Part(part.name, part.codes, 8), count)
    return Field(lambda first, out, threads: symbols[ranks.codes(first, out, threads)], ranks.piece)


_ENCODERS: dict[str, Callable[[Bytes, Part, Histogram], Bytes]] = {
    "constant": _encode_constant, "raw": _encode_raw, "tans": _encode_tans, "ranked": _encode_ranked,
}  # fmt: skip
_OPENERS: dict[str, Callable[[Bytes, Part, int], Field]] = {
    "constant": _open_constant, "raw": _open_raw, "tans": _open_tans, "ranked": _open_ranked,
}  # fmt: skip
