"""Entropy-coded weights, multiplied as they are decoded: the coded stream is all that is kept and all that is read.

Few tokens are multiplied from the registers that symbols are decoded in (:mod:`lowbit.codec.product`), in whole
numbers: inputs are rounded to 16 bits a token. For many tokens that arithmetic would cost more than decoding, so panels
of rows are decoded into a buffer that stays in cache and multiplied there by torch's product of bytes. Both give the
same bits where numbers fit a byte (up to about 6 bits a weight): a token's output then does not depend on how many
others a call has. Wider numbers are multiplied in floating point for many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int16, Int32
from torch.nn.functional import linear

from lowbit.arrays import Float, Tensor
from lowbit.codec import stream as coder
from lowbit.codec.product import Product, planes, rounding
from lowbit.formats.nodes_coded import Coded as Node
from lowbit.formats.qtensor import QTensor
from lowbit.formats.spec import Spec

FEW_TOKENS = 8  # beyond this many, decoding panels is faster
PANEL_NUMBERS = 1 << 20
"""Of a panel's numbers for each thread: they stay in its second-level cache."""
SUMS = 1 << 21
"""Of outputs that are summed at once: 40 MB with their two halves."""
Multiply = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class State:
    """A coded weight ready to multiply: the stream's own memory, and what its inputs and outputs are multiplied by."""

    dtype: torch.dtype
    device: torch.device
    numbers: Product
    order: Int32[Tensor, "in"]
    step: Float[Tensor, "in"]
    """In the order of the coded columns."""
    gain: Float[Tensor, "out"]

    @property
    def key(self) -> tuple[torch.dtype, torch.device]:
        return self.dtype, self.device


@dataclass(frozen=True)
class Coded:
    """``gain * (x[order] * step) Nᵀ`` with N coded. Inputs are rounded to 16 bits a token."""

    name: str = "coded"
    prepared: bool = True
    tolerance: float = 2e-2
    """That of bfloat16 activations, whose reference rounds its weights; in float32 the error is below 1e-3."""

    def takes(self, spec: Spec, x: Tensor) -> bool:
        plain = x.device.type == "cpu" and x.dtype in _DTYPES and x.numel() > 0
        return spec.node == "Coded" and plain and not x.requires_grad  # whole numbers have no gradients

    def prepare(self, q: QTensor, dtype: torch.dtype) -> State:
        """Cost: one reading of the stream's heads and exceptions."""
        assert isinstance(q, Node)
        order = q.order
        product = Product(q.stream)
        return State(dtype, q.stream.device, product, order.to(torch.int32), q.step[order].contiguous(), q.gain)

    def run(self, x: Float[Tensor, "*batch in"], state: State) -> Float[Tensor, "*batch out"]:
        flat = x.reshape(-1, x.shape[-1])
        few = len(flat) <= FEW_TOKENS and state.numbers.fits
        y = _few(flat, state) if few else _many(flat, state)
        return y.view(*x.shape[:-1], -1)


_DTYPES = (torch.float32, torch.bfloat16)


def _few(x: Float[Tensor, "tokens in"], s: State) -> Float[Tensor, "tokens out"]:
    return s.numbers.linear(x.to(torch.float32), s.order, s.step, s.gain).to(x.dtype)


def _many(x: Float[Tensor, "tokens in"], s: State) -> Float[Tensor, "tokens out"]:
    rows, columns = s.numbers.shape
    y = torch.empty(len(x), rows, dtype=x.dtype)
    height = max(1, min(torch.get_num_threads() * PANEL_NUMBERS // columns, SUMS // len(x)))
    entered = x.to(torch.float32)[:, s.order.long()] * s.step
    multiply = _integer(entered) if s.numbers.narrow else _float(entered.to(x.dtype))
    for first in range(0, rows, height):
        panel = slice(first, min(first + height, rows))
        y[:, panel] = multiply(coder.decode(s.numbers.stream, panel), s.gain[panel])
    return y


def _integer(x: Float[Tensor, "tokens in"]) -> Multiply:
    """What few tokens get, to the last bit, through torch's product of bytes."""
    numbers, scale = rounding(x)
    both, n = planes(numbers), len(x)

    def multiply(panel: Int16[Tensor, "rows in"], gain: Float[Tensor, "rows"]) -> Float[Tensor, "tokens rows"]:
        sums = torch._int_mm(both, panel.to(torch.int8).T).double()  # exact, and so is what follows
        return sums[:n].mul_(255).add_(sums[n:]).mul_(scale * gain.double()).to(torch.float32)

    return multiply


def _float(x: Float[Tensor, "tokens in"]) -> Multiply:
    """For numbers that are no bytes."""

    def multiply(panel: Int16[Tensor, "rows in"], gain: Float[Tensor, "rows"]) -> Float[Tensor, "tokens rows"]:
        return linear(x, panel.to(x.dtype)) * gain

    return multiply


CODED = Coded()
