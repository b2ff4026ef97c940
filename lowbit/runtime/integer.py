"""Integer-only linears: int8 in, int8 out, and no floating-point number between.

    acc = W_q x_q + b_q                 int8 products, int32 sums; the input's zero point is folded into b_q
    y_q = clamp(((acc * m) >> s) + z)   m an int32 multiplier, s a shift, a row each; rounds half up

Real numbers enter only when the linear is made: the ratio of scales ``s_x s_w / s_y`` is written as ``m 2^-s`` with
31 significant bits (Jacob et al., arXiv 1712.05877, section 2.2; integer-only inference of Q-ASR, arXiv 2103.16827).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import FormatError
from lowbit.formats.qtensor import Affine, QTensor
from lowbit.runtime.kernels.int8_products import signed, symmetric_int8

_LARGEST = 2**31 - 1
_SHIFT = range(1, 63)  # a product of two int32 has 62 bits


@dataclass(frozen=True)
class Scaling:
    """An int8 activation: the real value of code ``q`` is ``scale * (q - zero)``."""

    scale: float
    zero: int

    @classmethod
    def of_range(cls, low: float, high: float) -> Scaling:
        """All 256 codes over a range, which is widened to include zero. Raises FormatError for an empty one."""
        low, high = min(low, 0.0), max(high, 0.0)
        if not 0 < high - low < math.inf:
            raise FormatError(f"the range [{low}, {high}] has no scale", fix="a range that calibration measured")
        scale = (high - low) / 255
        return cls(scale, round(-low / scale) - 128)

    def encode(self, x: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The nearest int8 codes; beyond the ends, of the end."""
        return torch.round(x / self.scale).add_(self.zero).clamp_(-128, 127).to(torch.int8)

    def decode(self, q: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (q.to(torch.float32) - self.zero) * self.scale


@dataclass(frozen=True, eq=False)
class IntegerLinear:
    """A linear over int8 codes; see the module for its two lines of arithmetic."""

    weight: Int[Tensor, "out in"]
    bias: Int[Tensor, "out"]
    multiplier: Int[Tensor, "out"]
    shift: Int[Tensor, "out"]
    zero: int

    @classmethod
    def of(cls, q: QTensor, bias: Float[Tensor, "out"] | None, x: Scaling, y: Scaling) -> IntegerLinear:
        """The integer form of ``x Wᵀ + b`` with inputs and outputs scaled by ``x`` and ``y``.

        Raises FormatError unless W is ``int8-row-sym`` or ``int8-tensor-sym`` of at least two columns, when a sum
        could leave int32, and when a ratio of scales is beyond 2^±30.
        """
        whole = symmetric_int8(q.spec()) and isinstance(q, Affine) and q.block.kind in ("row", "tensor")
        if not whole or not isinstance(q, Affine):
            raise FormatError("needs symmetric int8 weights with a scale a row", fix="format int8-row-sym")
        if q.shape[1] < 2:
            raise FormatError(
                "a linear of one input", why="torch's int8 product is wrong for it", fix="keep it as it is"
            )
        weight = signed(q.codes)
        scale = q.scale.decode(torch.float64).expand(q.shape[0], 1)[:, 0]
        sums = weight.sum(1, dtype=torch.int64)
        folded = -x.zero * sums
        if bias is not None:
            folded += torch.round(bias.to(torch.float64) / (scale * x.scale)).to(torch.int64)
        reach = weight.to(torch.int64).abs().sum(1) * 128 + folded.abs()
        if int(reach.max()) > _LARGEST:
            raise FormatError(
                f"a sum over {q.shape[1]} products can reach {int(reach.max())}", why="int32 ends at 2^31 - 1",
                fix="a larger scale for the inputs, or this linear in floating point",
            )  # fmt: skip
        multiplier, shift = _dyadic(scale * x.scale / y.scale)
        return cls(weight, folded.to(torch.int32), multiplier, shift, y.zero)

    def __call__(self, x: Int[Tensor, "*batch in"]) -> Int[Tensor, "*batch out"]:
        """int8 codes to int8 codes. Cost one int8 product and four integer passes over the output."""
        flat = x.reshape(-1, x.shape[-1])
        acc = torch._int_mm(flat, self.weight.t()) + self.bias
        half = torch.ones_like(self.shift) << (self.shift - 1)
        scaled = (acc.to(torch.int64) * self.multiplier + half) >> self.shift
        y = scaled.add_(self.zero).clamp_(-128, 127).to(torch.int8)
        return y.view(*x.shape[:-1], -1)


def _dyadic(ratio: Float[Tensor, "out"]) -> tuple[Int[Tensor, "out"], Int[Tensor, "out"]]:
    """``m`` (int32) and ``s`` with ``m 2^-s`` within 2^-31 of each ratio, relatively."""
    mantissa, exponent = torch.frexp(ratio)
    multiplier = torch.round(mantissa * 2.0**31).clamp_(max=_LARGEST)
    shift = 31 - exponent.to(torch.int64)
    multiplier, shift = multiplier.where(ratio > 0, 0), shift.where(ratio > 0, 31)  # a row of zeros
    if not _SHIFT.start <= int(shift.min()) <= int(shift.max()) < _SHIFT.stop:
        raise FormatError(
            f"ratios of scales from {float(ratio.min()):.3g} to {float(ratio.max()):.3g}",
            why="a multiplier and a shift reach from 2^-31 to 2^30", fix="the ranges that calibration measured",
        )  # fmt: skip
    return multiplier.to(torch.int32), shift
