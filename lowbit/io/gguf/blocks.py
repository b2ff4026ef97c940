"""ggml blocks as QTensors and back, bit for bit.

    unpack("q4_k", bytes, columns)   -> QTensor that decodes to what the ``gguf`` package computes
    pack(q, "q4_k")                  -> bytes, or ExportError where blocks of that type cannot have its values
    smallest(q, ...)                 -> the type of fewest bytes that can, and the bytes

    q4_0 q5_0 q8_0  q3_k q6_k  tq2_0     Affine      (K-quants: its scale is an Affine, too)
    q4_1 q5_1  q2_k q4_k q5_k            Offset      (K-quants: scale and offset are Affines)
    iq4_nl iq4_xs  tq1_0  mxfp4          Lookup of iq4nl, ternary, e2m1

Packing changes how numbers are written, never what they are: every packed matrix is unpacked again and compared.
"""

from __future__ import annotations

import numpy as np
import torch

from lowbit.arrays import Float, Tensor, UInt8
from lowbit.errors import CheckpointError, ExportError, nearest
from lowbit.formats.blocks import Block
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import Affine, Lookup, Offset, QTensor, Raw
from lowbit.io.gguf.fields import KINDS, Blocks, Field, Kind, Numbers

Coded = Affine | Offset | Lookup
"""Nodes that have codes and scales of blocks."""
_FINITE = np.uint16(0x7C00)  # the exponent of float16 numbers that are infinite or NaN
_NAN_POWER = 255


def unpack(name: str, data: UInt8[Tensor, "rows bytes"], columns: int) -> QTensor:
    """The matrix of untrusted blocks, row by row. Raises CheckpointError for types and values that are none.

    Cost O(rows * columns), a few bytes a weight of scratch.
    """
    kind = _kind(name, CheckpointError)
    rows = data.shape[0]
    if columns % kind.values or data.shape[1] != columns // kind.values * kind.nbytes:
        raise CheckpointError(f"rows of {data.shape[1]} bytes are no {columns} weights", where=kind.name)
    shape, block = (rows, columns), Block("group", (kind.group,))
    blocks = data.contiguous().numpy().reshape(-1, kind.nbytes)
    codes = _codes(kind.codes, blocks, shape, kind.levels)
    if kind.name == "mxfp4":
        powers = blocks[:, :1].reshape(rows, -1)
        if (powers == _NAN_POWER).any():
            raise CheckpointError("a block's power of two is NaN", where=kind.name)
        exponents = Codes(torch.from_numpy(powers.copy()), powers.shape[1], 255)
        return Lookup(shape, codes, kind.table, Lookup(powers.shape, exponents, "e8m0", None, _ALL), block)
    scale = _scale(kind, blocks, rows, kind.scale, kind.scales)
    if kind.offset is not None:
        offset = _scale(kind, blocks, rows, kind.offset, kind.offsets, minus=True)
        return Offset(shape, codes, scale, offset, block)
    if kind.table or kind.levels == 3:
        return Lookup(shape, codes, kind.table or "ternary", scale, block)
    zero = None if kind.zero == kind.levels // 2 else _same(kind.zero, block.count(shape))
    return Affine(shape, codes, scale, zero, block)


def smallest(*together: QTensor) -> tuple[str, list[UInt8[Tensor, "rows bytes"]]]:
    """The type of fewest bytes that has the values of all, preferably with codes of as many levels, and their blocks.

    Raises ExportError with what is in the way of each type. Cost a packing, and two decodings, for each type tried.
    """
    first = together[0]
    levels = first.codes.levels if isinstance(first, Coded) else 0
    reasons: dict[str, str] = {}
    for kind in sorted(KINDS.values(), key=lambda k: (k.levels != levels, k.nbytes / k.values)):
        packed = []
        for q in together:
            if isinstance(attempt := _attempt(q, kind), str):
                reasons.setdefault(attempt, kind.name)
                break
            packed.append(attempt)
        else:
            return kind.name, packed
    raise ExportError(
        "no ggml block type has these values", where=_describe(first),
        why="; ".join(f"{name}: {reason}" for reason, name in reasons.items()),
        fix="a recipe with q4_0, q4_1, q8_0 or integers in groups of 32; or decoded: gguf:f16",
    )  # fmt: skip


def pack(q: QTensor, name: str) -> UInt8[Tensor, "rows bytes"]:
    """The blocks of type ``name`` that decode to the very values of ``q``; raises ExportError where there are none."""
    packed = _attempt(q, kind := _kind(name, ExportError))
    if isinstance(packed, str):
        raise ExportError(
            f"{kind.name} cannot have these values: {packed}",
            where=_describe(q),
            fix="gguf, which picks a type, or gguf:f16",
        )
    return packed


def _attempt(q: QTensor, kind: Kind) -> UInt8[Tensor, "rows bytes"] | str:
    """The blocks, or why there are none."""
    rows, columns = q.shape
    if columns % kind.values:
        return f"rows of {columns} weights are no multiple of {kind.values}"
    blocks = np.zeros((rows * columns // kind.values, kind.nbytes), np.uint8)
    if problem := _fill(q, kind, blocks):
        return problem
    packed = torch.from_numpy(blocks.reshape(rows, -1))
    same = torch.equal(unpack(kind.name, packed, columns).decode(), q.decode())
    return packed if same else "its scales or offsets are no float16 numbers of such blocks"


def _fill(q: QTensor, kind: Kind, blocks: Blocks) -> str:
    """Write what should be the blocks of ``q``; returns why that cannot be, if it is plain to see."""
    if kind.table:
        if not isinstance(q, Lookup) or q.table != kind.table or q.scale is None:
            return f"they are no {kind.table} values"
        kind.codes.put(blocks, q.codes.unpack().numpy().reshape(len(blocks), -1))
        if kind.name == "mxfp4":
            if not isinstance(q.scale, Lookup) or q.scale.table != "e8m0" or q.block != Block("group", (kind.values,)):
                return "scales are no powers of two"
            blocks[:, 0] = q.scale.codes.unpack().numpy().reshape(-1)
            return ""
        return _put_scale(q.scale, q, kind, blocks, kind.scale, kind.scales)
    if kind.offset is not None:
        return _fill_offset(q, kind, blocks, kind.offset)
    found = _whole(q)
    if isinstance(found, str):
        return found
    numbers, scale = found
    low, high = int(numbers.min()) + kind.zero, int(numbers.max()) + kind.zero
    if low < 0 or high >= kind.levels:
        return f"codes reach from {low} to {high}"
    kind.codes.put(blocks, numbers.add_(kind.zero).to(torch.uint8).numpy().reshape(len(blocks), -1))
    assert isinstance(q, Coded)  # by its whole numbers
    return _put_scale(scale, q, kind, blocks, kind.scale, kind.scales)


def _fill_offset(q: QTensor, kind: Kind, blocks: Blocks, at: int) -> str:
    if isinstance(q, Offset) and q.codes.levels <= kind.levels:
        kind.codes.put(blocks, q.codes.unpack().numpy().reshape(len(blocks), -1))
        problem = _put_scale(q.scale, q, kind, blocks, kind.scale, kind.scales)
        return problem or _put_scale(q.offset, q, kind, blocks, at, kind.offsets, True)
    if not isinstance(q, Affine) or q.codes.levels > kind.levels or kind.coded:
        return f"they are no {kind.levels} levels above an offset"
    kind.codes.put(blocks, q.codes.unpack().numpy().reshape(len(blocks), -1))
    step = q.scale.decode()
    zero = _zero(q)
    offset = Raw.of(-step * zero if zero.numel() > 1 else -step * zero.expand_as(step))
    return _put_scale(q.scale, q, kind, blocks, kind.scale, None) or _put_scale(offset, q, kind, blocks, at, None)


def _whole(q: QTensor) -> tuple[Float[Tensor, "out in"], QTensor] | str:
    """The whole numbers that a scale multiplies, and the scale; or why there are none."""
    if isinstance(q, Lookup) and q.table == "ternary" and q.scale is not None:
        return q.codes.unpack().to(torch.float32).sub_(1), q.scale
    if not isinstance(q, Affine):
        return "they are no whole numbers times a scale"
    zero = _zero(q)
    if (zero != zero.round()).any():
        return "zeros are no whole numbers"
    return q.codes.unpack().to(torch.float32).sub_(q.block.spread(zero, q.shape)), q.scale


def _zero(q: Affine) -> Float[Tensor, "rows columns"]:
    if q.zero is None:
        return torch.full((1, 1), float(q.codes.levels // 2)).expand(q.block.count(q.shape))
    if isinstance(q.zero, Codes):
        return q.zero.unpack().view(q.block.count(q.shape)).to(torch.float32)
    return q.zero.decode()


def _put_scale(
    scale: QTensor, q: Coded, kind: Kind, blocks: Blocks, at: int, field: Field | None, minus: bool = False
) -> str:
    """Write scales (or offsets) as float16 at byte ``at``, and whole numbers of them into ``field``."""
    if field is None or kind.coded is None:
        values = q.block.spread(scale.decode(), q.shape).expand(q.shape)[:, :: kind.values]
    else:
        each, per = kind.coded.each, kind.values // kind.coded.each
        if not isinstance(scale, Affine) or scale.block != Block("group", (per,)) or q.block != Block("group", (each,)):
            return f"its scales are no whole numbers times a scale of {kind.values} weights"
        numbers = scale.codes.unpack().to(torch.float32).sub_(scale.block.spread(_zero(scale), scale.shape))
        numbers += kind.coded.zero
        if int(numbers.min()) < 0 or int(numbers.max()) >= kind.coded.levels or (numbers != numbers.round()).any():
            return f"whole numbers of its scales are none of {kind.coded.levels}"
        field.put(blocks, numbers.to(torch.uint8).numpy().reshape(len(blocks), per))
        values = scale.scale.decode() * (-1 if minus else 1)
    halves = values.to(torch.float16).contiguous().numpy().view(np.uint8)
    blocks[:, at : at + 2] = halves.reshape(len(blocks), 2)
    return ""


def _scale(kind: Kind, blocks: Blocks, rows: int, at: int, field: Field | None, minus: bool = False) -> QTensor:
    """Scales, or with ``minus`` offsets, which coded ones subtract, of all blocks."""
    bits = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.uint16).reshape(rows, -1)
    if (bits & _FINITE == _FINITE).any():
        raise CheckpointError("the scale of a block is infinite or NaN", where=kind.name)
    half = torch.from_numpy(bits.view(np.float16))
    if field is None or kind.coded is None:
        return Raw.of(half)
    per = kind.values // kind.coded.each
    shape, block = (rows, half.shape[1] * per), Block("group", (per,))
    codes = _codes(field, blocks, shape, kind.coded.levels)
    zero = _same(0, block.count(shape)) if kind.coded.zero == 0 else None
    return Affine(shape, codes, Raw.of(-half if minus else half), zero, block)


def _codes(field: Field, blocks: Blocks, shape: tuple[int, int], levels: int) -> Codes:
    numbers: Numbers = field.get(blocks)
    return Codes.of(torch.from_numpy(np.ascontiguousarray(numbers).reshape(shape)), levels)


def _same(value: int, shape: tuple[int, int]) -> Raw:
    """One value for all blocks."""
    return Raw(shape, torch.full((1, 1), value, dtype=torch.float16))


def _kind(name: str, error: type[CheckpointError | ExportError]) -> Kind:
    if name not in KINDS:
        raise error(f"the type {name!r} is not read or written", fix=nearest(name, KINDS))
    return KINDS[name]


def _describe(q: QTensor) -> str:
    levels = f" of {q.codes.levels} levels in {q.block}" if isinstance(q, Coded) else ""
    return f"{type(q).__name__} {q.shape}{levels}"


_ALL = Block("tensor")
