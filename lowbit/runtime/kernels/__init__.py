"""Kernels: ways to compute ``x Wᵀ`` for a QTensor W, chosen by spec, device and dtype.

Every kernel computes what the plain reference computes, within its stated tolerance, and is tested against it by
one parametrised test. The order below is the order of preference under the policy ``auto``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn.functional import linear

from lowbit.arrays import Float, Tensor
from lowbit.errors import RecipeError, nearest
from lowbit.formats.activation import Input
from lowbit.formats.qtensor import QTensor
from lowbit.formats.spec import Spec


@runtime_checkable
class Kernel(Protocol):
    """One way to multiply. A prepared kernel builds a state once a layer and dtype."""

    @property
    def name(self) -> str: ...
    @property
    def prepared(self) -> bool: ...
    @property
    def tolerance(self) -> float:
        """Largest error relative to the largest output, against the reference in the same dtype."""

    def takes(self, spec: Spec, x: Tensor) -> bool: ...
    def prepare(self, q: QTensor, dtype: torch.dtype) -> Any: ...
    def run(self, x: Tensor, state: Any) -> Tensor: ...


@dataclass(frozen=True)
class Reference:
    """Decode the whole weight at every call: works for every tree, keeps only packed bytes in memory."""

    name: str = "reference"
    prepared: bool = False
    tolerance: float = 0.0

    def takes(self, spec: Spec, x: Tensor) -> bool:
        return True

    def prepare(self, q: QTensor, dtype: torch.dtype) -> QTensor:
        return q

    def run(self, x: Float[Tensor, "*batch in"], state: QTensor) -> Float[Tensor, "*batch out"]:
        return linear(x, state.decode(x.dtype))


@dataclass(frozen=True)
class Dense:
    """Decode once and keep the result: the speed and the memory of the original dtype; exact."""

    name: str = "dense"
    prepared: bool = True
    tolerance: float = 0.0

    def takes(self, spec: Spec, x: Tensor) -> bool:
        return True

    def prepare(self, q: QTensor, dtype: torch.dtype) -> DenseState:
        return DenseState(q.decode(dtype))

    def run(self, x: Float[Tensor, "*batch in"], state: DenseState) -> Float[Tensor, "*batch out"]:
        return linear(x, state.weight)


@dataclass(frozen=True)
class DenseState:
    weight: Tensor

    @property
    def key(self) -> tuple[torch.dtype, torch.device]:
        return self.weight.dtype, self.weight.device


REFERENCE, DENSE = Reference(), Dense()


def kernels() -> list[Kernel]:
    """All kernels, the preferred first, the reference last."""
    from lowbit.runtime.kernels.coded import CODED
    from lowbit.runtime.kernels.packed import PACKED
    from lowbit.runtime.kernels.torch_cpu import INT4, INT8

    return [INT8, INT4, PACKED, CODED, REFERENCE]


POLICIES = ("auto", "reference", "dense")


def check_policy(policy: str) -> str:
    """The policy itself; raises RecipeError when there is no such."""
    if policy not in POLICIES:
        raise RecipeError(f"unknown kernel policy {policy!r}", fix=nearest(policy, POLICIES))
    return policy


def choose(policy: str, spec: Spec, x: Tensor, rounding: Input | None = None) -> Kernel:
    """The kernel for this weight and input under a policy; raises RecipeError for an unknown policy.

    Where inputs are rounded, under ``auto``, one that multiplies what they are rounded to as integers comes first.
    """
    match check_policy(policy):
        case "reference":
            return REFERENCE
        case "dense":
            return DENSE
        case _:
            from lowbit.runtime.kernels.int8_products import Int8Products

            first = [] if rounding is None else [Int8Products(rounding)]
            return next(k for k in [*first, *kernels()] if k.takes(spec, x))


def usable() -> list[tuple[str, bool, str]]:
    """Every kernel by name, whether this machine can run it, and when it is chosen."""
    from lowbit import _native
    from lowbit.runtime.kernels import int8_products
    from lowbit.runtime.kernels.coded import CODED
    from lowbit.runtime.kernels.packed import PACKED
    from lowbit.runtime.kernels.torch_cpu import FEW_TOKENS, INT4, INT8, works

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = "int8-row-sym or int8-tensor-sym weights, inputs rounded to integers, 8 tokens a call and more (CUDA: 17)"
    few = f"bfloat16 activations, at most {FEW_TOKENS} tokens a call"
    return [
        ("int8-products", int8_products.exact(device), whole),
        (INT8.name, works(), f"int8-row-sym weights, columns in multiples of 16, {few}"),
        (INT4.name, works(), f"int4 in groups of 32, 64, 128 or 256, {few}"),
        (PACKED.name, True, f"1 to 8 bits in groups of multiples of 16, and 16, on the CPU with {_native.isa()}"),
        (CODED.name, True, f"entropy-coded weights on the CPU, decoded with {_native.isa()} as they are multiplied"),
        (REFERENCE.name, True, "everything else: decode at every call"),
        (DENSE.name, True, "on request, and in scoring: decode once"),
    ]
