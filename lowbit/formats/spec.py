"""Spec: a QTensor without its data, as a value that hashes, compares, and survives JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from lowbit.errors import FormatError

_DTYPE_BYTES = {"uint8": 1, "int8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8}
_MAX_DEPTH = 8
_MAX_ELEMENTS = 1 << 40


@dataclass(frozen=True)
class Leaf:
    """A stored tensor: name, dtype, shape; packed codes also say how many columns and levels they hold."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    columns: int | None = None
    levels: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Spec:
    """A node: its kind, shape, static fields, leaves and children by field name."""

    node: str
    shape: tuple[int, ...]
    static: tuple[tuple[str, Any], ...]
    leaves: tuple[Leaf, ...]
    children: tuple[tuple[str, Spec], ...]

    def leaf(self, name: str) -> Leaf | None:
        return next((leaf for leaf in self.leaves if leaf.name == name), None)

    def child(self, name: str) -> Spec | None:
        return dict(self.children).get(name)

    def get(self, name: str) -> Any:
        return dict(self.static).get(name)

    def paths(self, prefix: str = "") -> dict[str, Leaf]:
        """Every leaf of the tree by its path."""
        found = {prefix + leaf.name: leaf for leaf in self.leaves}
        for name, child in self.children:
            found |= child.paths(f"{prefix}{name}.")
        return found

    def to_json(self) -> dict[str, Any]:
        leaves = [[f.name, f.dtype, list(f.shape), f.columns, f.levels] for f in self.leaves]
        children = {name: child.to_json() for name, child in self.children}
        return {
            "node": self.node, "shape": list(self.shape), "static": dict(self.static),
            "leaves": leaves, "children": children,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Any, depth: int = 0) -> Spec:
        """Read an untrusted spec; raises FormatError on anything that is not exactly one."""
        if depth > _MAX_DEPTH:
            raise FormatError(f"a spec deeper than {_MAX_DEPTH} nodes")
        try:
            static = tuple(sorted((str(k), v) for k, v in value["static"].items()))
            if not all(isinstance(v, str | int | float | bool) for _, v in static):
                raise TypeError("static fields are strings and numbers")
            leaves = tuple(_leaf(*row) for row in value["leaves"])
            children = tuple((str(k), cls.from_json(v, depth + 1)) for k, v in value["children"].items())
            names = [name for name, _ in (*static, *children)] + [leaf.name for leaf in leaves]
            if len(set(names)) < len(names) or any("." in name for name in names):
                raise ValueError(f"field names {names}")
            return cls(str(value["node"]), _shape(value["shape"]), static, leaves, children)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(f"not a spec ({error}): {json.dumps(value, default=str)[:200]}") from error


def _leaf(name: Any, dtype: Any, shape: Any, columns: Any, levels: Any) -> Leaf:
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r}")
    packed = type(columns) is int and type(levels) is int and columns >= 0 and 2 <= levels <= 256
    if not packed and (columns, levels) != (None, None):
        raise ValueError(f"columns {columns!r} and levels {levels!r}")
    return Leaf(str(name), dtype, _shape(shape), columns, levels)


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(value)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        raise ValueError(f"shape {value!r}")
    if math.prod(shape) > _MAX_ELEMENTS:
        raise ValueError(f"shape {value!r} is larger than any tensor")
    return shape
