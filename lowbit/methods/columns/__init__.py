"""Rounding a matrix column by column, each column making up for the errors of those before it.

With H = sum x xᵀ over calibration tokens and H = Lᵀ D L (L unit lower triangular, D diagonal, both in the order in
which columns are rounded), the output error of rounding W to Q is

    tr((W - Q) H (W - Q)ᵀ) = sum_k D_kk |(W - Q)_k + sum_{j<k} L_kj (W - Q)_j|²

so the best that column k can do, once the columns before it are fixed, is to round W_k + sum_{j<k} L_kj (W - Q)_j.
This is the loop of GPTQ (Frantar et al., arXiv 2210.17323) in the form of QuIP's LDLQ (Chee et al., arXiv 2307.13304,
which proves that both choose the same codes). It needs one Cholesky factor of H, where GPTQ's own form needs H⁻¹ and
then a factor of that.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch

from lowbit.arrays import Float, Int, Matrix, Tensor, UInt8
from lowbit.calibration.stats import Gram
from lowbit.errors import GramError
from lowbit.formats.format import Format, Params
from lowbit.formats.grids import IntGrid, Table


def feedback(gram: Gram, damp: float, act_order: bool, where: str) -> tuple[Int[Tensor, "in"], Float[Tensor, "in in"]]:
    """The column order and L of the damped H in that order, computed once a Gram matrix: linears share it.

    L's diagonal, all ones, is not stored: D lies in its place, as LAPACK packs such factors. Nothing here reads it.

    ``damp`` is added to the diagonal as a share of its mean; ``act_order`` puts columns by falling diagonal. An input
    that was always zero is taken to be 1 and independent: its column is rounded alone. Cost in³/3 in float64.
    Raises GramError, naming the layer, when H is not finite, or not positive definite even with damping.
    """
    key = (damp, act_order)
    if key in gram.memo:
        return gram.memo[key]
    H = gram.sum()
    diagonal = H.diagonal()
    if not torch.isfinite(diagonal).all():
        raise GramError(
            f"{int((~torch.isfinite(diagonal)).sum())} inputs were NaN or infinite during calibration", where=where,
            fix="calibrate in float32 or bfloat16, which do not overflow as float16 does",
        )  # fmt: skip
    dead = diagonal == 0
    diagonal[dead] = 1.0
    natural = torch.arange(len(H), device=H.device)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else natural
    last_first = order.flip(0)
    H = H[last_first][:, last_first].to(torch.float64)
    H.diagonal().add_(damp * H.diagonal().mean())
    C, info = torch.linalg.cholesky_ex(H)  # of H with rows and columns reversed; so H = A Aᵀ with A = flip(C) upper
    if int(info) or not torch.isfinite(C.diagonal()).all():
        raise GramError(
            f"the Gram matrix ({len(H)} x {len(H)}, {gram.tokens} tokens, {int(dead.sum())} dead inputs) is not "
            f"positive definite with damp {damp:g}", where=where,
            why="fewer independent tokens than inputs leave directions that were never seen",
            fix=f"damp={max(10 * damp, 0.01):g}, or more calibration tokens",
        )  # fmt: skip
    D = C.diagonal().square()
    C /= C.diagonal().clone()
    C.diagonal().copy_(D)
    L = C.to(torch.float32).t().flip(0, 1).contiguous()
    gram.memo[key] = order, L
    return order, L


def round_columns(
    W: Matrix, L: Float[Tensor, "in in"], order: Int[Tensor, "in"], fmt: Format, params: Params, block: int,
    aim: Matrix | None = None,
) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, "in out"]]:  # fmt: skip
    """Codes on fixed grids, and the errors ``(W - Q)ᵀ`` with columns in ``order``.

    ``aim`` is W with what makes up for the errors of columns before these, if any.
    ``block`` columns are rounded one by one, on a GPU in one kernel (:mod:`lowbit.methods.columns.triton`); the errors
    of blocks, and of runs of blocks, are then applied to as many later columns in one product. It changes results by
    the order of float additions only. Works on the transpose, so that a column is contiguous. Cost out * in²; memory
    2 * out * in floats.
    """
    groups = torch.arange(params.step.shape[1], device=W.device).view(1, -1)
    group_of = fmt.block.spread(groups, tuple(W.shape)).expand(1, W.shape[1])[0][order]
    step = params.step.t().contiguous()  # (groups, out), or (1, 1) where one step serves all rows
    zero = None if params.zero is None else params.zero.t().contiguous()
    D = W.t()[order].contiguous()  # a column of W; W - Q once it is rounded
    T = (
        D.clone() if aim is None else aim.t()[order].contiguous()
    )  # what a column should round to; its codes once it is rounded
    rounder = _kernel if _has_kernel(fmt, W.device) else _loop
    round_block = rounder(D, T, L, group_of, fmt, step, zero)

    by_halves(D, T, L, block, round_block)
    codes = torch.empty_like(T, dtype=torch.uint8)
    codes[order] = T.to(torch.uint8)
    return codes.t().contiguous(), D


RoundBlock = Callable[[int, int], None]
"""``(start, stop)``: rounds these columns, each making up for the ones before it among them."""


def by_halves(
    D: Float[Tensor, "in out"], T: Float[Tensor, "in out"], L: Float[Tensor, "in in"], block: int,
    round_block: RoundBlock,
) -> None:  # fmt: skip
    """Round all columns in blocks, halves of halves: most of the work is then a few large products.

    ``round_block`` writes the errors of its columns to D; what they ask of later columns is added to T here.
    """

    def round_range(start: int, stop: int) -> None:
        if stop - start <= block:
            round_block(start, stop)
            return
        middle = start + block * (math.ceil((stop - start) / block) // 2)
        round_range(start, middle)
        T[middle:stop].addmm_(L[middle:stop, start:middle], D[start:middle])
        round_range(middle, stop)

    round_range(0, len(D))


def _loop(
    D: Tensor, T: Tensor, L: Tensor, group_of: Tensor, fmt: Format, step: Tensor, zero: Tensor | None
) -> RoundBlock:
    """The reference, column by column in torch."""
    groups, snap = group_of.tolist(), fmt.snapper(step, zero)
    d, t, value = D.unbind(), T.unbind(), torch.empty_like(D[0])

    def round_block(start: int, stop: int) -> None:
        for j in range(start, stop):
            snap(t[j], groups[j], t[j], value)
            d[j].sub_(value)
            if j + 1 < stop:
                T[j + 1 : stop].addr_(L[j + 1 : stop, j], d[j])

    return round_block


def _has_kernel(fmt: Format, device: torch.device) -> bool:
    """Whether this device and grid have the kernel; ``dynamic8`` is looked up on a lattice of its own."""
    known = isinstance(fmt.grid, IntGrid) or (isinstance(fmt.grid, Table) and fmt.grid.name != "dynamic8")
    return known and device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _kernel(
    D: Tensor, T: Tensor, L: Tensor, group_of: Tensor, fmt: Format, step: Tensor, zero: Tensor | None
) -> RoundBlock:
    """The same in one launch a block."""
    from lowbit.methods.columns.triton import rounder  # needs triton, which only a GPU has

    return rounder(D, T, L, group_of, fmt, step, zero)
