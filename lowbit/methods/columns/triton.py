"""One block of columns rounded in one launch: the kernel of :mod:`lowbit.methods.columns`.

A program holds some output rows: the errors of the block's columns so far stay in its registers, and each next
column's aim is their product with a row of L. Columns follow one another, rows are independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import no_type_check

import torch
import triton
import triton.language as tl

from lowbit.arrays import Tensor
from lowbit.formats.format import Format
from lowbit.formats.grids import IntGrid, Table, codebook
from lowbit.formats.snap import divisible

_ROWS, _WARPS = 32, 2  # of a program; the fastest of those tried on an H200, by a little


def rounder(
    D: Tensor, T: Tensor, L: Tensor, group_of: Tensor, fmt: Format, step: Tensor, zero: Tensor | None
) -> Callable[[int, int], None]:
    """``(start, stop)`` rounds these columns: row j of T (in, out) becomes codes, of D (in, out) W - Q."""
    grid, divisor = fmt.grid, divisible(step)
    if isinstance(grid, IntGrid):
        shift = torch.full_like(step, grid.offset) if zero is None else zero
        bounds, values, codes, top, depth = step, step, step, grid.levels - 1, 0
    else:
        assert isinstance(grid, Table)
        book, shift, divisor = codebook(grid.name, D.device), step, divisor.reciprocal()
        depth, top = math.ceil(math.log2(len(book.sorted))), 0
        bounds = torch.full(((1 << depth) - 1,), math.inf, device=D.device)
        bounds[: len(book.bounds)] = book.bounds
        values, codes = book.sorted, book.codes.to(torch.float32)
    rows = D.shape[1]
    per_row = int(step.shape[1] == rows)  # else one step serves all rows
    group_of = group_of.to(torch.int32)
    L = L if L.stride(1) == 1 else L.contiguous()

    def round_block(start: int, stop: int) -> None:
        width = max(16, triton.next_power_of_2(stop - start))
        _round_block[(triton.cdiv(rows, _ROWS),)](
            D, T, L, L.stride(0), group_of, step, divisor, shift, bounds, values, codes, rows, start, stop,
            TOP=float(top), DEPTH=depth, WHOLE=fmt.zero is None, PER_ROW=per_row, WIDTH=width, ROWS=_ROWS,
            num_warps=_WARPS,
        )  # fmt: skip

    return round_block


@triton.jit
@no_type_check  # triton has types of its own
def _round_block(
    D, T, L, stride, group_of, step, divisor, shift, bounds, values, codes, rows, start, stop,
    TOP: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr, PER_ROW: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, WIDTH)
    errors = tl.zeros((WIDTH, ROWS), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    aim, zero, unit, by = weight, weight, weight + 1.0, weight + 1.0
    for j in range(start - 1, stop):
        # What the next column needs is on its way while this one is computed; at first there is only a next one.
        ahead = tl.cast(tl.minimum(j + 1, stop - 1), tl.int64)
        block = tl.load(group_of + ahead)
        block = block * rows + row if PER_ROW else block + row * 0
        next_weight = tl.load(D + ahead * rows + row, mask=inside, other=0.0)
        next_aim = tl.load(T + ahead * rows + row, mask=inside, other=0.0)
        next_unit = tl.load(step + block, mask=inside, other=1.0)
        next_by = tl.load(divisor + block, mask=inside, other=1.0)
        next_zero = tl.load(shift + block, mask=inside, other=0.0)

        factors = tl.load(L + tl.cast(j, tl.int64) * stride + start + column, mask=column < j - start, other=0.0)
        aim += tl.sum(errors * factors[:, None], 0)
        if DEPTH == 0:
            level = tl.div_rn(aim, by)
            # Clamped first: adding 1.5 * 2²³ rounds what is small, ties to even.
            if WHOLE:
                level = tl.minimum(tl.maximum(level, -zero), TOP - zero)
                level = (level + 12582912.0) - 12582912.0
                code = level + zero
            else:
                code = tl.minimum(tl.maximum(level + zero, 0.0), TOP)
                code = (code + 12582912.0) - 12582912.0
                level = code - zero
        else:
            scaled = aim * by
            rank = row * 0
            for i in tl.static_range(DEPTH):
                probe = rank + (1 << (DEPTH - 1 - i))
                rank = tl.where(scaled > tl.load(bounds + probe - 1), probe, rank)
            level = tl.load(values + rank)
            code = tl.load(codes + rank)
        error = weight - level * unit
        at, there = tl.cast(j, tl.int64) * rows + row, inside & (j >= start)
        tl.store(T + at, code, mask=there)
        tl.store(D + at, error, mask=there)
        errors = tl.where((column == j - start)[:, None], error[None, :], errors)
        weight, aim, unit, by, zero = next_weight, next_aim, next_unit, next_by, next_zero
