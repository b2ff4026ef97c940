"""Snapping: values to their nearest codes on a grid, and what those codes decode to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from lowbit.arrays import Float, Tensor
from lowbit.formats.grids import Codebook, IntGrid, Table


class Snapped(NamedTuple):
    codes: Tensor
    values: Tensor


Snapper = Callable[[Tensor, int, Tensor, Tensor], None]
"""``(values, block, codes, out)``: writes the codes of ``values``, and what they decode to, on block row ``block``."""


def divisible(step: Tensor) -> Tensor:
    """Steps that can be divided by: one where a block is all zeros, or so small that a reciprocal would overflow."""
    return step + (step.abs() < torch.finfo(torch.float32).tiny)


def snap_integer(grid: IntGrid, whole: bool, values: Tensor, step: Tensor, zero: Tensor | None) -> Snapped:
    """Nearest integers. A ``whole`` zero is added after rounding, as is usual, so that ties go to even differences."""
    shift = zero if zero is not None else float(grid.offset)
    codes = values / divisible(step)
    codes = codes.round_().add_(shift) if whole else codes.add_(shift).round_()
    codes.clamp_(0, grid.levels - 1)
    return Snapped(codes, (codes - shift) * step)


def snap_table(book: Table | Codebook, values: Tensor, step: Tensor) -> Snapped:
    """Nearest values of a table. Multiplies by the step's reciprocal as bitsandbytes does, so that codes agree."""
    codes = book.nearest(values * divisible(step).reciprocal())
    return Snapped(codes, book.lookup(codes) * step)


def integer_snapper(
    grid: IntGrid, whole: bool, step: Float[Tensor, "blocks n"], zero: Float[Tensor, "blocks n"] | None
) -> Snapper:
    """:func:`snap_integer` without temporaries, for a loop over vectors that use one row of ``step`` each."""
    shift = torch.full_like(step, grid.offset) if zero is None else zero
    write = _write_whole if whole else _write_fraction
    return functools.partial(write, grid.levels - 1, step.unbind(), divisible(step).unbind(), shift.unbind())


def table_snapper(book: Table | Codebook, step: Float[Tensor, "blocks n"]) -> Snapper:
    """:func:`snap_table` for such a loop."""
    return functools.partial(_write_table, book, step)


def _write_whole(
    top: int, step: Sequence[Tensor], divisor: Sequence[Tensor], shift: Sequence[Tensor],
    values: Tensor, block: int, codes: Tensor, out: Tensor,
) -> None:  # fmt: skip
    torch.div(values, divisor[block], out=codes).round_().add_(shift[block]).clamp_(0, top)
    torch.sub(codes, shift[block], out=out).mul_(step[block])


def _write_fraction(
    top: int, step: Sequence[Tensor], divisor: Sequence[Tensor], shift: Sequence[Tensor],
    values: Tensor, block: int, codes: Tensor, out: Tensor,
) -> None:  # fmt: skip
    torch.div(values, divisor[block], out=codes).add_(shift[block]).round_().clamp_(0, top)
    torch.sub(codes, shift[block], out=out).mul_(step[block])


def _write_table(book: Table | Codebook, step: Tensor, values: Tensor, block: int, codes: Tensor, out: Tensor) -> None:
    snapped = snap_table(book, values, step[block])
    codes.copy_(snapped.codes)
    out.copy_(snapped.values)
