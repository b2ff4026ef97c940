"""Entropy-coded linears outside of ``no_grad``: as many tokens as there are, and gradients as of any linear."""

from __future__ import annotations

import pytest
import torch

from lowbit.codec.stream import encode
from lowbit.formats.ec import Lattice
from lowbit.runtime.linear import QLinear


@pytest.mark.parametrize("tokens", [4, 40])
def test_inputs_get_their_gradients(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-4, 5, (32, 64), generator=generator).to(torch.int16)
    q = Lattice.of(torch.linspace(1, 2, 64)).tree(encode(numbers), (32, 64), -4.0)
    x = torch.randn(tokens, 64, generator=generator, requires_grad=True)
    QLinear.of(q)(x).square().sum().backward()
    W = q.decode()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ W.T) @ W)
