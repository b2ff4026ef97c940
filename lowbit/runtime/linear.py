"""QLinear: a linear over a QTensor, as a module that transformers can load, move and save.

The tree of a QTensor becomes a tree of modules with one buffer a leaf, so that a checkpoint's tensor names are the
module's own state: ``...q_proj.weight.codes``, ``...q_proj.weight.scale.data``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowbit.arrays import Float, Tensor
from lowbit.formats.qtensor import QTensor, build
from lowbit.formats.spec import Spec
from lowbit.runtime.kernels import Kernel, check_policy, choose


class PackedWeight(nn.Module):
    """The parts of a QTensor as buffers; ``qtensor()`` is the value itself.

    ``dtype`` is the one that weights are computed in, not stored in: transformers asks a linear's weight for it.
    """

    def __init__(self, spec: Spec, dtype: torch.dtype, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        for leaf in spec.leaves:
            empty = torch.empty(leaf.shape, dtype=getattr(torch, leaf.dtype), device=device)
            self.register_buffer(leaf.name, empty)
        for name, child in spec.children:
            self.add_module(name, PackedWeight(child, dtype, device))

    @classmethod
    def of(cls, q: QTensor, dtype: torch.dtype) -> PackedWeight:
        packed = cls(q.spec(), dtype)
        packed.load_state_dict({part.path: part.data for part in q.parts()}, assign=True)
        return packed

    def qtensor(self) -> QTensor:
        return build(self.spec, dict(self.named_buffers()))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves change devices, never dtypes: ``model.half()`` must not round a float32 scale."""

        def move(part: Tensor) -> Tensor:
            moved = fn(part)
            return moved if moved.dtype == part.dtype else part.to(moved.device)

        super()._apply(move, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class QLinear(nn.Module):
    """``y = x Wᵀ + b`` with W a QTensor. Which kernel runs is chosen by spec, device and dtype (see ``kernel``)."""

    def __init__(self, spec: Spec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.out_features, self.in_features = spec.shape
        self.weight = PackedWeight(spec, dtype, device)
        self.bias = nn.Parameter(torch.empty(spec.shape[0], dtype=dtype, device=device), False) if bias else None
        self.policy = "auto"
        self._state: tuple[Kernel, Any] | None = None

    @classmethod
    def of(cls, q: QTensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> QLinear:
        """A linear over ``q`` that shares its tensors; ``dtype`` is that of the activations."""
        linear = cls(q.spec(), bias is not None, dtype)
        linear.weight = PackedWeight.of(q, dtype)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear

    def use(self, policy: str) -> None:
        """Choose kernels: ``auto``, ``reference`` (decode at every call) or ``dense`` (decode once, keep it).

        Raises RecipeError for any other word.
        """
        self.policy, self._state = check_policy(policy), None

    def kernel(self, x: Tensor) -> Kernel:
        """The kernel that a call with ``x`` runs."""
        return choose(self.policy, self.weight.spec, x)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        kernel = self.kernel(x)
        if not kernel.prepared:
            y = kernel.run(x, self.weight.qtensor())
        else:
            if self._state is None or self._state[0] is not kernel or self._state[1].key != (x.dtype, x.device):
                self._state = kernel, kernel.prepare(self.weight.qtensor(), x.dtype)
            y = kernel.run(x, self._state[1])
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        """What a kernel prepared belongs to the old device; packed parts keep their dtypes (see ``PackedWeight``)."""
        self._state = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._state = None  # prepared from the old weights
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
