"""Small integers in 32-bit words, as GPTQ and AWQ files hold them.

A run of codes of b bits is a little-endian bit stream: code j occupies bits j*b .. j*b+b-1, bit 0 being the least
significant one of word 0. With 2, 4 or 8 bits a code never crosses a word; with 3, the stream is the 10 + 1 layout of
GPTQ: 32 codes in three words, of which the eleventh and the twenty-second cross. It is the stream of
:mod:`lowbit.formats.pack`, four bytes to a word, so that packed codes become words without being unpacked.
"""

from __future__ import annotations

import sys

import torch

from lowbit.arrays import Int, Tensor, UInt8
from lowbit.formats.pack import pack, unpack


def run_of(bits: int) -> int:
    """How many codes fill whole words: 32 / bits, or 32 codes of 3 bits."""
    return 32 // bits if 32 % bits == 0 else 32


def words(stream: UInt8[Tensor, "rows bytes"]) -> Int[Tensor, "rows words"]:
    """Packed bytes, a multiple of four a row, as words; a copy."""
    copy = stream.clone(memory_format=torch.contiguous_format)  # a view needs aligned storage
    return _native(copy).view(torch.int32)


def stream(words: Int[Tensor, "rows words"]) -> UInt8[Tensor, "rows bytes"]:
    """The inverse of :func:`words`; a copy."""
    return _native(words.clone(memory_format=torch.contiguous_format).view(torch.uint8))


def pack_words(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int[Tensor, "rows words"]:
    """Codes below 2^bits as words, row by row; columns must be a multiple of :func:`run_of`. Cost O(codes)."""
    return words(pack(codes, 1 << bits))


def unpack_words(packed: Int[Tensor, "rows words"], bits: int) -> UInt8[Tensor, "rows columns"]:
    """The inverse of :func:`pack_words`: every code that fits into the words. Cost O(codes)."""
    return unpack(stream(packed), packed.shape[1] * 32 // bits, 1 << bits)


def _native(data: UInt8[Tensor, "rows bytes"]) -> UInt8[Tensor, "rows bytes"]:
    """Bytes of little-endian words in the order of this machine, or back."""
    return data if sys.byteorder == "little" else data.view(data.shape[0], -1, 4).flip(-1).flatten(1)
