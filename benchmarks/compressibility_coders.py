"""What compressibility.py sends through coders, and the coders: zstandard, Huffman and FSE by computation, ours."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lossless import as_bytes

from lowbit.codec import coding, stream
from lowbit.codec.fields import LAYOUTS, Layout
from lowbit.formats.pack import bits_for
from lowbit.formats.qtensor import Coded, QTensor

HUFFMAN_LENGTH_BITS, FSE_LOG = 5, 11
_NAMES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8"}


class Piece(NamedTuple):
    """A stored tensor: its bytes, how they split into fields of codes, and whether these are the weights' codes."""

    dtype: str
    data: np.ndarray
    layout: Layout
    weights: bool

    def fields(self) -> tuple[np.ndarray, ...]:
        return self.layout.split(self.data)


class Coder(NamedTuple):
    """Bytes of every piece as coded, and what decodes them all to their uncoded bytes."""

    nbytes: int
    decode: Callable[[], Iterable[np.ndarray]]


def own(path: Path) -> list[Piece]:
    """The linears of a model in bfloat16."""
    from safetensors import safe_open

    with safe_open(path / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("proj.weight")]  # noqa: SIM118
        return [Piece("BF16", as_bytes(file.get_tensor(name)), LAYOUTS["bf16"], True) for name in names]


def stored(q: QTensor) -> Iterator[Piece]:
    """What a checkpoint holds of a linear; entropy-coded numbers as if they were stored in a byte each."""
    if isinstance(q, Coded):
        near, *far = in_bytes(q.stream, fits(q.stream))
        yield Piece("I8", near, LAYOUTS["int8"], True)
        for data in far:
            yield Piece("U8", data, LAYOUTS["bytes"], False)
    levels = {leaf.name: leaf.levels for leaf in q.spec().leaves}
    for part in q.parts():
        if part.path == "stream":
            continue
        data, bits = as_bytes(part.data), bits_for(levels.get(part.path) or 256)
        layout = {torch.float16: "fp16", torch.float32: "fp32"}.get(part.data.dtype, f"packed-{bits}")
        found = LAYOUTS.get(layout, LAYOUTS["bytes"])
        whole = found if found.counts(data.size) is not None else LAYOUTS["bytes"]
        yield Piece(_NAMES[part.data.dtype], data, whole, part.path == "codes")


def fits(blob: torch.Tensor) -> bool:
    """Whether every number of a stream is an int8."""
    numbers = stream.decode(blob)
    return bool(numbers.min() >= -128) and bool(numbers.max() <= 127)


def in_bytes(blob: torch.Tensor, fitting: bool) -> list[np.ndarray]:
    """Coded numbers as int8; those beyond it clamped, and then where they are and what."""
    if fitting:
        return [as_bytes(stream.decode(blob, dtype=torch.int8))]
    numbers = stream.decode(blob).view(-1)
    near = numbers.clamp(-128, 127)
    far = (near != numbers).nonzero()[:, 0]
    return [as_bytes(near.to(torch.int8)), as_bytes(far.to(torch.int32)), as_bytes(numbers[far])]


def huffman(counts: np.ndarray) -> float:
    """Bits of codes with these counts in a canonical Huffman code, its lengths included."""
    used = np.flatnonzero(counts)
    heap = counts[used].tolist()
    heapq.heapify(heap)
    bits = heap[0] if len(heap) == 1 else 0
    while len(heap) > 1:  # a code's length is how often its symbol is merged
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, merged)
        bits += merged
    return bits + 16 + HUFFMAN_LENGTH_BITS * int(used[-1] - used[0] + 1)


def fse(counts: np.ndarray) -> float:
    """Bits under counts that sum to 2^FSE_LOG states (the best such), and of the header that holds them."""
    used = np.flatnonzero(counts)
    n = counts[used]
    states = np.maximum(1, np.floor(n / n.sum() * (1 << FSE_LOG))).astype(np.int64)
    while (left := (1 << FSE_LOG) - int(states.sum())) > 0:
        states[np.argmax(n * np.log2((states + 1) / states))] += 1
    for _ in range(-left):
        states[np.argmin(np.where(states > 1, n * np.log2(states / np.maximum(1, states - 1)), np.inf))] -= 1
    whole = np.zeros(int(used[-1] - used[0] + 1), np.int64)
    whole[used - used[0]] = states
    header = sum(int(1 << FSE_LOG).bit_length() - 1 if not s else int(left).bit_length()
                 for s, left in zip(whole, (1 << FSE_LOG) - np.cumsum(whole) + whole, strict=True))  # fmt: skip
    return float((n * np.log2((1 << FSE_LOG) / states)).sum()) + 16 + header


def computed(pieces: list[Piece], bits: Callable[[np.ndarray], float]) -> int:
    """Bytes of all fields in a code of their own each, those that it does not shrink as they are."""
    total = 0
    for piece in pieces:
        for codes, part in zip(piece.fields(), piece.layout.parts, strict=True):
            counts = coding.histogram(codes, part.signed)
            total += min(math.ceil(bits(counts) / 8), coding.raw_bytes(codes.size, part.bits))
    return total


def entropy(pieces: list[Piece]) -> float:
    """Order-0 entropy of the weights' codes, bits a weight; every tensor by its own frequencies."""
    bits = weights = 0.0
    for piece in pieces:
        if piece.weights:
            fields = piece.fields()
            bits += sum(coding.entropy(coding.histogram(codes, False)) * codes.size for codes in fields)
            weights += fields[0].size
    return bits / weights


def ours(pieces: list[Piece]) -> Coder:
    coded = [coding.encode_tensor(piece.data, piece.dtype) for piece in pieces]
    sizes = [p.data.size if c is None else 160 + sum(b.data.size for b in c[1])  # 160: its entry in the header
             for p, c in zip(pieces, coded, strict=True)]  # fmt: skip

    def decode() -> list[np.ndarray]:
        return [p.data if c is None else coding.decode_tensor(*c) for p, c in zip(pieces, coded, strict=True)]

    return Coder(sum(sizes), decode)


def streams(trees: list[QTensor]) -> Coder:
    """Entropy-coded matrices as their checkpoint holds them."""
    kept = sum(part.data.numel() for q in trees for part in q.parts())
    blobs = [(q.stream, fits(q.stream)) for q in trees if isinstance(q, Coded)]
    beside = [part.data.numpy().reshape(-1) for q in trees for part in q.parts() if part.path != "stream"]

    def decode() -> list[np.ndarray]:
        return [*(data for blob in blobs for data in in_bytes(*blob)), *beside]

    return Coder(kept, decode)


def zstandard_coders(pieces: list[Piece]) -> dict[str, Coder]:
    """zstd at two levels on the bytes as they are; and its Huffman stage alone, on fields, as a Huffman decoder."""
    try:
        import zstandard as z
    except ImportError:
        return {}
    found, d = {}, z.ZstdDecompressor()

    def whole(frames: list[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(d.decompress(frame), np.uint8) for frame in frames]

    for level in (1, 3):
        c = z.ZstdCompressor(level=level)
        coded = [c.compress(piece.data.tobytes()) for piece in pieces]
        found[f"zstd -{level}"] = Coder(sum(map(len, coded)), partial(whole, coded))
    # matches of seven bytes within a kilobyte: there are none in codes, so what is left are Huffman-coded literals
    c = z.ZstdCompressor(
        compression_params=z.ZstdCompressionParameters(strategy=z.STRATEGY_FAST, min_match=7, window_log=10, hash_log=6)
    )
    split = [[c.compress(f.tobytes()) for f in piece.fields()] for piece in pieces]

    def decode() -> list[np.ndarray]:
        return [piece.layout.join(whole(frames)) for piece, frames in zip(pieces, split, strict=True)]

    found["Huff0"] = Coder(sum(min(sum(map(len, s)), p.data.size) for p, s in zip(pieces, split, strict=True)), decode)
    return found
