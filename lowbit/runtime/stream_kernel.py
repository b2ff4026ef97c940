"""The kernel of weights that are only passing through: a row, or a panel of rows, is decoded at a time.

Nothing made from a weight outlives the call, and no decoded copy of it ever exists. Integers and tables of 1-8 bits
with a scale a group, row or tensor run natively (``native/grouped.cpp``), entropy-coded weights by their own kernel;
everything else decodes panels in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from lowbit import _native
from lowbit.arrays import Float, Tensor, UInt8
from lowbit.formats.pack import Codes, bits_for
from lowbit.formats.qtensor import Affine, Coded, Columns, Lookup, QTensor, Sum
from lowbit.formats.spec import Spec
from lowbit.formats.tables import table_values
from lowbit.runtime.kernels.coded import CODED, FEW_TOKENS

PANEL = 256  # rows


@dataclass(frozen=True)
class Panels:
    """Takes every tree; exact weights, sums in another order than the reference's."""

    name: str = "panels"
    prepared: bool = False
    tolerance: float = 1e-5

    def takes(self, spec: Spec, x: Tensor) -> bool:
        return x.device.type == "cpu"

    def prepare(self, q: QTensor, dtype: torch.dtype) -> QTensor:
        return q

    def run(self, x: Float[Tensor, "*batch in"], state: QTensor) -> Float[Tensor, "*batch out"]:
        """``x Wᵀ`` in float32, then cast. Scratch: PANEL rows, or one row a thread."""
        flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
        return _product(flat, state).to(x.dtype).view(*x.shape[:-1], state.shape[0])


PANELS = Panels()


def _product(x: Float[Tensor, "tokens in"], q: QTensor) -> Float[Tensor, "tokens out"]:
    if isinstance(q, Sum):
        y = _product(x, q.terms[0])
        for term in q.terms[1:]:
            y += _product(x, term)
        return y
    if isinstance(q, Coded):
        return CODED.run(x, CODED.prepare(q, x.dtype))
    if isinstance(q, Columns):
        return _product(x[:, q.index.long()].contiguous(), q.inner)
    rows, y = q.shape[0], x.new_empty(len(x), q.shape[0])
    grouped = _grouped(q)
    if grouped is not None and len(x) <= FEW_TOKENS:  # beyond, one dense product of a decoded panel is faster
        _native.grouped_multiply(x, *grouped, y, torch.get_num_threads())
        return y
    step = PANEL if grouped is not None or _sliceable(q) else rows
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        y[:, part] = linear(x, q.decode(rows=part) if grouped is None else _decode(grouped, part))
    return y


class Grouped(NamedTuple):
    """What the native code reads: packed codes and, for every group of a row, a scale and maybe a zero."""

    codes: UInt8[Tensor, "rows bytes"]
    columns: int
    bits: int
    group: int
    scale: Float[Tensor, "rows groups"]
    zero: Float[Tensor, "rows groups"] | None
    table: Float[Tensor, "levels"]


def _decode(g: Grouped, rows: slice) -> Float[Tensor, "rows in"]:
    zero = None if g.zero is None else g.zero[rows]
    out = torch.empty(rows.stop - rows.start, g.columns)
    part = g._replace(codes=g.codes[rows], scale=g.scale[rows], zero=zero)
    _native.grouped_decode(*part, out, torch.get_num_threads())
    return out


def _grouped(q: QTensor) -> Grouped | None:
    """A weight in the terms of the native code, or None where it has others."""
    if not isinstance(q, Affine | Lookup) or not (bits := bits_for(q.codes.levels)):
        return None
    group = q.block.within_row(q.shape[1])
    if group is None:
        return None
    if isinstance(q, Lookup):
        values = q.table if isinstance(q.table, Tensor) else torch.tensor(table_values(q.table))
        zero, table = None, values.to(torch.float32)
        scale = torch.ones(1, 1) if q.scale is None else q.scale.decode()
    else:
        table = torch.arange(1 << bits, dtype=torch.float32)
        scale = q.scale.decode()
        if isinstance(q.zero, Codes):
            zero = q.zero.unpack().view(scale.shape).to(torch.float32)
        else:
            zero = None if q.zero is None else q.zero.decode()
            table = table - q.codes.levels // 2 if zero is None else table
    shape = q.shape[0], -(-q.shape[1] // group)
    zero = None if zero is None else _spread(zero, shape)
    return Grouped(q.codes.data.contiguous(), q.shape[1], bits, group, _spread(scale, shape), zero, table)


def _spread(values: Float[Tensor, "a b"], shape: tuple[int, int]) -> Float[Tensor, "rows groups"]:
    if values.numel() == shape[0] * shape[1]:  # flat blocks that fill rows are groups, listed row by row
        return values.reshape(shape).contiguous()
    return values.expand(shape).contiguous()


def _sliceable(q: QTensor) -> bool:
    """Whether some rows can be decoded without decoding the others."""
    return not isinstance(q, Affine | Lookup) or q.block.follows_rows or q.block.kind == "tensor"
