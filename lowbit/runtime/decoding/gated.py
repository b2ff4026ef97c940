"""Gated feed-forwards in one call."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.activations import SiLUActivation

from lowbit import _native
from lowbit.arrays import Float, Tensor
from lowbit.runtime.decoding.products import products
from lowbit.runtime.decoding.swap import Swapped, agree, plain, sample
from lowbit.runtime.kernels.packed import FEW_TOKENS

_LARGE = 1000  # of a second trial: what cuts large numbers off is not this feed-forward
_BOTH, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)


class Gated(Swapped):
    """``down(silu(gate(x)) * up(x))``."""

    kept: ClassVar[tuple[str, ...]] = ("same", "_products")
    fleeting: ClassVar[tuple[str, ...]] = ("_products",)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        named = {name for name, _ in module.named_children()}
        return named == {*_BOTH, *_DOWN, "act_fn"} and isinstance(module.act_fn, nn.SiLU | SiLUActivation)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found = self._found(args[0]) if len(args) == 1 and not kwargs and plain(args[0]) else None
        return self._own(*args, **kwargs) if found is None else found

    def _own(self, *args: Any, **kwargs: Any) -> Tensor:
        own: Tensor = super().forward(*args, **kwargs)
        return own

    def _found(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"] | None:
        if self.same is None:
            if products(self, _BOTH, x) is None or products(self, _DOWN, x) is None:
                return None
            self.same = True
            for size in (1, _LARGE):
                tried = size * sample(1, x.shape[-1])
                found = self._step(tried)
                self.same = self.same and found is not None and agree(self._own(tried), found)
        return self._step(x) if self.same else None

    def _step(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"] | None:
        """None for many tokens, and for linears that have another way."""
        numbers = x.numel()
        if not 0 < numbers <= FEW_TOKENS * x.shape[-1]:
            return None
        both, down = products(self, _BOTH, x), products(self, _DOWN, x)
        if both is None or down is None:
            return None
        y = torch.empty(*x.shape[:-1], down.rows[0])
        _native.gated(
            both.natives, both.biases, down.natives, down.biases, x.data_ptr(), numbers, y.data_ptr(), y.numel(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y
