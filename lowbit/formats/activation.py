"""Activation formats: how the input of a linear is rounded when it is used.

    int{2..8}-{token,tensor,g32,g64,g128,...}[-sym]     ranges from the values themselves, at every call
    int{2..8}-tensor[-sym]-static                       one range, measured before on calibration text
    fp8-{e4m3,e5m2}-{token,tensor}[-static]

An activation (tokens, in) is a matrix whose row is a token, so the grids and blocks are those of weights. Scales are
float32: nothing but a static range is stored. Asymmetric ranges include zero (Jacob et al., arXiv 1712.05877); ``-sym``
maps the largest magnitude to the top of an odd number of levels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import FormatError, RecipeError, nearest
from lowbit.formats.blocks import Block
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import IntGrid, Table
from lowbit.formats.qtensor import Columns, QTensor, Raw, Sum

Range = tuple[Float[Tensor, "1"], Float[Tensor, "1"]]
"""The least and the largest value that a static format can hold, measured on calibration text."""


@dataclass(frozen=True)
class ActivationFormat:
    """A format for activations; ``static``: its one range is measured in advance, else taken from every input."""

    name: str
    format: Format
    static: bool

    def round(self, x: Float[Tensor, "*batch in"], range: Range | None = None) -> Float[Tensor, "*batch in"]:
        """The nearest values on the grid, computed in float32, in the dtype of ``x``.

        A token of NaN stays one. Cost about eight passes over ``x``. Raises FormatError for a static format without its
        range, and for the range of one that takes its own.
        """
        if (range is None) == self.static:
            needs = "needs the range that calibration measured" if self.static else "takes its ranges from its inputs"
            raise FormatError(needs, where=self.name, fix="quantize with calibration text" if self.static else "")
        if x.numel() == 0:
            return x
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        block, shape = self.format.block, tuple(rows.shape)
        if range is None:
            low, high = torch.aminmax(block.split(rows), dim=-1)
        else:
            low, high = (bound.to(rows.device, torch.float32).view(1, 1) for bound in range)
        step, zero = self.grid(low.clamp(max=0), high.clamp(min=0))
        step, zero = block.spread(step, shape), None if zero is None else block.spread(zero, shape)
        return self.format.snap(rows, step, zero).values.to(x.dtype).view(x.shape)

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step and zero point of ranges that include zero; a block of zeros has step 0, which decodes to zeros."""
        grid = self.format.grid
        if not self.format.asymmetric:
            return torch.maximum(high, -low) / grid.top, None
        step = (high - low) / (grid.levels - 1)
        return step, torch.round(-low / torch.where(step > 0, step, 1.0))


@dataclass(frozen=True, eq=False)
class Input:
    """How the input of one linear is rounded; a static format comes with its calibrated range (one float32 each)."""

    format: ActivationFormat
    low: Float[Tensor, "1"] | None = None
    high: Float[Tensor, "1"] | None = None

    def __post_init__(self) -> None:
        given = self.low is not None, self.high is not None
        if given != (self.format.static, self.format.static):
            raise FormatError(
                f"{'has no' if self.format.static else 'has a'} calibrated range", where=self.format.name,
                fix="a low and a high for static formats, neither for others",
            )  # fmt: skip

    def round(self, x: Float[Tensor, "*batch in"], exact: Int[Tensor, "k"] | None = None) -> Float[Tensor, "*batch in"]:
        """``x`` as the linear sees it; the columns ``exact`` neither are rounded nor widen the range of the others."""
        range = None if self.low is None or self.high is None else (self.low, self.high)
        if exact is None:
            return self.format.round(x, range)
        kept = x.index_select(-1, exact)
        return self.format.round(x.index_fill(-1, exact, 0), range).index_copy_(-1, exact, kept)


def exact_columns(q: QTensor) -> Int[Tensor, "k"] | None:
    """The inputs that meet unrounded weights and stay unrounded themselves: the outliers of LLM.int8().

    Those are the columns of ``Sum(..., Columns(index, Raw))`` (arXiv 2208.07339, section 3.2).
    """
    terms = q.terms if isinstance(q, Sum) else ()
    found = [t.index for t in terms if isinstance(t, Columns) and isinstance(t.inner, Raw) and t.index.numel()]
    return torch.cat(found).long().unique() if found else None


_INTEGER = re.compile(r"int([2-8])-(token|tensor|g[1-9]\d{0,5})(-sym)?(-static)?")
_FLOAT = re.compile(r"fp8-(e4m3|e5m2)-(token|tensor)(-static)?")


def activation(name: str) -> ActivationFormat:
    """The activation format of a spelling; raises RecipeError with the nearest known name."""
    if match := _INTEGER.fullmatch(name):
        bits, block, symmetric, static = match.groups()
        grid: IntGrid | Table = IntGrid(int(bits), bool(symmetric))
    elif match := _FLOAT.fullmatch(name):
        table, block, static = match.groups()
        grid = Table(table)
    else:
        raise RecipeError(f"unknown activation format {name!r}", fix=nearest(name, NAMES))
    if static and block != "tensor":
        raise RecipeError(
            f"{name!r} would need a range for every {'token' if block == 'token' else 'group'} to come",
            fix=name.replace(block, "tensor"),
        )  # fmt: skip
    return ActivationFormat(name, Format(name, grid, _block(block), Stored(torch.float32)), bool(static))


def _block(spelling: str) -> Block:
    """A token is a row."""
    if spelling.startswith("g"):
        return Block("group", (int(spelling[1:]),))
    return Block("row" if spelling == "token" else "tensor")


NAMES = [
    *(f"int{b}-{block}{s}" for b in range(2, 9) for block in ("token", "tensor", "g64", "g128") for s in ("", "-sym")),
    *(f"int{b}-tensor{s}-static" for b in range(2, 9) for s in ("", "-sym")),
    *(f"fp8-{table}-{block}" for table in ("e4m3", "e5m2") for block in ("token", "tensor", "tensor-static")),
]  # fmt: skip
"""The usual spellings; groups may have other sizes."""
