"""Blocks: which weights share a scale."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.arrays import Float, Tensor
from lowbit.errors import FormatError

Kind = Literal["tensor", "row", "group", "tile", "flat"]
ALL = slice(None)


@dataclass(frozen=True)
class Block:
    """A partition of a matrix into blocks that share parameters, arranged as (block rows, block columns).

    ``tensor``: one block. ``row``: one a row. ``group n``: runs of n along a row; the last one of a row may be
    shorter, none straddles rows. ``tile r c``: rectangles, ragged at the edges. ``flat n``: runs of n of the
    flattened matrix, as bitsandbytes and double quantization use them.
    """

    kind: Kind
    size: tuple[int, ...] = ()

    def __str__(self) -> str:
        return ":".join([self.kind, *map(str, self.size)])

    @classmethod
    def parse(cls, text: str) -> Block:
        """The inverse of ``str``; raises FormatError on anything else."""
        kind, *size = text.split(":")
        arity = {"tensor": 0, "row": 0, "group": 1, "tile": 2, "flat": 1}
        if arity.get(kind) != len(size) or not all(re.fullmatch(r"[1-9][0-9]{0,11}", s) for s in size):
            raise FormatError(f"unknown block {text!r}", fix="tensor, row, group:N, tile:R:C or flat:N")
        return cls(kind, tuple(map(int, size)))  # type: ignore[arg-type]

    def within_row(self, columns: int) -> int | None:
        """How many neighbouring columns of a row of that many share a block; None where blocks are no such runs."""
        match self.kind:
            case "row" | "tensor":
                return columns
            case "group":
                return min(self.size[0], columns)
            case "flat" if columns % self.size[0] == 0:
                return self.size[0]
            case _:
                return None

    def count(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Block rows and block columns of a matrix."""
        rows, columns = shape
        match self.kind:
            case "tensor":
                return 1, 1
            case "row":
                return rows, 1
            case "group":
                return rows, math.ceil(columns / self.size[0])
            case "tile":
                return math.ceil(rows / self.size[0]), math.ceil(columns / self.size[1])
            case "flat":
                return math.ceil(rows * columns / self.size[0]), 1

    @property
    def follows_rows(self) -> bool:
        """Whether block row i belongs to matrix row i."""
        return self.kind in ("row", "group")

    def split(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "rows columns n"]:
        """The elements of every block; ragged ends are filled with zeros (neutral for ranges that include zero)."""
        rows, columns = w.shape
        block_rows, block_columns = self.count((rows, columns))
        size = self._within(rows, columns)
        match self.kind:
            case "tensor":
                return w.reshape(1, 1, -1)
            case "row":
                return w.unsqueeze(1)
            case "group":
                return _pad(w, 0, block_columns * size[0] - columns).view(rows, block_columns, -1)
            case "tile":
                r, c = size
                padded = _pad(w, block_rows * r - rows, block_columns * c - columns)
                tiles = padded.view(block_rows, r, block_columns, c).transpose(1, 2)
                return tiles.reshape(block_rows, block_columns, r * c)
            case "flat":
                flat = w.reshape(1, -1)
                return _pad(flat, 0, block_rows * size[0] - flat.shape[1]).view(block_rows, 1, -1)

    def spread(self, values: Tensor, shape: tuple[int, ...], rows: slice = ALL) -> Tensor:
        """One value a block to (rows, columns) of the matrix; size-1 dimensions stay for broadcasting.

        For ``row`` and ``group`` the values must already be those of ``rows``.
        """
        size = self._within(*shape)
        match self.kind:
            case "tensor" | "row":
                return values
            case "group":
                return values.repeat_interleave(size[0], dim=1)[:, : shape[1]]
            case "tile":
                wide = values.repeat_interleave(size[1], dim=1)[:, : shape[1]]
                return wide.repeat_interleave(size[0], dim=0)[: shape[0]][rows]
            case "flat":
                flat = values.reshape(-1).repeat_interleave(size[0])[: shape[0] * shape[1]]
                return flat.view(shape[0], shape[1])[rows]

    def _within(self, rows: int, columns: int) -> tuple[int, ...]:
        """The size, no larger than the matrix: a block of a million columns must not allocate a million."""
        limits = {"group": (columns,), "tile": (rows, columns), "flat": (rows * columns,)}.get(self.kind, ())
        return tuple(map(min, self.size, limits))


def _pad(w: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(w, (0, columns, 0, rows)) if rows or columns else w
