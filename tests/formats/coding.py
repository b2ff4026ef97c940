"""What the tests of formats share: Gaussian matrices, what coding leaves of them, and its error."""

from __future__ import annotations

from typing import Any

import torch

from lowbit.formats.format import Format


def gaussian(rows: int = 64, columns: int = 4096, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def code(
    fmt: Format, w: torch.Tensor, clip: int = 0, importance: torch.Tensor | None = None, **how: Any
) -> torch.Tensor:
    """What is left of a matrix."""
    return fmt.encode(w, fmt.fit(w, importance, clip, **how)).decode()


def nmse(fmt: Format, w: torch.Tensor, clip: int = 0) -> float:
    return float((code(fmt, w, clip) - w).square().sum() / w.square().sum())


def block_error(fmt: Format, w: torch.Tensor, got: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    error = (got - w).square() if weights is None else (got - w).square() * weights
    return fmt.block.split(error).sum(-1)
