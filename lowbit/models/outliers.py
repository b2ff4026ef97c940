"""Outlier statistics of weights: AbsMax, Std and Kurtosis a site, read block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowbit.arrays import Tensor
from lowbit.models.graph import Site
from lowbit.models.source import Source


@dataclass(frozen=True)
class WeightStatistics:
    """The distribution of one weight; a Gaussian has kurtosis 3, a constant weight is given 0."""

    site: Site
    dtype: str
    absmax: float
    std: float
    kurtosis: float


def weight_statistics(source: Source) -> Iterator[WeightStatistics]:
    """Statistics of every linear in the blocks, over all its entries. Cost: one pass over the model.

    Holds one weight and three float32 copies of it. Raises WeightError for one that is missing or not finite.
    """
    for block in source.blocks:
        for site in source.sites(block):
            held: Tensor = source.skeleton.get_submodule(site.name).weight  # type: ignore[assignment]
            stored = source.tensor(f"{site.name}.weight", tuple(held.shape))
            w = stored.to(torch.float32)
            mean = float(w.mean(dtype=torch.float64))
            squares = (w - mean).square_()
            variance = float(squares.mean(dtype=torch.float64))
            fourth = float(squares.square_().mean(dtype=torch.float64))
            yield WeightStatistics(
                site, str(stored.dtype).removeprefix("torch."), float(w.abs().max()), variance**0.5,
                fourth / variance**2 if variance else 0.0,
            )  # fmt: skip
