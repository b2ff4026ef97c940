"""Gradients through low-bit linears, of their inputs: codes have none."""

from __future__ import annotations

from typing import Any

import torch

from lowbit.arrays import Float, Tensor
from lowbit.formats.qtensor import QTensor


class StraightThrough(torch.autograd.Function):
    """Rounded values with the gradient of what was rounded (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*shape"], rounded: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], None]:
        return gradients[0], None


class Product(torch.autograd.Function):
    """``x Wᵀ`` with the gradient of ``x``.

    W is decoded once more for it: kept for every linear, it would take the memory of a dense model.
    """

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*batch in"], weight: QTensor) -> Float[Tensor, "*batch out"]:
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.decode(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "*batch out"]) -> tuple[Float[Tensor, "*batch in"], None]:
        return gradients[0] @ ctx.weight.decode(gradients[0].dtype), None
