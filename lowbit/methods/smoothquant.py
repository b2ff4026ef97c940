"""SmoothQuant: move the outliers of activations into the weights, channel by channel.

Xiao et al., arXiv 2211.10438, equation 4: with s_j = max|X_j|^alpha / max|W_j|^(1-alpha), the maximum over all linears
that read the same norm, the norm's output is divided by s and those weights' columns are multiplied by it. Nothing
changes before rounding.

``alpha = "auto"`` chooses alpha for every norm by the error of its linears' outputs with weights and inputs rounded as
the recipe says (or int8, where it does not), as Intel Neural Compressor's enhanced SmoothQuant does layer by layer.
Linears that share a norm need one alpha; ``criterion`` reconciles them: ``mean`` takes the alpha of the least summed
error, ``min`` and ``max`` the smallest and largest of what each would choose alone. With ``mean`` the summed error on
the calibration sample is at most that of the best alpha fixed for all norms, by construction.

Only norms are smoothed: what the paper folds. Options: ``alpha`` (a number or ``auto``), the grid of alphas (``low``,
``high``, ``step``), ``criterion``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.calibration.samples import Range, Reservoir
from lowbit.calibration.stats import AbsMax, Stat, Stats
from lowbit.errors import RecipeError
from lowbit.formats.activation import ActivationFormat, activation
from lowbit.formats.presets import preset
from lowbit.methods.base import BlockView, Edit, FoldScale, Kind
from lowbit.models.edges import Edge

_LEAST = 1e-5  # scales are kept away from zero, as in the paper's code


@dataclass(frozen=True)
class SmoothQuant:
    alpha: float | str = 0.5
    low: float = 0.0
    high: float = 1.0
    step: float = 0.1
    criterion: str = "mean"

    kind: ClassVar[Kind] = "transform"

    def __post_init__(self) -> None:
        if not (self.alpha == "auto" or (isinstance(self.alpha, float) and 0 <= self.alpha <= 1)):
            raise RecipeError(f"alpha is {self.alpha!r}", where="smoothquant", fix="a number from 0 to 1, or auto")
        if not (0 <= self.low <= self.high <= 1 and self.step > 0):
            raise RecipeError(
                f"no grid from {self.low} to {self.high} by {self.step}", where="smoothquant",
                fix="0 <= low <= high <= 1 and a positive step",
            )  # fmt: skip
        if self.criterion not in ("mean", "min", "max"):
            raise RecipeError(f"criterion {self.criterion!r}", where="smoothquant", fix="mean, min or max")

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({AbsMax, Reservoir, Range} if self.alpha == "auto" else {AbsMax})

    def __call__(self, block: BlockView, stats: Mapping[str, Stats]) -> Iterator[Edit]:
        """One fold a norm. Cost a few passes over the weights; for each alpha of ``auto`` a product with a sample."""
        for edge in block.edges:
            sites = [site for c in edge.consumers if (site := f"{block.name}.{c}") in stats]
            seen = [site for site in sites if AbsMax in stats[site]]  # experts that no token reached show nothing
            if not edge.norm or not seen:
                continue
            inputs = torch.stack([stats[site][AbsMax].value for site in seen]).amax(0)
            weights = torch.stack([block.weight(site).abs().amax(0) for site in sites]).amax(0)
            alpha = (
                self._search(block, edge, seen, stats, inputs, weights) if self.alpha == "auto" else float(self.alpha)
            )
            yield FoldScale(edge, edge.fewest(scales(inputs, weights, alpha)))

    def _search(
        self, block: BlockView, edge: Edge, sites: list[str], stats: Mapping[str, Stats], inputs: Tensor,
        weights: Tensor,
    ) -> float:  # fmt: skip
        grid = [self.low + i * self.step for i in range(int((self.high - self.low) / self.step + 1.5))]
        losses = {site: [] for site in sites}  # type: dict[str, list[float]]
        for site in sites:
            W, x = block.weight(site), stats[site][Reservoir].rows
            fmt, rounding = (
                block.format(site) or preset("int8-row-sym"),
                block.activation(site) or activation("int8-tensor"),
            )
            seen = stats[site][Range]
            for alpha in grid:
                s = edge.consumers_scale(edge.fewest(scales(inputs, weights, alpha)))
                Q = fmt.encode(W * s, fmt.fit(W * s)).decode()
                X = _rounded(rounding, x / s, seen.low / s, seen.high / s)
                losses[site].append(float((X @ Q.t() - x @ W.t()).square().sum()))
        if self.criterion == "mean":
            total = [sum(parts) for parts in zip(*losses.values(), strict=True)]
            return grid[min(range(len(grid)), key=total.__getitem__)]
        own = [grid[min(range(len(grid)), key=loss.__getitem__)] for loss in losses.values()]
        return min(own) if self.criterion == "min" else max(own)


def scales(inputs: Float[Tensor, "in"], weights: Float[Tensor, "in"], alpha: float) -> Float[Tensor, "in"]:
    """max|X|^alpha / max|W|^(1-alpha); one where an input was always zero."""
    s = inputs.clamp_min(_LEAST) ** alpha / weights.clamp_min(_LEAST) ** (1 - alpha)
    return torch.where(inputs > 0, s, 1.0).clamp_min(_LEAST)


def _rounded(rounding: ActivationFormat, x: Matrix, low: Tensor, high: Tensor) -> Matrix:
    """Inputs as the linear will see them; ``low`` and ``high`` are the range of each, for a static format."""
    if rounding.static:
        return rounding.round(x, (low.min().view(1), high.max().view(1)))
    return rounding.round(x)


METHOD = SmoothQuant
