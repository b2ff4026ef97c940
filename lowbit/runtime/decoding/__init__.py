"""Decoding in few operations: a token of one to a few streams costs what its weights cost, not what its modules do.

    prepare(model)      # a loaded model, on the CPU in float32
    ...                 # generate, converse, serve
    restore(model)      # as it was, to the bit

A pass over one token reads every weight once and does a thousand small things beside it. ``prepare`` lets the modules
that it knows by their shape (RMS norms, gated feed-forwards, rotary attention) do them in a few calls to native code,
for few tokens without gradients; every other call is the module's own. It also holds in 16 bits the dense weights that
are 16-bit numbers: the same values in half the bytes. Nothing is known by its family's name. Each module is compared
with its own code on random inputs when it is first used (``TOLERANCE``), and left alone where they differ.

Prepare last: a model that is moved, cast, trained or saved is restored first. Commands prepare what they load to write
text; scoring never does, whose numbers stay what they are to the bit.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from lowbit.runtime.decoding.attention import Attention
from lowbit.runtime.decoding.gated import Gated
from lowbit.runtime.decoding.halves import halve, whole
from lowbit.runtime.decoding.norm import Norm
from lowbit.runtime.decoding.swap import TOLERANCE, Swapped, swap, swap_back
from lowbit.runtime.linear import QLinear

__all__ = ["TOLERANCE", "prepare", "prepared", "restore"]

_KINDS: tuple[type[Swapped], ...] = (Norm, Gated, Attention)


def prepare(model: PreTrainedModel) -> None:
    """Make a model ready for decoding, in place; nothing changes for a model that is not on the CPU.

    A model whose linears have kernels of their own (``QLinear.use_only``: blocks that pass through a buffer) is left
    alone too. Cost: a pass over the dense weights, to see which are 16-bit numbers.
    """
    linears = [module for module in model.modules() if isinstance(module, QLinear)]
    if model.device.type != "cpu" or any(linear.only is not None for linear in linears):
        return
    parents = []
    for module in list(model.modules()):
        kind = next((kind for kind in _KINDS if kind.fits(module)), None)
        if kind is not None and not isinstance(module, Swapped):
            swap(module, kind)
            parents.append(module)
    halve(model, parents)


def prepared(model: nn.Module) -> bool:
    """Whether any of its modules decodes its own way."""
    return any(isinstance(module, Swapped) for module in model.modules())


def restore(model: nn.Module) -> None:
    """Undo :func:`prepare`."""
    whole(model)
    for module in list(model.modules()):
        if isinstance(module, Swapped):
            swap_back(module)
