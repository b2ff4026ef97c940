"""Plain matrices in bf16, fp16 or fp32: what any loader reads, at 16 or 32 bits a weight.

A matrix is the decoded operator on raw inputs, rotations and gathered columns folded in, cast to the dtype; fp32 holds
it exactly. Rounded inputs and caches are lost, which the notes say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lowbit.arrays import Tensor
from lowbit.errors import CheckpointError
from lowbit.formats.activation import ActivationFormat, Input
from lowbit.formats.qtensor import QTensor
from lowbit.formats.spec import Spec
from lowbit.io.interchange.base import LowBitModel, Refusal


@dataclass(frozen=True)
class Dense:
    """Every linear as one plain matrix of ``dtype``."""

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    suffixes: ClassVar[frozenset[str]] = frozenset({"weight"})
    lost: tuple[str, ...] = ()

    @classmethod
    def refusal(cls, spec: Spec, input: ActivationFormat | None = None) -> Refusal | None:
        """Anything decodes."""
        return None

    @classmethod
    def for_model(cls, model: LowBitModel) -> Dense:
        lost = []
        if model.inputs:
            names = ", ".join(sorted({f.name for f in model.inputs.values()}))
            lost.append(f"the inputs of {len(model.inputs)} linears are not rounded in these files ({names})")
        if model.kv is not None:
            lost.append(f"the KV cache is not rounded in these files ({model.kv.key}, {model.kv.value})")
        return cls(tuple(lost))

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Dense:
        raise CheckpointError("plain matrices have no quantization_config", where=cls.name)

    def config(self) -> dict[str, Any]:
        return {}

    def files(self) -> dict[str, Any]:
        return {}

    def notes(self) -> tuple[str, ...]:
        return self.lost

    def pack(self, site: str, q: QTensor, input: Input | None = None) -> dict[str, Tensor]:
        """The matrix (out, in). Cost one decode."""
        return {"weight": q.decode(self.dtype).contiguous()}

    def unpack(self, site: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> tuple[QTensor, Input | None]:
        raise CheckpointError("a plain matrix has no codes", where=site, fix="lowbit quantize")


class BF16(Dense):
    """bfloat16: rounds what is decoded to 8 bits of mantissa."""

    name = "bf16"
    dtype = torch.bfloat16


class FP16(Dense):
    """float16: rounds what is decoded to 11 bits of mantissa; the range ends at 65504."""

    name = "fp16"
    dtype = torch.float16


class FP32(Dense):
    """float32: what is decoded, exactly."""

    name = "fp32"
    dtype = torch.float32
