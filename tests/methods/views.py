"""A block of one norm and the linears that read it, for tests of transforms without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lowbit.calibration.samples import Range, Reservoir
from lowbit.calibration.stats import AbsMax, AbsMean, Gram, Moments, Stats
from lowbit.formats.activation import ActivationFormat, activation
from lowbit.formats.format import Format
from lowbit.formats.presets import preset
from lowbit.models.edges import Edge


@dataclass
class OneNorm:
    """``weights`` by name all read ``x``, the output of a norm."""

    weights: Mapping[str, torch.Tensor]
    fmt: str | None = None
    rounding: str | None = None
    name: str = "block"
    edges: list[Edge] = field(default_factory=list)

    def __post_init__(self) -> None:
        width = next(iter(self.weights.values())).shape[1]
        self.edges = [Edge("norm", tuple(self.weights), torch.arange(width), norm=True)]

    @property
    def inputs(self) -> list[tuple[str, ...]]:
        return [tuple(f"block.{name}" for name in self.weights)]

    def weight(self, site: str) -> torch.Tensor:
        return self.weights[site.removeprefix("block.")]

    def format(self, site: str) -> Format | None:
        return preset(self.fmt) if self.fmt else None

    def activation(self, site: str) -> ActivationFormat | None:
        return activation(self.rounding) if self.rounding else None


def stats_of(x: torch.Tensor, *sites: str) -> dict[str, Stats]:
    """Every kind of statistic of one input, shared by the sites that read it."""
    found = Stats.of(sites[0], {Gram, AbsMax, AbsMean, Moments, Range, Reservoir}, x.shape[1])
    found.update(x)
    return dict.fromkeys(sites, found)


def with_outliers(x: torch.Tensor, channels: int, k: float, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` with some channels ``k`` times as large, and which."""
    chosen = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))[:channels]
    x = x.clone()
    x[:, chosen] *= k
    return x, chosen
