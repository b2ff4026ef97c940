"""Packed weights on a CPU: codes of 1 to 8 bits, unpacked in registers as they are multiplied (``native/packed*``).

What a call reads is the stored codes and scales, once for all its tokens. A weight becomes the very float32 that plain
decoding gives; inputs and sums are float32 too, and a token's output does not depend on how many others the call has,
up to ``FEW_TOKENS``. Beyond, panels of rows are decoded into a buffer that stays in cache and multiplied by torch.
"""

from __future__ import annotations

import threading
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
    """Integers, with zeros or least values or without, and tables; a scale a group, row or tensor."""

    name: str = "packed"
    prepared: bool = True
    tolerance: float = 2e-2
    """That of bfloat16, whose reference rounds its weights; in float32 only the order of sums differs."""

    def takes(self, spec: Spec, x: Tensor) -> bool:
        plain = x.device.type == "cpu" and x.dtype in _DTYPES and x.numel() > 0
        return plain and not x.requires_grad and _fits(spec)

    def prepare(self, q: QTensor, dtype: torch.dtype) -> State:
        """Cost: decoding the scales where they are coded themselves; codes stay where they are."""
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
        flat = x.reshape(-1, x.shape[-1])
        y = _few(flat, state) if flat.shape[0] <= FEW_TOKENS else _many(flat, state)
        return y.view(*x.shape[:-1], state.shape[0])


def _few(x: Float[Tensor, "tokens in"], s: State) -> Float[Tensor, "tokens out"]:
    inputs = x.to(torch.float32).contiguous()
    y = inputs.new_empty(x.shape[0], s.shape[0])
    s.native.multiply(inputs.numpy(), y.numpy(), torch.get_num_threads())
    return y.to(x.dtype)


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
