"""Rows of low-bit matrices: what a model stacks into one matrix, other files hold as two, and the other way round.

Codes and scales are moved as they are; nothing is decoded or rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from lowbit.arrays import Tensor
from lowbit.errors import FormatError
from lowbit.formats.blocks import ALL, Block
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import (
    Affine,
    Columns,
    Gathered,
    Lookup,
    LowRank,
    QTensor,
    Raw,
    Rotated,
    Sum,
    build,
)
from lowbit.formats.spec import Spec

_PER_BLOCK = ("scale", "zero")
"""Fields with one value a block."""


def hollow(spec: Spec) -> QTensor:
    """A tree of this spec whose parts have no data (meta device): what can be asked of a model without its weights."""
    empty = {
        path: torch.empty(leaf.shape, dtype=getattr(torch, leaf.dtype), device="meta")
        for path, leaf in spec.paths().items()
    }
    return build(spec, empty)


def take_rows(q: QTensor, rows: slice) -> QTensor:
    """The rows of a matrix as a matrix of its own: ``take_rows(q, rows).decode() == q.decode(rows=rows)``.

    Raises FormatError where its blocks reach over several rows, so that a part would need other scales.
    """
    if rows == ALL:
        return q
    count = len(range(*rows.indices(q.shape[0])))
    shape = (count, *q.shape[1:])
    match q:
        case Raw(data=data):
            return Raw(shape, data if data.shape[0] == 1 else data[rows].contiguous())
        case Affine() | Lookup():
            changed: dict[str, Any] = {n: _per_block(q, getattr(q, n), rows) for n in _PER_BLOCK if hasattr(q, n)}
            codes = dataclasses.replace(q.codes, data=q.codes.data[rows].contiguous())
            return dataclasses.replace(q, shape=shape, codes=codes, **changed)
        case Sum(terms=terms):
            return Sum(shape, tuple(take_rows(term, rows) for term in terms))
        case Columns() | Rotated() | Gathered():
            return dataclasses.replace(q, shape=shape, inner=take_rows(q.inner, rows))
        case LowRank(a=a):
            return dataclasses.replace(q, shape=shape, a=a[rows].contiguous())
    raise FormatError(f"some rows of a {type(q).__name__} are no matrix of their own", where=f"rows {rows}")


def stack_rows(parts: Sequence[QTensor]) -> QTensor:
    """Matrices of one kind above each other as one; the inverse of :func:`take_rows`.

    Raises FormatError where they differ in more than rows, or share scales over several rows.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({type(part) for part in parts}) > 1:
        raise FormatError("matrices of different kinds cannot be stacked", where=type(first).__name__)
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    if all(isinstance(part, Raw) for part in parts):
        return Raw(shape, torch.cat([part.decode(part.data.dtype) for part in parts if isinstance(part, Raw)]))
    alike = [part for part in parts if isinstance(part, Affine | Lookup)]
    if len(alike) < len(parts) or len({(str(p.block), p.codes.levels, p.shape[1]) for p in alike}) > 1:
        raise FormatError("matrices of these formats cannot be stacked", where=type(first).__name__)
    block, names = alike[0].block, [name for name in _PER_BLOCK if hasattr(first, name)]
    if block == Block("tensor"):
        changed: dict[str, Any] = {name: _shared(alike, name) for name in names}
    else:
        changed = {name: _stacked(alike, name) for name in names}
        if not block.follows_rows and any(value is not None for value in changed.values()):
            raise FormatError("blocks reach over several rows", where=str(block))
    codes = dataclasses.replace(alike[0].codes, data=torch.cat([p.codes.data for p in alike]))
    return dataclasses.replace(alike[0], shape=shape, codes=codes, **changed)


def _per_block(q: Affine | Lookup, value: QTensor | Codes | None, rows: slice) -> QTensor | Codes | None:
    """Scales or zeros of some rows."""
    if value is None or q.block == Block("tensor"):
        return value
    if not q.block.follows_rows:
        raise FormatError("blocks reach over several rows", where=str(q.block))
    if isinstance(value, QTensor):
        return take_rows(value, rows)
    zeros = value.unpack().view(q.block.count(q.shape))[rows]
    return Codes.of(zeros.reshape(1, -1), value.levels)


def _shared(parts: Sequence[Affine | Lookup], name: str) -> QTensor | Codes | None:
    """The one scale or zero that all of them have; raises FormatError where each has its own."""
    values = [getattr(part, name) for part in parts]
    if all(value is None for value in values):
        return None
    numbers = [v.decode() if isinstance(v, QTensor) else v.unpack() for v in values if v is not None]
    if len(numbers) < len(values) or not all(torch.equal(n, numbers[0]) for n in numbers):
        raise FormatError(f"each has a {name} of its own for all its rows", where="tensor")
    first: QTensor | Codes = values[0]
    return first


def _stacked(parts: Sequence[Affine | Lookup], name: str) -> QTensor | Codes | None:
    values = [getattr(part, name) for part in parts]
    if all(value is None for value in values):
        return None
    if all(isinstance(value, QTensor) for value in values):
        return stack_rows(values)
    if all(isinstance(value, Codes) for value in values):
        zeros: list[Tensor] = [value.unpack() for value in values]
        return Codes.of(torch.cat(zeros, dim=1), values[0].levels)
    raise FormatError(f"some have stored {name}s and some have none", where=type(parts[0]).__name__)
