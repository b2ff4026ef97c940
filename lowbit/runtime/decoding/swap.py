"""A module that does few tokens its own way, and everything else as the class that it was made of."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from lowbit.arrays import Tensor

TOLERANCE = 1e-4
"""Largest difference from a module's own output, relative to its largest: sums in another order give 1e-6."""


class Swapped(nn.Module):
    """Put before a module's own class in a class of both (:func:`swap`), so that its state and its name stay.

    ``same``: whether it has been seen to give what the module's own code gives; None before it was tried.
    """

    kind: ClassVar[type[Swapped]]
    own: ClassVar[type[nn.Module]]
    same: bool | None = None
    kept: ClassVar[tuple[str, ...]] = ("same",)
    """What an instance holds beside its own state."""
    fleeting: ClassVar[tuple[str, ...]] = ()
    """What of it a copy makes for itself."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module has this shape."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the two classes: that of both exists in this process only."""
        state = {name: value for name, value in self.__dict__.items() if name not in self.fleeting}
        return _made, (self.kind, self.own), state


def swap(module: nn.Module, kind: type[Swapped]) -> None:
    module.__class__ = _both(kind, type(module))


def swap_back(module: nn.Module) -> None:
    assert isinstance(module, Swapped)
    for name in module.kept:
        module.__dict__.pop(name, None)
    module.__class__ = module.own  # type: ignore[assignment]  # its own again


def readable(x: Tensor) -> bool:
    """Whether native code reads it as it lies: float32 numbers in their order on the CPU."""
    return x.dtype is torch.float32 and x.is_cpu and x.is_contiguous()


def plain(x: Tensor) -> bool:
    """Whether native code may take over now: readable, outside gradients and graphs."""
    return readable(x) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def agree(own: Tensor, found: Tensor) -> bool:
    return float((own - found).abs().max()) <= TOLERANCE * float(own.abs().max())


def sample(*shape: int) -> Tensor:
    """Numbers to try a module with."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


_made_so_far: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _both(kind: type[Swapped], own: type[nn.Module]) -> type[nn.Module]:
    if (kind, own) not in _made_so_far:
        facts = {"__module__": own.__module__, "__qualname__": own.__qualname__, "kind": kind, "own": own}
        _made_so_far[kind, own] = type(own.__name__, (kind, own), facts)
    return _made_so_far[kind, own]


def _made(kind: type[Swapped], own: type[nn.Module]) -> nn.Module:
    both = _both(kind, own)
    made: nn.Module = both.__new__(both)
    return made
