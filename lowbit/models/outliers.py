"""Outlier statistics of weights: AbsMax, Std and Kurtosis a site, read block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowbit.models.graph import Site, matrix
from lowbit.models.source import Source


@dataclass(frozen=True)
class WeightStatistics:
    """The distribution of one weight; a Gaussian has kurtosis 3."""

    site: Site
    dtype: str
    absmax: float
    std: float
    kurtosis: float


def weight_statistics(source: Source) -> Iterator[WeightStatistics]:
    """Statistics of every linear in the blocks; holds one weight at a time. Cost: one pass over the model."""
    for block in source.blocks:
        for site in source.sites(block):
            stored = source.tensor(f"{site.name}.weight", _stored_shape(source, site))
            w = matrix(source.load(site.name, torch.float32)).to(torch.float64)
            centred = w - w.mean()
            variance = float(centred.square().mean())
            kurtosis = float(centred.pow(4).mean()) / variance**2 if variance else 0.0
            yield WeightStatistics(
                site, str(stored.dtype).removeprefix("torch."), float(w.abs().max()), variance**0.5, kurtosis
            )


def _stored_shape(source: Source, site: Site) -> tuple[int, ...]:
    return tuple(source.skeleton.get_submodule(site.name).weight.shape)  # type: ignore[union-attr]
