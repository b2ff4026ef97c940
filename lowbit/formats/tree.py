"""The base of every node of a QTensor: its shape, and the traversals that follow from its fields.

A node is a frozen dataclass; a field is a leaf (``Tensor`` or ``Codes``), a child (``QTensor`` or a tuple of them) or
static data. Leaves, sizes, specs and moves follow from that, so that a node only says what its values are. Stored
tensors are annotated as such, without shapes: they may come from an untrusted file, and ``problem`` looks at them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lowbit.arrays import Float, Tensor
from lowbit.errors import FormatError
from lowbit.formats.blocks import ALL, Block
from lowbit.formats.pack import Codes
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
        """Why the fields do not fit together (dtypes, shapes, values), or nothing. At most one pass over indices."""

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
        """The same tree with ``f`` applied to every stored tensor (move, pin, clone), in the order of ``parts``.

        Raises FormatError when ``f`` changes a shape or a dtype: the tree would mean something else.
        """
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Codes):
                changed[field.name] = dataclasses.replace(value, data=_same(value.data, f(value.data)))
            elif isinstance(value, Tensor):
                changed[field.name] = _same(value, f(value))
            elif isinstance(value, QTensor):
                changed[field.name] = value.map(f)
            elif isinstance(value, tuple) and value and isinstance(value[0], QTensor):
                changed[field.name] = tuple(term.map(f) for term in value)
        return dataclasses.replace(self, **changed)

    @property
    def nbytes(self) -> int:
        return sum(part.data.numel() * part.data.element_size() for part in self.parts())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


def outside(index: Tensor, width: int) -> str:
    """Why ``index`` cannot be positions below ``width``, or nothing; values off the CPU are not looked at."""
    if not index.numel() or index.device.type != "cpu" or 0 <= int(index.min()) <= int(index.max()) < width:
        return ""
    return f"index reaches from {int(index.min())} to {int(index.max())}"


def _same(before: Tensor, after: Tensor) -> Tensor:
    if (before.dtype, before.shape) == (after.dtype, after.shape):
        return after
    raise FormatError(
        f"a part of {before.dtype} {tuple(before.shape)} became {after.dtype} {tuple(after.shape)}",
        why="a tree's parts may be moved and copied, not changed",
    )


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
