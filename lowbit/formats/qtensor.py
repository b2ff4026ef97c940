"""QTensor: what a low-bit tensor *is*, an immutable expression tree; every node, and ``build`` from a spec.

    Raw(data)                                    values as stored
    Affine(codes, scale, zero, block)            scale * (codes - zero)
    Offset(codes, scale, offset, block)          scale * codes + offset
    Lookup(codes, table, scale, block)           scale * table[codes]
    Sum(terms)                                   the sum of its terms
    Columns(index, inner)                        some columns, zero elsewhere
    Sparse(starts, index, data)                  some single weights, zero elsewhere
    LowRank(a, b)                                a @ b
    Rotated(signs, inner, size)                  inner acts on inputs rotated by a signed Hadamard matrix
    Gathered(index, scale, inner)                inner acts on inputs picked, scaled and added in pairs
    Nested(inner, bits, extra)                   8-bit codes read at their upper ``bits``
    Coded(stream, steps, gains, ...)             entropy-coded whole numbers, a step a column, a gain a row

Sizes are derived from the leaves, never declared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lowbit.arrays import Tensor
from lowbit.errors import FormatError
from lowbit.formats.blocks import Block
from lowbit.formats.nodes import Affine, Columns, Lookup, Raw, Sum
from lowbit.formats.nodes_coded import Coded
from lowbit.formats.nodes_inputs import Gathered, Rotated
from lowbit.formats.nodes_nested import Nested
from lowbit.formats.nodes_offset import Offset
from lowbit.formats.nodes_terms import LowRank, Sparse
from lowbit.formats.pack import Codes
from lowbit.formats.spec import Leaf, Spec
from lowbit.formats.tree import Part, QTensor

__all__ = [
    "NODES", "Affine", "Coded", "Columns", "Gathered", "Lookup", "LowRank", "Nested", "Offset", "Part", "QTensor",
    "Raw", "Rotated", "Sparse", "Sum", "build",
]  # fmt: skip

NODES: dict[str, type[QTensor]] = {
    cls.__name__: cls
    for cls in (Raw, Affine, Offset, Lookup, Sum, Columns, Sparse, LowRank, Rotated, Gathered, Nested, Coded)
}  # fmt: skip


def _floats(v: Any) -> bool:
    return isinstance(v, Tensor) and v.is_floating_point()


def _integers(v: Any) -> bool:
    return isinstance(v, Tensor) and v.dtype in (torch.int16, torch.int32, torch.int64)


def _number(v: Any) -> bool:
    return type(v) is float or (type(v) is int and abs(v) < 1 << 31)  # JSON may spell a float without its point


_KINDS: dict[str, Callable[[Any], bool]] = {  # what a field may hold, whatever its node
    "data": _floats,
    "a": _floats,
    "b": _floats,
    "index": _integers,
    "starts": _integers,
    "table": lambda v: isinstance(v, str) or _floats(v),
    "codes": lambda v: isinstance(v, Codes),
    "signs": lambda v: isinstance(v, Codes),
    "zero": lambda v: isinstance(v, Codes | QTensor),
    "block": lambda v: isinstance(v, Block),
    "scale": lambda v: isinstance(v, QTensor),
    "offset": lambda v: isinstance(v, QTensor),
    "inner": lambda v: isinstance(v, QTensor),
    "terms": lambda v: isinstance(v, tuple),
    "size": lambda v: type(v) is int,
    "bits": lambda v: type(v) is int,
    "extra": lambda v: type(v) is bool,
    "stream": lambda v: isinstance(v, Tensor) and v.dtype == torch.uint8,
    "steps": lambda v: isinstance(v, Codes),
    "gains": lambda v: isinstance(v, Codes),
    "base": _number,
    "step_octaves": _number,
    "gain_octaves": _number,
}
_OPTIONAL = {("Affine", "zero"), ("Lookup", "scale"), ("Coded", "steps"), ("Coded", "gains")}


def build(spec: Spec, parts: Mapping[str, Tensor], prefix: str = "") -> QTensor:
    """The tree of ``spec`` over stored tensors; the inverse of ``spec`` and ``parts``.

    Raises FormatError when a part is missing or has another shape or dtype than the spec says, and when the tree
    itself makes no sense (see ``problem``): no later decode of it can fail or read outside of its parts.
    """
    where = f"{prefix}{spec.node} {spec.shape}"
    if spec.node not in NODES:
        raise FormatError(f"unknown node {spec.node!r}", where=where, fix=f"one of {', '.join(NODES)}")
    if len(spec.shape) != 2:
        raise FormatError(f"shape {spec.shape} is no matrix", where=where)
    values: dict[str, Any] = dict(spec.static)
    for leaf in spec.leaves:
        values[leaf.name] = _leaf(leaf, parts, prefix + leaf.name, where)
    children = {name: build(child, parts, f"{prefix}{name}.") for name, child in spec.children}
    if spec.node == "Sum" and list(children) == [str(i) for i in range(len(children))]:
        values["terms"] = tuple(children.values())
    else:
        values |= children
    if isinstance(values.get("block"), str):
        values["block"] = Block.parse(values["block"])
    cls = NODES[spec.node]
    expected = {f.name for f in dataclasses.fields(cls)} - {"shape"}
    if unknown := set(values) - expected:
        raise FormatError(f"no field {sorted(unknown)}", where=where, fix=f"one of {sorted(expected)}")
    for name in expected:
        value = values.setdefault(name, None)
        if not _KINDS[name](value) and not (value is None and (spec.node, name) in _OPTIONAL):
            found = "missing" if value is None else f"{type(value).__name__} {getattr(value, 'dtype', '')}"
            raise FormatError(f"{name} is of the wrong kind: {found.strip()}", where=where)
    tree = cls(shape=spec.shape, **values)
    if problem := tree.problem():
        raise FormatError(problem, where=where, why="these bytes are not the tensor that they claim to be")
    return tree


def _leaf(leaf: Leaf, parts: Mapping[str, Tensor], path: str, where: str) -> Tensor | Codes:
    if path not in parts:
        raise FormatError(f"part {path!r} is missing", where=where)
    data = parts[path]
    found = (str(data.dtype).removeprefix("torch."), tuple(data.shape))
    if found != (leaf.dtype, leaf.shape):
        raise FormatError(f"part {path!r} is {found}, the spec says {(leaf.dtype, leaf.shape)}", where=where)
    if leaf.levels is None:
        return data
    if data.dtype != torch.uint8 or data.dim() != 2:
        raise FormatError(f"packed codes are no matrix of bytes: {found}", where=where)
    return Codes(data, leaf.columns or 0, leaf.levels)
