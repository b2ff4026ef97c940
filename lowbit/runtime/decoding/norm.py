"""RMS norms in one operation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from lowbit import _native
from lowbit.arrays import Float, Tensor
from lowbit.runtime.decoding.swap import Swapped, agree, plain, sample
from lowbit.runtime.kernels.packed import FEW_TOKENS


class Norm(Swapped):
    """``x / sqrt(mean(x²) + ε) * (weight + shift)``, where the shift (0, or 1 as in Gemma) is found by trying."""

    weight: Tensor
    shift: float = 0.0
    kept: ClassVar[tuple[str, ...]] = ("same", "shift")

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        names = [name for name, _ in module.named_parameters()]
        return (
            type(module).__name__.endswith("RMSNorm")
            and names == ["weight"]
            and module.get_parameter("weight").ndim == 1
            and isinstance(_epsilon(module), float)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and plain(args[0]) and self._takes(args[0]):
            if self.same is None:
                self._try()
            if self.same:
                return self._normed(args[0])
        own: Tensor = super().forward(*args, **kwargs)
        return own

    def _takes(self, x: Tensor) -> bool:
        weight = self.weight
        few = x.shape[-1] == weight.shape[0] and 0 < x.numel() <= FEW_TOKENS * weight.shape[0]
        return few and weight.dtype is torch.float32 and weight.is_contiguous()

    def _try(self) -> None:
        x = sample(2, self.weight.shape[0])
        own = super().forward(x)
        for self.shift in (0.0, 1.0):
            self.same = agree(own, self._normed(x))
            if self.same:
                return

    def _normed(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        y, weight = torch.empty_like(x), self.weight
        d = weight.shape[0]
        _native.norm(
            x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // d, d, _epsilon(self), self.shift
        )  # fmt: skip
        return y


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
