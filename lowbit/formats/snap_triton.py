"""Rounding inside a kernel: a block's range to its scale and zero as stored, its values to the nearest codes.

What the GPU kernels of the clip search (:mod:`lowbit.formats.clip_triton`) share, and one of their own:
:func:`scaled_error`, what rounding costs every weight once its columns are scaled.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import IntGrid, Table, codebook

SHARE = 2048  # values that a program takes of smaller blocks together
_DTYPES: dict[torch.dtype, Any] = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
}  # fmt: skip


def rules(fmt: Format, like: Tensor) -> dict[str, Any]:
    """How a format that :func:`lowbit.formats.format.has_kernel` rounds, as arguments of :func:`snap`."""
    assert isinstance(fmt.scale, Stored)
    limits = torch.finfo(fmt.scale.dtype)
    if isinstance(fmt.grid, IntGrid):
        levels, offset, values, bounds = fmt.grid.levels, float(fmt.grid.offset), like, like
    else:
        assert isinstance(fmt.grid, Table)
        book = codebook(fmt.grid.name, like.device)
        levels, offset, values, bounds = len(book.sorted), 0.0, book.sorted, book.bounds
    return {
        "values": values, "bounds": bounds, "divisor": fmt.grid.top, "offset": offset,
        "smallest": limits.smallest_normal * limits.eps,
        "LEVELS": levels, "TABLE": isinstance(fmt.grid, Table), "ASYMMETRIC": fmt.asymmetric,
        "WHOLE": fmt.zero is None, "STORED": _DTYPES[fmt.scale.dtype],
        "ZEROS": _DTYPES[torch.float16 if fmt.zero is None else fmt.zero.dtype],
    }  # fmt: skip


def scaled_error(W: Matrix, s: Float[Tensor, "in"], fmt: Format) -> Matrix:
    """Q(W s)/s - W, every block of W s with the range it has. Cost: one read and one write of the matrix."""
    rows, columns = W.shape
    n = fmt.block.within_row(columns)
    assert n is not None
    error, per_row = torch.empty_like(W), triton.cdiv(columns, n)
    width = triton.next_power_of_2(n)
    share = max(1, SHARE // width)
    _scaled_error[(triton.cdiv(rows * per_row, share),)](
        W, s.contiguous(), error, rows * per_row, columns, per_row, n, **rules(fmt, W),
        SHARE=share, WIDTH=width, num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return error


@triton.jit
@no_type_check  # triton has types of its own
def snap(
    x, bottom, top, values, bounds, divisor, offset, smallest, LEVELS: tl.constexpr, TABLE: tl.constexpr,
    ASYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, STORED: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Blocks ``x`` (blocks, n) of ranges from ``bottom`` to ``top``, which hold zero: in units of the step that is
    stored for them, rounded and as they are; and the step."""
    MAGIC: tl.constexpr = 12582912.0  # 1.5 * 2²³: adding it rounds magnitudes below 2²², ties to even
    if ASYMMETRIC:
        scale = tl.div_rn(top - bottom, bottom * 0.0 + (LEVELS - 1))
    else:
        scale = tl.div_rn(tl.maximum(top, -bottom), bottom * 0.0 + divisor)
    scale = tl.where(scale > 0, tl.maximum(scale, smallest), scale)
    step = scale.to(STORED).to(tl.float32)
    by = tl.where(tl.abs(step) < 1.1754943508222875e-38, 1.0, step)
    scaled = x * tl.div_rn(bottom * 0.0 + 1.0, by)[:, None]
    if TABLE:
        snapped = tl.load(values) + scaled * 0.0
        for k in tl.static_range(LEVELS - 1):
            snapped = tl.where(scaled > tl.load(bounds + k), tl.load(values + k + 1), snapped)
    else:
        zero = bottom * 0.0 + offset
        if ASYMMETRIC:
            zero = tl.div_rn(-bottom, by)
            if WHOLE:
                zero = (tl.minimum(tl.maximum(zero, 0.0), LEVELS - 1.0) + MAGIC) - MAGIC
            else:
                zero = zero.to(ZEROS).to(tl.float32)
        z = zero[:, None]
        if WHOLE:
            snapped = (tl.minimum(tl.maximum(scaled, -z), LEVELS - 1 - z) + MAGIC) - MAGIC
        else:
            snapped = (tl.minimum(tl.maximum(scaled + z, 0.0), LEVELS - 1.0) + MAGIC) - MAGIC - z
    return snapped, scaled, step


@triton.jit
@no_type_check
def _scaled_error(
    W, s, error, count, columns, per_row, n, values, bounds, divisor, offset, smallest, LEVELS: tl.constexpr,
    TABLE: tl.constexpr, ASYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, STORED: tl.constexpr, ZEROS: tl.constexpr,
    SHARE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
    i = tl.arange(0, WIDTH)
    column = (b % per_row * n)[:, None] + i[None, :]
    inside = (b < count)[:, None] & (i < n)[None, :] & (column < columns)
    at = tl.cast(b // per_row, tl.int64)[:, None] * columns + column
    w = tl.load(W + at, mask=inside, other=0.0)
    by = tl.load(s + column, mask=inside, other=1.0)
    x = w * by
    bottom, top = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    snapped, _, step = snap(
        x, bottom, top, values, bounds, divisor, offset, smallest, LEVELS, TABLE, ASYMMETRIC, WHOLE, STORED, ZEROS
    )
    tl.store(error + at, tl.div_rn(snapped * step[:, None], by) - w, mask=inside)
