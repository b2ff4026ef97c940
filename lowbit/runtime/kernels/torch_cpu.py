"""torch's own CPU kernels for few tokens at a time: int4 with groups, int8 with a scale a row.

Both read packed weights once and win where a decode step is bound by memory. For many tokens torch's int4 product is
a loop over single ones, so that decoding and one dense product is faster: those calls go to the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Tensor
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import Affine, QTensor
from lowbit.formats.spec import Spec
from lowbit.runtime.kernels.int8_products import signed, symmetric_int8

FEW_TOKENS = 8  # beyond this many rows of x the reference is faster
_INT8_STEP = 16  # torch's int8 kernel reads rows in whole steps, past the end of a ragged one


@dataclass(frozen=True)
class State:
    """Weights in the layout of one kernel."""

    dtype: torch.dtype
    device: torch.device
    weight: Tensor
    scale: Tensor
    group: int

    @property
    def key(self) -> tuple[torch.dtype, torch.device]:
        return self.dtype, self.device


@dataclass(frozen=True)
class Int4:
    """``_weight_int4pack_mm_for_cpu``: groups of 32, 64, 128 or 256; scales and zeros are rounded to bfloat16."""

    name: str = "torch-int4"
    prepared: bool = True
    tolerance: float = 2e-2

    def takes(self, spec: Spec, x: Tensor) -> bool:
        kind, _, size = str(spec.get("block")).partition(":")
        codes = spec.leaf("codes")
        return (
            _few_on_cpu(x, torch.bfloat16)
            and spec.node == "Affine"
            and codes is not None
            and codes.levels == 16
            and kind == "group"
            and size in ("32", "64", "128", "256")
            and spec.shape[1] % int(size) == 0
            and spec.shape[0] % 32 == 0
        )

    def prepare(self, q: QTensor, dtype: torch.dtype) -> State:
        assert isinstance(q, Affine)
        scale = q.scale.decode()  # (rows, groups)
        if q.zero is None:
            zero = torch.full_like(scale, 8.0)
        elif isinstance(q.zero, Codes):
            zero = q.zero.unpack().view(scale.shape).to(torch.float32)
        else:
            zero = q.zero.decode()
        codes = q.codes.unpack().to(torch.int32).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        # The kernel computes (q - 8) * scale + offset, groups first.
        offsets = torch.stack([scale, (8.0 - zero) * scale], dim=-1).transpose(0, 1).contiguous()
        return State(dtype, codes.device, packed, offsets.to(dtype), q.block.size[0])

    def run(self, x: Float[Tensor, "*batch in"], state: State) -> Float[Tensor, "*batch out"]:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, state.weight, state.group, state.scale)
        return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Int8:
    """``_weight_int8pack_mm``: symmetric int8 with one scale a row."""

    name: str = "torch-int8"
    prepared: bool = True
    tolerance: float = 2e-2

    def takes(self, spec: Spec, x: Tensor) -> bool:
        return (
            _few_on_cpu(x, torch.bfloat16)
            and symmetric_int8(spec)
            and spec.get("block") == "row"
            and spec.shape[1] % _INT8_STEP == 0
        )

    def prepare(self, q: QTensor, dtype: torch.dtype) -> State:
        assert isinstance(q, Affine)
        codes = signed(q.codes)
        return State(dtype, codes.device, codes.contiguous(), q.scale.decode(dtype).view(-1), q.shape[1])

    def run(self, x: Float[Tensor, "*batch in"], state: State) -> Float[Tensor, "*batch out"]:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = torch.ops.aten._weight_int8pack_mm(flat, state.weight, state.scale)
        return y.view(*x.shape[:-1], -1)


def works() -> bool:
    """Whether this build of torch has the kernels for this processor (they need at least AVX2)."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _few_on_cpu(x: Tensor, dtype: torch.dtype) -> bool:
    return x.device.type == "cpu" and works() and x.dtype == dtype and 0 < x.numel() // x.shape[-1] <= FEW_TOKENS


INT4, INT8 = Int4(), Int8()
