"""QLinear: a linear over a QTensor, as a module that transformers can load, move and save.

The tree of a QTensor becomes a tree of modules with one buffer a leaf, so that a checkpoint's tensor names are the
module's own state: ``...q_proj.weight.codes``, ``...q_proj.weight.scale.data``, ``...q_proj.input.low``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lowbit.arrays import Float, Int, Tensor
from lowbit.formats.activation import ActivationFormat, Input
from lowbit.formats.qtensor import QTensor, build
from lowbit.formats.spec import Spec
from lowbit.runtime.gradients import Product, StraightThrough
from lowbit.runtime.inner import Inner
from lowbit.runtime.kernels import REFERENCE, Kernel, check_policy, choose
from lowbit.runtime.kernels.int8_products import Int8Products
from lowbit.runtime.kernels.packed import PACKED, State


class Stored(nn.Module):
    """Buffers as they are stored: moves change their device, never their dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        """``model.half()`` must not round a float32 scale."""

        def move(part: Tensor) -> Tensor:
            moved = fn(part)
            return moved if moved.dtype == part.dtype else part.to(moved.device)

        super()._apply(move, recurse)
        return self


class PackedWeight(Stored):
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

    def point(self, parts: Mapping[str, Tensor]) -> None:
        """Let other memory hold the parts, by path: what a weight that passes through a buffer does at every pass."""
        for path, part in parts.items():
            owner, _, leaf = path.rpartition(".")
            self.get_submodule(owner)._buffers[leaf] = part

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class Rounding(Stored):
    """How a linear rounds its inputs; ``low`` and ``high`` are buffers where the range is static."""

    low: Tensor | None
    high: Tensor | None

    def __init__(self, format: ActivationFormat, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.format = format
        for name in ("low", "high"):
            self.register_buffer(name, torch.empty(1, device=device) if format.static else None)

    @classmethod
    def of(cls, input: Input) -> Rounding:
        rounding = cls(input.format)
        rounding.low, rounding.high = input.low, input.high
        return rounding

    def forward(
        self, x: Float[Tensor, "*batch in"], exact: Int[Tensor, "k"] | None = None
    ) -> Float[Tensor, "*batch in"]:
        """``x`` rounded; the columns ``exact`` are not. Gradients pass as if nothing were rounded."""
        rounded = self.value().round(x.detach(), exact)
        found: Tensor = StraightThrough.apply(x, rounded) if x.requires_grad else rounded
        return found

    def value(self) -> Input:
        return Input(self.format, self.low, self.high)

    def extra_repr(self) -> str:
        return self.format.name


class QLinear(nn.Module):
    """``y = round(x) Wᵀ + b`` with W a QTensor; inputs are rounded where there is an ``input`` format.

    A weight that acts on changed inputs (``Rotated``, ``Gathered``) is multiplied in that basis, where they are also
    rounded. Which kernel runs is chosen by spec, device and dtype (see ``kernel``).
    """

    def __init__(
        self, spec: Spec, bias: bool, dtype: torch.dtype, device: torch.device | str = "meta",
        input: ActivationFormat | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_features, self.in_features = spec.shape
        self.weight = PackedWeight(spec, dtype, device)
        self.input = None if input is None else Rounding(input, device)
        self.bias = nn.Parameter(torch.empty(spec.shape[0], dtype=dtype, device=device), False) if bias else None
        self.policy = "auto"
        self._only: Kernel | None = None
        self._tree: Inner | None = None
        self._states: dict[str, Any] = {}  # of each kernel that has run
        self._chosen: tuple[tuple[Any, ...], Kernel] | None = None  # for the last kind of input
        self._number = _numbered(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes what kernels need for itself."""
        return self.__dict__ | {"_tree": None, "_states": {}, "_chosen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has a number of its own."""
        super().__setstate__(state)
        self._number = _numbered(self)

    @classmethod
    def of(
        cls, q: QTensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32, input: Input | None = None
    ) -> QLinear:
        """A linear over ``q`` that shares its tensors; ``dtype`` is that of the activations."""
        linear = cls(q.spec(), bias is not None, dtype)
        linear.weight = PackedWeight.of(q, dtype)
        linear.input = None if input is None else Rounding.of(input)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear

    def use(self, policy: str) -> None:
        """Choose kernels: ``auto``, ``reference`` (decode at every call) or ``dense`` (decode once, keep it).

        Raises RecipeError for any other word.
        """
        self.policy, self._only = check_policy(policy), None
        self._forget()

    def use_only(self, kernel: Kernel) -> None:
        """Run every call by this kernel, whatever the policies would choose."""
        self.policy, self._only = kernel.name, kernel
        self._forget()

    def point(self, parts: Mapping[str, Tensor]) -> None:
        """Take the weight's parts from other memory from now on, and forget what was made from the old one."""
        self.weight.point(parts)
        self._forget()

    def kernel(self, x: Tensor) -> Kernel:
        """The kernel that a call with ``x`` runs."""
        inner = self._inner()
        return self._choose(inner.spec, x, self.input if inner.exact is None else None)

    @property
    def only(self) -> Kernel | None:
        """The kernel that runs every call, where one was set."""
        return self._only

    def packed(self, x: Float[Tensor, "*batch in"]) -> State | None:
        """What the kernel for packed weights multiplies ``x`` by, where that and the bias are all that a call does."""
        inner = self._inner()
        if inner.entries or self.input is not None or self._choose(inner.spec, x, None) is not PACKED:
            return None
        state: State = self._prepared(PACKED, inner.weight, x)
        return state

    def holds(self, state: State, bias: Tensor | None) -> bool:
        """Whether a call still is what ``packed`` said, with this bias, and nobody listens to it."""
        same = self._states.get("packed") is state and self._parameters.get("bias") is bias
        return same and not self._forward_hooks and not self._forward_pre_hooks

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not torch.compiler.is_compiling():
            return self.multiply(x)
        if x.requires_grad:
            y: Tensor = _uncompiled(self, x)
        else:
            y = torch.ops.lowbit.linear(x, self._number)
        return y

    def multiply(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """What ``forward`` computes; compilers see it as one operator, whose kernels are chosen when it runs."""
        inner = self._inner()
        x = inner.enter(x)
        kernel = self._choose(inner.spec, x, self.input if inner.exact is None else None)
        if self.input is not None and not isinstance(kernel, Int8Products):
            x = self.input(x, inner.exact)
        if kernel is REFERENCE and x.requires_grad:
            y = Product.apply(x, inner.weight)
        elif not kernel.prepared:
            y = kernel.run(x, inner.weight)
        else:
            y = kernel.run(x, self._prepared(kernel, inner.weight, x))
        out: Tensor = y if self.bias is None else y + self.bias.to(y.dtype)
        return out

    def _choose(self, spec: Spec, x: Tensor, rounds: Rounding | None) -> Kernel:
        """``auto`` is the reference where gradients are wanted: other kernels have none.

        What was chosen for the last input serves others of its kind: asking all takes as long as a small product.
        """
        if self._only is not None:
            return self._only
        bounds = None if rounds is None else (id(rounds), id(rounds.low), id(rounds.high))  # a kernel holds them
        kind = x.dtype, x.device, x.numel(), x.requires_grad, bounds
        if self._chosen is None or self._chosen[0] != kind:
            gradients = self.policy == "auto" and x.requires_grad
            rounding = None if rounds is None else rounds.value()
            self._chosen = kind, REFERENCE if gradients else choose(self.policy, spec, x, rounding)
        return self._chosen[1]

    def _prepared(self, kernel: Kernel, weight: QTensor, x: Tensor) -> Any:
        """What the kernel made of the weight for this dtype and device."""
        state = self._states.get(kernel.name)
        if state is None or state.key != (x.dtype, x.device):
            state = self._states[kernel.name] = kernel.prepare(weight, x.dtype)
        return state

    def _inner(self) -> Inner:
        """The weight's tree, made once: its tensors are the module's own."""
        if self._tree is None:
            self._tree = Inner.of(self.weight.qtensor())
        return self._tree

    def _forget(self) -> None:
        """Drop what was made from the weights as they were."""
        self._tree, self._states, self._chosen = None, {}, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        """What was made from the parts belongs to the old device; they keep their dtypes (see ``Stored``)."""
        self._forget()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


# --- compilers -------------------------------------------------------------------------------------------------------

_linears: weakref.WeakValueDictionary[int, QLinear] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _numbered(linear: QLinear) -> int:
    """A number by which the operator below finds a linear: graphs hold numbers and tensors, but no modules."""
    number = next(_numbers)
    _linears[number] = linear
    return number


@torch.library.custom_op("lowbit::linear", mutates_args=(), schema="(Tensor x, int number) -> Tensor")
def _operator(x: Float[Tensor, "*batch in"], number: int) -> Float[Tensor, "*batch out"]:
    return _linears[number].multiply(x)


@_operator.register_fake
def _(x: Float[Tensor, "*batch in"], number: int) -> Float[Tensor, "*batch out"]:
    return x.new_empty(*x.shape[:-1], _linears[number].out_features)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(linear: QLinear, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
    """With gradients, between two graphs."""
    return linear.multiply(x)
