"""Integer products: int8 weights with a scale a row or tensor times inputs rounded to integers, summed in int32.

    x = s_x (q - z)    the rounding of the inputs (``formats/activation.py``): a step and a zero point a token or tensor
    y = s_w s_x (W_q (q - c) + (c - z) sum(W_q))       c is the middle code, so that q - c has eight bits and a sign

All but the two factors is exact, whatever the order of sums: an output is within three roundings to float32 (a relative
3 * 2^-24) of the exact product of the rounded inputs and weights. With ``n`` columns, decoding and multiplying in
float32 is within ``(n + 2) 2^-24 sum |x W|``, so that both agree within ``(n + 5) 2^-24 sum |x W|``.

torch's ``_int_mm`` multiplies: oneDNN's VNNI and AMX code on the CPU, tensor cores on CUDA. Weights are held a second
time, as signed bytes. Source: Jacob et al., arXiv 1712.05877, sections 2.2 and 2.3.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.formats.activation import Input
from lowbit.formats.grids import IntGrid
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import Affine, QTensor
from lowbit.formats.spec import Spec

COLUMNS = range(2, 1 << 16)
"""Of one column torch's product is wrong; of more than these a sum of ``n * 2^15`` leaves int32."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_ON_CPU = 8  # for fewer rows of x, rounding costs most, and products of packed weights as little
_MANY_ON_CUDA, _STEP_ON_CUDA = 17, 8  # the least rows of x, and what rows and columns of W are multiples of


@dataclass(frozen=True)
class State:
    """A weight as it is multiplied."""

    dtype: torch.dtype
    weight: Int[Tensor, "out in"]
    scale: Float[Tensor, "out"]
    sums: Int[Tensor, "out"]

    @property
    def key(self) -> tuple[torch.dtype, torch.device]:
        return self.dtype, self.weight.device


@dataclass(frozen=True)
class Int8Products:
    """The kernel of a linear that rounds its inputs so: it rounds them itself, and is given them as they came."""

    input: Input
    name: str = "int8-products"
    prepared: bool = True
    tolerance: float = 1e-2
    """That of bfloat16 and float16, in which the reference holds rounded inputs; see the module for float32."""

    def takes(self, spec: Spec, x: Tensor) -> bool:
        """Whether weights are symmetric int8, inputs integers by token or tensor, and the processor made for them."""
        rounding = self.input.format.format
        return (
            isinstance(rounding.grid, IntGrid)
            and rounding.grid.levels <= 256
            and rounding.block.kind in ("row", "tensor")
            and symmetric_int8(spec)
            and str(spec.get("block")) in ("row", "tensor")
            and spec.shape[1] in COLUMNS
            and x.dtype in _DTYPES
            and x.numel() > 0
            and not x.requires_grad
            and _fits(x, spec.shape)
        )

    def prepare(self, q: QTensor, dtype: torch.dtype) -> State:
        """Cost: a pass over the codes; as many bytes as they have are kept."""
        assert isinstance(q, Affine)
        weight = signed(q.codes)
        scale = q.scale.decode().expand(q.shape[0], 1)[:, 0].contiguous()
        return State(dtype, weight, scale, weight.sum(1, dtype=torch.int32))

    def run(self, x: Float[Tensor, "*batch in"], state: State) -> Float[Tensor, "*batch out"]:
        codes, step, shift = self.coded(x.reshape(-1, x.shape[-1]).to(torch.float32))
        total = torch._int_mm(codes, state.weight.t())
        if shift is not None:
            total.add_(shift * state.sums)
        y = total.to(torch.float32).mul_(step).mul_(state.scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def coded(
        self, rows: Float[Tensor, "tokens in"]
    ) -> tuple[Int[Tensor, "tokens in"], Float[Tensor, "_ 1"], Int[Tensor, "_ 1"] | None]:
        """Codes less the middle one, the step of each row or of all, and the middle less its zero point.

        ``(codes + shift) * step`` is what the format rounds ``rows`` to, to the bit; a token of NaN has a step of NaN.
        """
        rounding, static = self.input.format.format, self.input.low is not None
        assert isinstance(rounding.grid, IntGrid)
        if self.input.low is not None and self.input.high is not None:
            low, high = (bound.to(rows.device, torch.float32).view(1, 1) for bound in (self.input.low, self.input.high))
        else:
            low, high = torch.aminmax(rounding.block.split(rows), dim=-1)
            low, high = low.view(-1, 1), high.view(-1, 1)
        step, zero = self.input.format.grid(low.clamp(max=0), high.clamp(min=0))
        codes = rounding.snap(rows, step, zero).codes.sub_(rounding.grid.offset).to(torch.int8)
        if static:  # a range that was measured before knows nothing of a token that is none
            step = step.where(~rows.isnan().any(1, keepdim=True), math.nan)
        return codes, step, None if zero is None else (rounding.grid.offset - zero).to(torch.int32)


def symmetric_int8(spec: Spec) -> bool:
    """Whether a weight is integers of eight bits without zero points, whatever its blocks."""
    codes = spec.leaf("codes")
    plain = spec.leaf("zero") is None and spec.child("zero") is None
    return spec.node == "Affine" and codes is not None and codes.levels == 256 and plain


def signed(codes: Codes) -> Int[Tensor, "rows columns"]:
    """Codes of 256 levels around their middle, 128."""
    return codes.unpack().bitwise_xor(128).view(torch.int8)


@functools.cache
def exact(device: torch.device) -> bool:
    """Whether int8 products on a device are both made for it and sums of extreme ones right to the last bit.

    On a CPU that takes VNNI: older processors add pairs of products in 16 bits, some too large for them.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and not torch.cpu._is_vnni_supported()):
        return False
    a = torch.full((32, 64), -128, dtype=torch.int8)
    a[::2] = 127
    return torch.equal(torch._int_mm(a.to(device), a.to(device).t()).cpu().long(), a.long() @ a.long().T)


def _fits(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether torch multiplies operands of these sizes by code of the processor's own."""
    tokens = x.numel() // x.shape[-1]
    if x.device.type == "cuda":
        return all(n % _STEP_ON_CUDA == 0 for n in shape) and tokens >= _MANY_ON_CUDA and exact(x.device)
    return tokens >= MANY_ON_CPU and exact(x.device)
