"""Rounding to whole numbers of any size, a step a column: Babai's nearest plane.

With no range to clip to, the column loop of GPTQ is Babai's algorithm for the closest vector of a lattice (Chen et al.,
arXiv 2507.18553). Its output error is then ``sum_k D_kk (r_k step_k)²`` with every r_k in [-1/2, 1/2], and steps
proportional to ``1 / sqrt(D_kk)`` let every column add the same: for a given rate the least in all, as reverse
water-filling has it.
"""

from __future__ import annotations

import torch

from lowbit import _native
from lowbit.arrays import Float, Int, Matrix, Tensor
from lowbit.calibration.stats import Gram
from lowbit.formats.ec import Entropy, Lattice
from lowbit.formats.nodes_coded import Coded
from lowbit.methods.base import Weight
from lowbit.methods.columns import RoundBlock, by_halves, feedback
from lowbit.methods.columns.rate import code

_BLOCK = 32  # columns that are rounded one by one
_SHARE = 0.3
"""The power of the Fisher information by which rows differ in precision. With a table for every row it would be 1/2;
rows that share one should not differ too much (docs/decisions/0017)."""
_LEAST = 1e-3  # of the mean Fisher information: no row is taken to matter less
_TOP = 32767  # of 16-bit numbers; no code of 8 bits a weight comes near it


def gptq_at_rate(w: Weight, gram: Gram, fmt: Entropy, damp: float, act_order: bool, fisher: bool) -> Coded:
    """GPTQ on the lattice of a weight, in the bytes of ``fmt``, rows weighed if ``fisher``. Cost: that of ``code``."""
    W = w.matrix.contiguous()
    order, L = feedback(gram, damp, act_order, w.name)
    step = torch.empty_like(W[0])
    step[order] = L.diagonal().rsqrt()

    def rounder(V: Matrix, step: Tensor) -> Tensor:
        return nearest_plane(V, L, order, step)

    return code(W, fmt, Lattice.of(step, row_gains(w) if fisher else None), rounder, gram, w.name)


def rtn_at_rate(w: Weight, mean_square: Float[Tensor, "in"] | None, fmt: Entropy) -> Coded:
    """Every weight alone, in the bytes of ``fmt``; columns weighed by the mean square of their inputs, if given."""
    W = w.matrix.contiguous()
    step = torch.ones_like(W[0])
    if mean_square is not None and bool(mean_square.any()):
        seen = mean_square.clamp_min(_LEAST * mean_square.mean())
        step = seen.rsqrt()
    return code(W, fmt, Lattice.of(step), nearest, None, w.name)


def row_gains(w: Weight) -> Float[Tensor, "out"] | None:
    """How coarse each row may be, relative to others; None where nothing is known of their weights."""
    if w.fisher is None or not bool(w.fisher.any()):
        return None
    return (w.fisher / w.fisher.mean()).clamp_min(_LEAST).pow(-_SHARE)


def nearest(W: Matrix, step: Float[Tensor, "in"]) -> Int[Tensor, "out in"]:
    """Each weight alone."""
    return (W / step).round_().clamp_(-_TOP, _TOP).to(torch.int16)


def nearest_plane(
    W: Matrix, L: Float[Tensor, "in in"], order: Int[Tensor, "in"], step: Float[Tensor, "in"]
) -> Int[Tensor, "out in"]:
    """The numbers of W, columns rounded in ``order``, each making up for the errors of those before it.

    ``L`` as :func:`lowbit.methods.columns.feedback` gives it. Cost out * in²; memory 3 * out * in floats.
    """
    D = W.t()[order].contiguous()
    T, N = D.clone(), torch.empty_like(D, dtype=torch.int16)
    rounder = _native_loop if W.device.type == "cpu" else _loop
    by_halves(D, T, L, _BLOCK, rounder(D, T, N, L, step[order]))
    out = torch.empty_like(N)
    out[order] = N
    return out.t().contiguous()


def _loop(D: Tensor, T: Tensor, N: Tensor, L: Tensor, step: Tensor) -> RoundBlock:
    """The reference, column by column in torch."""
    sizes = step.tolist()
    d, t, value = D.unbind(), T.unbind(), torch.empty_like(D[0])

    def round_block(start: int, stop: int) -> None:
        for j in range(start, stop):
            torch.div(t[j], sizes[j], out=value).round_().clamp_(-_TOP, _TOP)
            N[j] = value
            d[j].sub_(value, alpha=sizes[j])
            if j + 1 < stop:
                T[j + 1 : stop].addr_(L[j + 1 : stop, j], d[j])

    return round_block


def _native_loop(D: Tensor, T: Tensor, N: Tensor, L: Tensor, step: Tensor) -> RoundBlock:
    """The same, compiled: all columns of a block while a run of rows is in the cache."""
    aims, errors, numbers = T.numpy(), D.numpy(), N.numpy()
    factor, steps, threads = L.contiguous().numpy(), step.contiguous().numpy(), torch.get_num_threads()

    def round_block(start: int, stop: int) -> None:
        _native.round_block(aims, errors, numbers, factor, steps, start, stop, threads)

    return round_block
