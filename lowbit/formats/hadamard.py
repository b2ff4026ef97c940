"""The randomised Hadamard rotation ``R = diag(signs) · blockdiag(H) / sqrt(size)``: orthogonal, and cheap to apply.

H is the Walsh-Hadamard matrix of ``size`` (a power of two) in Sylvester's order: ``H[i, j] = (-1)^popcount(i & j)``.
A width that is no power of two is rotated in equal blocks (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

import math

import torch

from lowbit.arrays import Float, Tensor
from lowbit.formats.pack import Codes


def hadamard(x: Float[Tensor, "*batch n"], size: int) -> Float[Tensor, "*batch n"]:
    """``x · blockdiag(H_size) / sqrt(size)`` along the last axis; its own inverse. Cost O(x log size).

    Computed in float32 at least, so that the sums of 16-bit inputs neither round nor overflow on the way.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    y = x.to(torch.float32 if half else x.dtype)
    blocks = x.numel() // size
    step = 1
    while step < size:
        pairs = y.reshape(blocks * size // (2 * step), 2, step)
        y = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        step *= 2
    return (y * (1 / math.sqrt(size))).reshape(x.shape).to(x.dtype)


def largest_size(width: int) -> int:
    """The largest power of two that divides ``width``: 64 of 576, 4096 of 4096."""
    return width & -width


def random_signs(width: int, seed: int) -> Codes:
    """Fair signs for ``width`` inputs, one bit each (1 stands for -1); the same for a seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return Codes.of(torch.randint(0, 2, (1, width), generator=generator), 2)


def sign_values(signs: Codes) -> Float[Tensor, "in"]:
    """1 or -1 for every input."""
    return 1.0 - 2.0 * signs.unpack()[0].to(torch.float32)
