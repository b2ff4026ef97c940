"""AWQ: scale the input channels that carry large activations up before rounding, and the producers down.

Lin et al., arXiv 2306.00978. For every edge, s = mean|x|^a over a grid of a, normalised by sqrt(max s * min s); the
one with the least output error is moved along the edge. Two differences from the authors' code:

- The error is that of the linears that read the input together, sum tr(dW G dWᵀ) with dW = Q(W s)/s - W, from the
  Gram matrix that GPTQ uses: no forward pass is run in the search.
- An edge from value to output projection is used with grouped heads too: one scale a key-value channel, the geometric
  mean of what its copies want.

The clip search that follows in the paper is the step ``clip``: ``awq+clip+rtn:int4-g64``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.calibration.stats import AbsMean, Gram, Stat, Stats
from lowbit.errors import RecipeError
from lowbit.formats.format import Format
from lowbit.methods.base import BlockView, Edit, FoldScale, Kind
from lowbit.models.edges import Edge


@dataclass(frozen=True)
class Awq:
    steps: int = 20  # exponents a = 0, 1/steps, ..., (steps - 1)/steps

    kind: ClassVar[Kind] = "transform"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RecipeError(f"steps {self.steps} is less than one", where="awq", fix="steps=20")

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({AbsMean, Gram})

    def __call__(self, block: BlockView, stats: Mapping[str, Stats]) -> Iterator[Edit]:
        """One fold an edge. Cost ``steps`` roundings and products with the Gram matrix a linear, O(out * in²) each."""
        for edge in block.edges:
            sites = [f"{block.name}.{c}" for c in edge.consumers]
            rounded = [s for s in sites if block.format(s) is not None and s in stats and Gram in stats[s]]
            if rounded:
                scale = self._search(block, edge, rounded, stats)
                if scale is not None:
                    yield FoldScale(edge, scale)

    def _search(
        self, block: BlockView, edge: Edge, sites: list[str], stats: Mapping[str, Stats]
    ) -> Float[Tensor, "channels"] | None:
        """The best scale; None when one everywhere is best."""
        mean = torch.stack([stats[site][AbsMean].value for site in sites]).mean(0)
        gram = {id(stats[site]): stats[site][Gram].sum() for site in sites}
        best, least = None, float("inf")
        for i in range(self.steps):
            scale = edge.fewest(channel_scales(mean, i / self.steps))
            s = edge.consumers_scale(scale)
            loss = 0.0
            for site in sites:
                fmt = block.format(site)
                assert fmt is not None  # only sites that will be rounded are asked for
                loss += output_error(block.weight(site), s, fmt, gram[id(stats[site])])
            if loss < least:
                best, least = (scale if i else None), loss
        return best


def channel_scales(mean: Float[Tensor, "in"], a: float) -> Float[Tensor, "in"]:
    """mean|x|^a, its largest and smallest centred on one."""
    s = mean.clamp_min(1e-4) ** a
    return s / (s.max() * s.min()).sqrt()


def output_error(W: Matrix, s: Float[Tensor, "in"], fmt: Format, G: Float[Tensor, "in in"]) -> float:
    """tr(dW G dWᵀ) with dW = Q(W s)/s - W, W rounded to nearest."""
    scaled = W * s
    dW = fmt.encode(scaled, fmt.fit(scaled)).decode().div_(s).sub_(W)
    with tensor_cores():
        return float((dW @ G).mul_(dW).sum())


@contextlib.contextmanager
def tensor_cores() -> Iterator[None]:
    """Products in TF32 on a GPU: a search compares losses that differ by far more than its rounding."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


METHOD = Awq
