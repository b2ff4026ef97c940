"""Entropy-coded matrices of small integers: a uint8 tensor that decodes to the same codes, bit for bit.

    blob = encode(codes)                # int16, about the order-0 entropy of each panel in size
    decode(blob, slice(0, 100))         # the first hundred rows

Tabled asymmetric numeral systems (Duda, arXiv 1311.2540) with 128 states and 64 interleaved lanes, decoded with
vector instructions that are chosen when the program runs (environment variable ``LOWBIT_ISA`` names one:
``lowbit._native.isas()``). docs/reference/stream.md specifies the bytes; ``tables.py`` decodes them in numpy.

A panel is a run of columns with a table of its own. An alphabet has at most 64 symbols; wider distributions keep
low bits as they are, and rarer values are listed as exceptions, whichever costs least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int, Int16, Shaped

from lowbit import _native
from lowbit.arrays import Tensor, UInt8
from lowbit.errors import FormatError, RecipeError

Blob = UInt8[Tensor, "n"]
ALL = slice(None)
SEGMENT = 1 << 17
HEAD_BYTES = 32 + 6 + 99  # of a stream with one panel and one table
_BLOCK = slice(12, 16)  # the rows of a segment, in the head
SEGMENT_BYTES = 56 + 8 * 2 + 1 + 4  # start states, lengths, and what is lost to whole bytes
_LIMITS = {torch.int8: (-128, 127), torch.uint8: (0, 255), torch.int16: (-32768, 32767)}


def encode(
    codes: Int16[Tensor, "rows columns"], panels: Sequence[int] | None = None, *, segment: int = SEGMENT
) -> Blob:
    """The blob of a matrix of codes; :func:`decode` gives them back exactly.

    ``panels`` are the widths of consecutive runs of columns that get a table each, multiples of 64 but for the last
    (None: one run). ``segment`` is the number of codes after which a decoder can enter, about: 80 bytes are spent on
    each. Raises RecipeError for panels that do not fill the columns. Cost O(rows * columns), on torch's threads.
    """
    rows, columns = codes.shape
    widths = list(panels) if panels is not None else [columns] if columns else []
    if any(w <= 0 or (w % 64 and i + 1 < len(widths)) for i, w in enumerate(widths)) or sum(widths) != columns:
        raise RecipeError(
            f"panels {widths} do not fill {columns} columns in multiples of 64",
            where=f"codes of shape ({rows}, {columns})",
            fix="widths that sum to the columns, each but the last a multiple of 64",
        )
    if segment < 1:
        raise RecipeError(f"a segment of {segment} codes", fix=f"segment={SEGMENT}")
    blob = _native.encode(codes.detach().cpu().contiguous().numpy(), widths, segment, torch.get_num_threads())
    return torch.from_numpy(blob)


def decode(stream: Blob, rows: slice = ALL, dtype: torch.dtype = torch.int16) -> Shaped[Tensor, "rows columns"]:
    """The codes in ``rows`` (a slice with step 1), as int16, int8 or uint8.

    Segments that the slice touches are decoded whole. Allocates what :func:`shape` says: whoever distrusts a stream
    compares that first. Raises FormatError for bytes that are no stream, for corrupt segments (every automaton and
    every bit stream must end exactly where its encoder began; altered bits can escape that, so keep a digest), and for
    codes that ``dtype`` cannot hold. Cost O(rows * columns), on torch's threads.
    """
    if dtype not in _LIMITS:
        raise FormatError(f"codes cannot be decoded to {dtype}", fix="torch.int16, torch.int8 or torch.uint8")
    total, columns = shape(stream)
    first, last, step = rows.indices(total)
    if step != 1:
        raise FormatError(f"rows are decoded in order, not by {step}", fix="a slice with step 1")
    if not fits(stream, dtype):
        narrow = decode(stream, rows)  # what tables allow need not occur
        if narrow.numel() and (narrow.min() < _LIMITS[dtype][0] or narrow.max() > _LIMITS[dtype][1]):
            raise FormatError(f"codes from {narrow.min()} to {narrow.max()} do not fit {dtype}", fix="torch.int16")
        return narrow.to(dtype)
    out = torch.empty(max(last - first, 0), columns, dtype=dtype)
    if out.numel():
        decode_rows(stream, first, out, torch.get_num_threads())
    return out


def decode_rows(stream: Blob, first: int, out: Shaped[Tensor, "rows columns"], threads: int) -> None:
    """Codes of the rows from ``first`` on into ``out``, of a dtype that the stream :func:`fits`; others would wrap.

    Segments that the rows touch are decoded whole. Raises FormatError as :func:`decode` does.
    """
    native = _native.decode_int16 if out.dtype == torch.int16 else _native.decode_int8
    signed = out.view(torch.int8) if out.dtype == torch.uint8 else out  # the same eight bits
    _checked(native, stream, first, signed.numpy(), threads)


def fits(stream: Blob, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds every code that the stream's tables and exceptions allow. Raises FormatError."""
    least, largest = (0, 0) if dtype == torch.int16 else _checked(_native.code_range, stream)
    return bool(_LIMITS[dtype][0] <= least and largest <= _LIMITS[dtype][1])


def segment_rows(stream: Blob) -> int:
    """Rows that are decoded together at least: those of a segment. Raises FormatError."""
    shape(stream)
    return int.from_bytes(stream[_BLOCK].numpy().tobytes(), "little")


def shape(stream: Blob) -> tuple[int, int]:
    """Rows and columns of a stream, with every header and size in it checked; raises FormatError. Decodes nothing."""
    rows, columns = _checked(_native.shape, stream)
    return rows, columns


def cost(histogram: Int[np.ndarray, "symbols"]) -> float:
    """Bytes that codes with this histogram will take as one panel, tables and segments included, without encoding.

    ``histogram[i]`` counts the i-th of consecutive integers. Within about 0.3 % for codes in random order. Cost about a
    millisecond.
    """
    counts = np.ascontiguousarray(histogram, dtype=np.uint64)
    lowest = -min(len(counts) // 2, 32768)  # where it lies changes nothing
    *_, bits = _native.plan(counts, lowest)
    return HEAD_BYTES + math.ceil(int(counts.sum()) / SEGMENT) * SEGMENT_BYTES + bits / 8


def _checked(native, stream: Blob, *arguments):  # type: ignore[no-untyped-def]
    """A native call on a stream; what it finds wrong becomes a FormatError."""
    blob = stream.detach().cpu().contiguous().numpy()
    try:
        return native(blob, *arguments)
    except ValueError as error:
        raise FormatError(
            f"this is no stream of codes: {error}",
            where=f"{blob.size} bytes",
            why="Nothing of it was decoded.",
            fix="read the file again; if its digest differs, it was altered",
        ) from error
