"""One tree of every kind over a given matrix, and what tests do with them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch

from lowbit.codec.stream import encode
from lowbit.formats.blocks import Block
from lowbit.formats.ec import Lattice
from lowbit.formats.hadamard import random_signs
from lowbit.formats.nodes_nested import repack
from lowbit.formats.pack import Codes
from lowbit.formats.presets import PRESETS, preset
from lowbit.formats.qtensor import (
    Affine,
    Coded,
    Columns,
    Gathered,
    Lookup,
    LowRank,
    Nested,
    QTensor,
    Raw,
    Rotated,
    Sparse,
    Sum,
)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def coded(name: str, w: torch.Tensor) -> QTensor:
    fmt = preset(name)
    return fmt.encode(w, fmt.fit(w))


def with_outliers(w: torch.Tensor, index: list[int]) -> Sum:
    """As LLM.int8() splits a weight: some columns in 16 bit, the rest in int8."""
    kept = torch.tensor(index, dtype=torch.int64)
    rest = w.clone()
    rest[:, kept] = 0
    columns = Columns(tuple(w.shape), kept, Raw.of(w[:, kept].half()))
    return Sum(tuple(w.shape), (coded("int8-row-sym", rest), columns))


def stored_table(w: torch.Tensor) -> Lookup:
    shape = tuple(w.shape)
    codes = (w > 0).long() + 2 * (w.abs() > 1).long()
    return Lookup(
        shape, Codes.of(codes, 4), torch.tensor([-0.5, 0.5, -1.5, 1.5]), Raw.of(torch.ones(1, 1)), Block("tensor")
    )


def series(w: torch.Tensor, *names: str) -> Sum:
    """Each format codes what those before it left."""
    terms: list[QTensor] = []
    for name in names:
        terms.append(coded(name, w - sum(term.decode() for term in terms)))
    return Sum(tuple(w.shape), tuple(terms))


def fractional_zeros(w: torch.Tensor) -> Affine:
    """Zeros between the codes, as HQQ finds them."""
    blocks = Block("group", (16,)).count(tuple(w.shape))
    codes, scale = Codes.of((4 * w + 8).round().clamp(0, 15), 16), torch.full(blocks, 0.25).half()
    zero = Raw.of(8 + matrix(*blocks, seed=1).half())
    return Affine(tuple(w.shape), codes, Raw.of(scale), zero, Block("group", (16,)))


def low_rank(w: torch.Tensor, rank: int = 3) -> LowRank:
    """Factors in eighths, whose products add up exactly in any order."""
    a, b = matrix(w.shape[0], rank, seed=2), matrix(rank, w.shape[1], seed=3)
    return LowRank(tuple(w.shape), ((8 * a).round() / 8).half(), ((8 * b).round() / 8).bfloat16())


def rotated(w: torch.Tensor, size: int = 4) -> Rotated:
    return Rotated(tuple(w.shape), random_signs(w.shape[1], 5), coded("int8-row", w), size)


def gathered(w: torch.Tensor) -> Gathered:
    """Channel 0 in three copies, the last two as their mean, the others as they are."""
    n = w.shape[1]
    index = torch.tensor([[0, 0]] * 3 + [[j, j] for j in range(1, n - 2)] + [[n - 2, n - 1]])
    scale = torch.tensor([[1 / 3, 0.0]] * 3 + [[1.0, 0.0]] * (n - 3) + [[0.5, 0.5]])
    inner = torch.cat([w[:, :1].repeat(1, 3), w[:, 1 : n - 2], w[:, n - 2 :].sum(1, keepdim=True)], dim=1)
    return Gathered(tuple(w.shape), index, Raw.of(scale), coded("int8-row-sym", inner))


def nested(w: torch.Tensor, bits: int, extra: bool = False, name: str = "int8-row") -> Nested:
    return Nested(tuple(w.shape), coded(name, w), bits, extra)


def entropy_coded(w: torch.Tensor) -> Coded:
    """Numbers in eighths, with steps and gains of their own."""
    lattice = Lattice.of(w.square().mean(0).sqrt(), w.square().mean(1).sqrt())
    return lattice.tree(encode((8 * w).round().to(torch.int16)), tuple(w.shape), -3.0)


TREES: dict[str, Callable[[torch.Tensor], QTensor]] = {
    "raw": Raw.of,
    "outliers": lambda w: with_outliers(w, [3, 0, 17]),
    "no outliers": lambda w: with_outliers(w, []),
    "series": lambda w: series(w, "int4-g64", "int2-row"),
    "stored table": stored_table,
    "nested sum": lambda w: Sum(tuple(w.shape), (with_outliers(w, [1]), coded("nf4-dq", w))),
    "fractional zeros": fractional_zeros,
    "low rank": low_rank,
    "sparse": lambda w: Sparse.of(w, w.abs() > 1.5),
    "nothing sparse": lambda w: Sparse.of(w, w.abs() > 9, torch.bfloat16),
    "rotated": rotated,
    "gathered": gathered,
    "entropy coded": entropy_coded,
    "nested": lambda w: nested(w, 3),
    "nested extra": lambda w: nested(w, 2, extra=True, name="int8-g64-sym"),
    "repacked": lambda w: repack(nested(w, 4)),
    "repacked extra": lambda w: repack(nested(w, 2, extra=True)),
}
TREES |= {name: (lambda w, name=name: coded(name, w)) for name in PRESETS}
SOME = [name for name in TREES if not name.startswith("int")] + [
    "int2-tensor", "int3-g64", "int4-row", "int5-g32-sym", "int6-tensor-sym", "int7-g128", "int8-row-sym",
]  # fmt: skip


def parts_of(q: QTensor) -> dict[str, torch.Tensor]:
    return {part.path: part.data for part in q.parts()}


def edited(q: QTensor, change: Callable[[dict[str, Any]], object]) -> Any:
    """The JSON of a tree's spec after a change."""
    value = copy.deepcopy(q.spec().to_json())
    change(value)
    return json.loads(json.dumps(value))


def set_leaf(v: dict[str, Any], name: str, at: int | slice, value: Any) -> None:
    next(leaf for leaf in v["leaves"] if leaf[0] == name)[at] = value
