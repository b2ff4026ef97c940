"""Dense weights in 16 bits, where every one of them is a 16-bit number: the same values, half the bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lowbit.arrays import Float, Int, Tensor
from lowbit.runtime.decoding.swap import Swapped, plain, swap, swap_back
from lowbit.runtime.kernels import packed
from lowbit.runtime.kernels.packed import PACKED, State

_ROWS = 1024  # looked at together


class Held(Swapped):
    """A module whose weight is a buffer of 16 bits, so that the model's parameters keep one dtype.

    A model that is cast leaves it as it is, and none is loaded into it, which would round.
    """

    weight: Tensor
    state: Any = None

    def _apply(self, fn: Any, recurse: bool = True) -> Held:
        self.state, weight = None, self._buffers.pop("weight")
        assert weight is not None
        moved: Held = super()._apply(fn, recurse)
        moved.register_buffer("weight", weight.to(fn(weight[:0]).device))
        return moved

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        error_msgs.append(f"{prefix}weight is held in 16 bits for decoding: restore(model) first")


class Half(Held):
    """A linear in 16 bits."""

    bias: Tensor | None
    trains: bool = False
    state: State | None
    kept: ClassVar[tuple[str, ...]] = ("same", "trains", "state")
    fleeting: ClassVar[tuple[str, ...]] = ("state",)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return type(module) is nn.Linear

    def packed(self, x: Float[Tensor, "*batch in"]) -> State | None:
        """What ``x`` is multiplied by; None where that is done by torch."""
        if not plain(x) or x.numel() == 0:
            return None
        if self.state is None:
            self.state = packed.halves(self.weight, x.dtype)
        return self.state

    def holds(self, state: State, bias: Tensor | None) -> bool:
        """As :meth:`QLinear.holds`."""
        same = self.state is state and self._parameters.get("bias") is bias
        return same and not self._forward_hooks and not self._forward_pre_hooks

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        state = self.packed(x)
        if state is None:
            return linear(x, self.weight.to(x.dtype), self.bias)
        y = PACKED.run(x, state)
        return y if self.bias is None else y + self.bias


class HalfEmbedding(Held):
    """An embedding whose rows are made float32 as they are looked up."""

    trains: bool = False
    kept: ClassVar[tuple[str, ...]] = ("same", "trains", "state")

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return type(module) is nn.Embedding and module.max_norm is None

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d"]:
        found: Tensor = super().forward(ids)
        return found.to(torch.float32)


def halve(model: PreTrainedModel, parents: Iterable[nn.Module]) -> None:
    """Hold in 16 bits the head, with the embedding that shares its weight, and the linears right below ``parents``.

    Only what is float32 and loses nothing; weights that other modules share too are left.
    """
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)
    wanted = [child for parent in parents for child in parent.children()]
    for module in [*wanted, model.get_output_embeddings()]:
        if module is None or not Half.fits(module):
            continue
        sharing = holders.get(id(module.weight), [])
        if all(Half.fits(m) or HalfEmbedding.fits(m) for m in sharing):
            _halve(sharing)


def whole(model: nn.Module) -> None:
    """Undo :func:`halve`; what was shared is shared again."""
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # with the 16 bits, whose place nothing else may take meanwhile
    for module in list(model.modules()):
        if isinstance(module, Half | HalfEmbedding):
            weight, trains = module.weight, module.trains
            swap_back(module)
            del module._buffers["weight"]
            if id(weight) not in made:
                made[id(weight)] = weight, nn.Parameter(weight.to(torch.float32), trains)
            module.weight = made[id(weight)][1]


def _halve(modules: list[nn.Module]) -> None:
    parameter = modules[0].get_parameter("weight")
    half = _exactly(parameter.detach())
    if half is None:
        return
    for module in modules:
        swap(module, Half if isinstance(module, nn.Linear) else HalfEmbedding)
        module.trains = parameter.requires_grad  # type: ignore[assignment]  # of the class that it has now
        del module._parameters["weight"]
        module.register_buffer("weight", half)


def _exactly(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"] | None:
    """The same numbers as bfloat16 or float16; None where some are neither, or not in float32 on the CPU."""
    if weight.dtype is not torch.float32 or not weight.is_cpu:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        half = torch.empty_like(weight, dtype=dtype)
        if all(torch.equal(to.copy_(rows).to(torch.float32), rows) for to, rows in _panels(half, weight)):
            return half
    return None


def _panels(*matrices: Tensor) -> Iterable[tuple[Tensor, ...]]:
    return zip(*(matrix.split(_ROWS) for matrix in matrices), strict=True)
