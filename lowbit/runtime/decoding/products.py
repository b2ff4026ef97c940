"""Linears of one input as native code multiplies it by them: what a call needs, made once and watched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from lowbit.arrays import Tensor
from lowbit.runtime.decoding.halves import Half
from lowbit.runtime.decoding.swap import readable
from lowbit.runtime.kernels.packed import State
from lowbit.runtime.linear import QLinear


class Products(NamedTuple):
    """Addresses of what native code reads, and what keeps it there."""

    linears: tuple[QLinear | Half, ...]
    states: tuple[State, ...]
    held: tuple[Tensor | None, ...]
    """The biases."""
    natives: tuple[Any, ...]
    biases: tuple[int, ...]
    """Addresses, 0 for none."""
    rows: tuple[int, ...]

    def stand(self, module: nn.Module, names: Sequence[str]) -> bool:
        """Whether these are still the module's linears, and still hold what they held."""
        children = module._modules
        for name, linear, state, bias, at in zip(names, self.linears, self.states, self.held, self.biases, strict=True):
            moved = bias is not None and bias.data_ptr() != at  # a model that was cast keeps the same parameter
            if children[name] is not linear or not linear.holds(state, bias) or moved:
                return False
        return True


def products(module: nn.Module, names: Sequence[str], x: Tensor) -> Products | None:
    """Of the named children; None where one of them does more than multiply ``x``, or by another kernel.

    What was found is kept in ``module`` and found again in a microsecond.
    """
    found: dict[Any, Products] = module.__dict__.setdefault("_products", {})
    known = found.get(names)
    if known is None or not known.stand(module, names):
        known = _made([module.get_submodule(name) for name in names], x)
        if known is None:
            found.pop(names, None)
        else:
            found[names] = known
    return known


def _made(children: list[nn.Module], x: Tensor) -> Products | None:
    linears, states, held = [], [], []
    for linear in children:
        if not isinstance(linear, QLinear | Half):
            return None
        state, bias = linear.packed(x), linear.bias
        if state is None or not linear.holds(state, bias) or not (bias is None or readable(bias)):
            return None
        linears.append(linear)
        states.append(state)
        held.append(bias)
    return Products(
        tuple(linears), tuple(states), tuple(held), tuple(state.native for state in states),
        tuple(0 if bias is None else bias.data_ptr() for bias in held), tuple(state.shape[0] for state in states),
    )  # fmt: skip
