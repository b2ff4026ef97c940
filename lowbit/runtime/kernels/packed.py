"""Packed weights on a CPU: codes of 1 to 8 bits, and 16-bit numbers, made float32 in registers (``native/packed*``).

What a call reads is the stored codes and scales, once for all its tokens. A weight becomes the very float32 that plain
decoding gives; inputs and sums are float32 too, and a token's output does not depend on how many others the call has,
up to ``FEW_TOKENS``. Beyond, panels of rows are decoded into a buffer that stays in cache and multiplied by torch.
Several weights of one input are multiplied in one call (:func:`together`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from lowbit import _native
from lowbit.arrays import Float, Tensor
from lowbit.formats.blocks import Block
from lowbit.formats.pack import Codes, bits_for
from lowbit.formats.qtensor import Affine, Lookup, Offset, QTensor, Raw
from lowbit.formats.spec import Spec
from lowbit.formats.tables import table_values

FEW_TOKENS = 32  # beyond this many, decoding panels is faster
CHUNK = 16  # columns that are unpacked together: groups begin at multiples of it
PANEL_WEIGHTS = 1 << 19
"""Of a decoded panel: 2 MB."""
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class State:
    """A weight as native code reads it: the tree's own codes, and scales a group where they are not so stored."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, int]
    native: Any

    @property
    def key(self) -> tuple[torch.dtype, torch.device]:
        return self.dtype, self.device


@dataclass(frozen=True)
class Packed:
    """Integers, with zeros or least values or without, and tables; a scale a group, row or tensor; 16-bit numbers."""

    name: str = "packed"
    prepared: bool = True
    tolerance: float = 2e-2
    """That of bfloat16, whose reference rounds its weights; in float32 only the order of sums differs."""

    def takes(self, spec: Spec, x: Tensor) -> bool:
        plain = x.device.type == "cpu" and x.dtype in _DTYPES and x.numel() > 0
        return plain and not x.requires_grad and _fits(spec)

    def prepare(self, q: QTensor, dtype: torch.dtype) -> State:
        """Cost: decoding the scales where they are coded themselves; codes stay where they are."""
        if isinstance(q, Raw):
            return halves(q.data, dtype)
        assert isinstance(q, Affine | Offset | Lookup)
        rows, columns = q.shape
        group = q.block.within_row(columns)
        assert group is not None
        shape, bits = (rows, -(-columns // group)), bits_for(q.codes.levels)
        scale = torch.ones(1, 1) if q.scale is None else _numbers(q.scale, shape)
        zero = offset = None
        table = torch.arange(1 << bits, dtype=torch.float32)
        match q:
            case Lookup():
                values = q.table if isinstance(q.table, Tensor) else torch.tensor(table_values(q.table))
                table = values.to(torch.float32)[: 1 << bits].contiguous()
            case Offset():
                offset = _numbers(q.offset, shape)
            case Affine(zero=None):
                table -= q.codes.levels // 2
            case Affine(zero=Codes() as zeros):
                zero = _arranged(zeros.unpack().view(q.block.count(q.shape)), shape)
            case Affine(zero=QTensor() as tree):
                zero = _numbers(tree, shape)
        codes = q.codes.data.contiguous()
        native = _native.Packed(codes, columns, bits, group, scale, zero, offset, table)
        return State(dtype, codes.device, (rows, columns), native)

    def run(self, x: Float[Tensor, "*batch in"], state: State) -> Float[Tensor, "*batch out"]:
        if x.numel() <= FEW_TOKENS * state.shape[1]:
            return together(x, (state,))[0]
        return _many(x.reshape(-1, x.shape[-1]), state).view(*x.shape[:-1], state.shape[0])


def halves(weight: Float[Tensor, "out in"], dtype: torch.dtype) -> State:
    """A weight of float16 or bfloat16 as it is, for inputs of ``dtype``."""
    data = weight.detach().contiguous()
    return State(dtype, data.device, (data.shape[0], data.shape[1]), _native.Packed(data))


def together(x: Float[Tensor, "*batch in"], states: Sequence[State]) -> list[Float[Tensor, "*batch _out"]]:
    """The products of one input of at most ``FEW_TOKENS`` with several weights, in one parallel region.

    Each is to the bit what it is alone.
    """
    inputs = x if x.dtype is torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
    lead = x.shape[:-1]
    tokens = math.prod(lead)
    sizes = [tokens * state.shape[0] for state in states]
    y = torch.empty(sum(sizes), dtype=torch.float32)
    natives, none = tuple([state.native for state in states]), (0,) * len(states)
    _native.packed_multiply(
        natives, none, inputs.data_ptr(), inputs.numel(), y.data_ptr(), y.numel(), torch.get_num_threads()
    )
    y = y if x.dtype is torch.float32 else y.to(x.dtype)
    parts = (y,) if len(states) == 1 else torch.split_with_sizes(y, sizes)
    return [part.view(*lead, state.shape[0]) for part, state in zip(parts, states, strict=True)]


def _many(x: Float[Tensor, "tokens in"], s: State) -> Float[Tensor, "tokens out"]:
    """In the dtype of the inputs, as the reference multiplies."""
    rows, columns = s.shape
    y = x.new_empty(x.shape[0], rows)
    height = max(CHUNK, PANEL_WEIGHTS // columns)
    buffer = _buffer(min(height, rows) * columns).view(-1, columns)
    for first in range(0, rows, height):
        panel = buffer[: rows - first]
        s.native.decode(first, panel.numpy(), torch.get_num_threads())
        y[:, first : first + height] = linear(x, panel.to(x.dtype))
    return y


_held = threading.local()


def _buffer(numbers: int) -> Float[Tensor, "numbers"]:
    """Memory of this thread that is kept between calls: fresh pages would cost as much as decoding into them."""
    held: Tensor | None = getattr(_held, "numbers", None)
    if held is None or len(held) < numbers:
        held = _held.numbers = torch.empty(numbers)
    return held[:numbers]


def _fits(spec: Spec) -> bool:
    data = spec.leaf("data")
    if spec.node == "Raw" and data is not None:
        return data.dtype in ("float16", "bfloat16") and data.shape == spec.shape and len(spec.shape) == 2
    codes = spec.leaf("codes")
    if spec.node not in ("Affine", "Offset", "Lookup") or codes is None or not bits_for(codes.levels or 2):
        return False
    group = Block.parse(str(spec.get("block"))).within_row(spec.shape[1])
    return group is not None and (group % CHUNK == 0 or group >= spec.shape[1])


def _numbers(q: QTensor, shape: tuple[int, int]) -> Float[Tensor, "rows groups"]:
    """A scale, zero or offset for every group of a row, in the dtype that it is stored in where that can be read."""
    stored = isinstance(q, Raw) and q.data.dtype == torch.float16
    return _arranged(q.data.expand(q.shape) if isinstance(q, Raw) and stored else q.decode(), shape)


def _arranged(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """One value a block as one a group of a row: flat blocks that fill rows are groups, listed row by row."""
    filled = values.reshape(shape) if values.numel() == shape[0] * shape[1] else values.expand(shape)
    return filled.contiguous()


PACKED = Packed()
