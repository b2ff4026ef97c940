"""QTensor: what a low-bit tensor *is*, an immutable expression tree.

    Raw(data)                                    values as stored
    Affine(codes, scale, zero, block)            scale * (codes - zero)
    Lookup(codes, table, scale, block)           scale * table[codes]
    Sum(terms)                                   the sum of its terms
    Columns(index, inner)                        some columns, zero elsewhere

A scale is itself a QTensor, so double quantization, MX and NVFP4 are an ``Affine`` or ``Lookup`` whose scale is
coded. Every node is a frozen dataclass; a field is a leaf (``Tensor`` or ``Codes``), a child (``QTensor`` or a tuple
of them) or static data, and all traversals follow from that. Sizes are derived from the leaves, never declared.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.blocks import ALL, Block
from lowbit.formats.grids import table_values
from lowbit.formats.pack import Codes, reachable
from lowbit.formats.spec import Leaf, Spec


class Part(NamedTuple):
    """One stored leaf: its path in the tree, its bytes, and the bits that carry information."""

    path: str
    data: Tensor
    logical_bits: int


@dataclass(frozen=True, eq=False)
class QTensor(ABC):
    """A low-bit matrix of ``shape`` (out, in)."""

    shape: tuple[int, ...]

    @abstractmethod
    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        """The values that the codes stand for; computed in float32, then cast."""

    @abstractmethod
    def problem(self) -> str:
        """Why the fields do not fit together (kinds, dtypes, shapes), or nothing. Cost a few comparisons."""

    def parts(self) -> Iterator[Part]:
        """Every stored leaf once, in a fixed order."""
        for name, value in _fields(self):
            if isinstance(value, Codes):
                yield Part(name, value.data, value.logical_bits)
            elif isinstance(value, Tensor):
                yield Part(name, value, value.numel() * value.element_size() * 8)
            elif isinstance(value, QTensor):
                for part in value.parts():
                    yield part._replace(path=f"{name}.{part.path}")

    def spec(self) -> Spec:
        """The tree without its data: hashable, JSON, what kernels and exporters match on."""
        leaves, children, static = [], [], []
        for name, value in _fields(self):
            if isinstance(value, Codes):
                leaves.append(Leaf(name, "uint8", tuple(value.data.shape), value.columns, value.levels))
            elif isinstance(value, Tensor):
                leaves.append(Leaf(name, str(value.dtype).removeprefix("torch."), tuple(value.shape)))
            elif isinstance(value, QTensor):
                children.append((name, value.spec()))
            else:
                static.append((name, str(value) if isinstance(value, Block) else value))
        return Spec(type(self).__name__, self.shape, tuple(sorted(static)), tuple(leaves), tuple(children))

    def map(self, f: Callable[[Tensor], Tensor]) -> QTensor:
        """The same tree with ``f`` applied to every stored tensor (move, pin, clone)."""
        return build(self.spec(), {part.path: f(part.data) for part in self.parts()})

    @property
    def nbytes(self) -> int:
        return sum(part.data.numel() * part.data.element_size() for part in self.parts())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@dataclass(frozen=True, eq=False)
class Raw(QTensor):
    """Values as stored; data of size 1 in a dimension stands for the whole of it."""

    data: Tensor

    @classmethod
    def of(cls, data: Tensor) -> Raw:
        return cls(tuple(data.shape), data)

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Tensor:
        return self.data.expand(self.shape)[rows].to(dtype)

    def problem(self) -> str:
        fits = all(n in (1, m) for n, m in zip(self.data.shape, self.shape, strict=True))
        return "" if fits else f"data has shape {tuple(self.data.shape)}"


@dataclass(frozen=True, eq=False)
class Affine(QTensor):
    """``w = scale * (q - zero)``; without stored zeros, ``zero = levels / 2`` (a symmetric grid)."""

    codes: Codes
    scale: QTensor
    zero: Codes | None
    block: Block

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        q = self.codes.unpack(rows).to(torch.float32)
        scale_rows = rows if self.block.follows_rows else ALL
        scale = self.scale.decode(rows=scale_rows)  # (block rows, block columns)
        if self.zero is None:
            return _apply(self.block, self.shape, rows, q.sub_(self.codes.levels // 2), scale, None).to(dtype)
        zero = self.zero.unpack().view(self.block.count(self.shape))[scale_rows].to(torch.float32)
        return _apply(self.block, self.shape, rows, q, scale, zero).to(dtype)

    def problem(self) -> str:
        if problem := self.codes.problem(*self.shape) or _scale_problem(self.scale, self.block, self.shape):
            return problem
        if self.zero is None:
            return ""
        if self.zero.levels != self.codes.levels:
            return f"zeros of {self.zero.levels} levels, codes of {self.codes.levels}"
        return self.zero.problem(1, math.prod(self.block.count(self.shape)))


@dataclass(frozen=True, eq=False)
class Lookup(QTensor):
    """``w = scale * table[q]``; a table is named, or stored with the tensor; no scale means one."""

    codes: Codes
    table: str | Tensor
    scale: QTensor | None
    block: Block

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        table = self.table if isinstance(self.table, Tensor) else torch.tensor(table_values(self.table))
        values = table.to(self.codes.data.device, torch.float32)[self.codes.unpack(rows).to(torch.int32)]
        if self.scale is None:
            return values.to(dtype)
        scale = self.scale.decode(rows=rows if self.block.follows_rows else ALL)
        return _apply(self.block, self.shape, rows, values, scale, None).to(dtype)

    def problem(self) -> str:
        try:
            values = len(table_values(self.table) if isinstance(self.table, str) else self.table)
        except RecipeError as error:
            return str(error)
        if values < (reach := reachable(self.codes.levels)):
            return f"packed codes reach {reach} values, the table has {values}"
        scale = "" if self.scale is None else _scale_problem(self.scale, self.block, self.shape)
        return scale or self.codes.problem(*self.shape)


@dataclass(frozen=True, eq=False)
class Sum(QTensor):
    """The sum of its terms, added in float32 in order."""

    terms: tuple[QTensor, ...]

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        total = self.terms[0].decode(rows=rows)
        for term in self.terms[1:]:
            total = total + term.decode(rows=rows)
        return total.to(dtype)

    def problem(self) -> str:
        shapes = [term.shape for term in self.terms]
        return "" if shapes and all(s == self.shape for s in shapes) else f"terms have shapes {shapes}"


@dataclass(frozen=True, eq=False)
class Columns(QTensor):
    """``inner`` holds the columns ``index`` of a matrix that is zero elsewhere."""

    index: Int[Tensor, "k"]
    inner: QTensor

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        inner = self.inner.decode(dtype, rows)
        out = inner.new_zeros(inner.shape[0], self.shape[1])
        out[:, self.index.long()] = inner
        return out

    def problem(self) -> str:
        count, index = self.index.numel(), self.index
        if self.inner.shape != (self.shape[0], count):
            return f"{count} columns hold a matrix of shape {self.inner.shape}"
        if count and index.device.type == "cpu" and not 0 <= int(index.min()) <= int(index.max()) < self.shape[1]:
            return f"index reaches from {int(index.min())} to {int(index.max())}"
        return ""


NODES: dict[str, type[QTensor]] = {cls.__name__: cls for cls in (Raw, Affine, Lookup, Sum, Columns)}
_KINDS: dict[str, Callable[[Any], bool]] = {  # what a field may hold, whatever its node
    "data": lambda v: isinstance(v, Tensor) and v.dim() == 2 and v.is_floating_point(),
    "index": lambda v: isinstance(v, Tensor) and v.dim() == 1 and v.dtype in (torch.int16, torch.int32, torch.int64),
    "table": lambda v: isinstance(v, str) or (isinstance(v, Tensor) and v.dim() == 1 and v.is_floating_point()),
    "codes": lambda v: isinstance(v, Codes),
    "zero": lambda v: isinstance(v, Codes),
    "block": lambda v: isinstance(v, Block),
    "scale": lambda v: isinstance(v, QTensor),
    "inner": lambda v: isinstance(v, QTensor),
    "terms": lambda v: isinstance(v, tuple),
}
_OPTIONAL = {("Affine", "zero"), ("Lookup", "scale")}


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


def _scale_problem(scale: QTensor, block: Block, shape: tuple[int, ...]) -> str:
    blocks = block.count(shape)
    return "" if scale.shape == blocks else f"scales of shape {scale.shape} for {blocks} blocks"


def _fields(node: QTensor) -> Iterator[tuple[str, Any]]:
    """Fields but the shape; the terms of a sum by their numbers; what is None is not stored."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.name == "shape" or value is None:
            continue
        if isinstance(value, tuple) and value and isinstance(value[0], QTensor):
            yield from ((str(i), term) for i, term in enumerate(value))
        else:
            yield field.name, value


def _apply(block: Block, shape: tuple[int, ...], rows: slice, q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """``(q - zero) * scale``, in place on ``q``; whole groups broadcast, ragged ones are spread."""
    if block.kind == "group" and shape[1] % block.size[0] == 0:
        grouped = q.view(q.shape[0], -1, block.size[0])  # (rows, groups, n)
        if zero is not None:
            grouped.sub_(zero.unsqueeze(-1))
        return grouped.mul_(scale.unsqueeze(-1)).view(q.shape)
    if zero is not None:
        q.sub_(block.spread(zero, shape, rows))
    return q.mul_(block.spread(scale, shape, rows))
