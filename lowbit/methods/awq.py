"""AWQ: scale the input channels that carry large activations up before rounding, and the producers down.

Lin et al., arXiv 2306.00978. For every edge, s = mean|x|^a over a grid of a, normalised by sqrt(max s * min s); the
one with the least output error is moved along the edge. So are s = mean|x|^a / mean|w|^(1-a), as in the authors' later
code, |w| in shares of the largest of its block: channels of large weights lose least by a large step.

Two differences from that code:

- The error is that of the linears that read the input together, sum tr(dW G dWᵀ) with dW = Q(W s)/s - W, from the
  Gram matrix that GPTQ uses: no forward pass is run in the search.
- An edge from value to output projection is used with grouped heads too: one scale a key-value channel, the geometric
  mean of what its copies want.

The clip search that follows in the paper is the step ``clip``: ``awq+clip+rtn:int4-g64``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.calibration.stats import AbsMean, Gram, Stat, Stats
from lowbit.errors import RecipeError
from lowbit.formats.format import Format, has_kernel
from lowbit.methods.base import BlockView, Edit, FoldScale, Kind
from lowbit.models.edges import Edge

_PANEL, _GPU_PANEL = 256, 2048  # columns of a product that are computed at a time


@dataclass(frozen=True)
class Awq:
    steps: int = 20  # exponents a = 0, 1/steps, ..., (steps - 1)/steps, with weights and without

    kind: ClassVar[Kind] = "transform"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RecipeError(f"steps {self.steps} is less than one", where="awq", fix="steps=20")

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({AbsMean, Gram})

    def __call__(self, block: BlockView, stats: Mapping[str, Stats]) -> Iterator[Edit]:
        """One fold an edge. Cost ``2 steps`` roundings and half products with the Gram matrix, each out * in²."""
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
        sizes = torch.stack([_sizes(block.weight(site), block.format(site)) for site in sites]).mean(0)
        exponents = [i / self.steps for i in range(self.steps)]
        scales = [edge.fewest(channel_scales(mean, a)) for a in exponents]
        scales += [edge.fewest(channel_scales(mean, a, sizes)) for a in exponents]
        losses = torch.zeros(len(scales), dtype=torch.float64, device=mean.device)
        for _, readers in itertools.groupby(sites, key=lambda site: id(stats[site])):  # of one input
            G = None
            for site in readers:
                G = stats[site][Gram].sum() if G is None else G
                W, fmt = block.weight(site), block.format(site)
                assert fmt is not None  # only sites that will be rounded are asked for
                losses += torch.stack([output_error(W, edge.consumers_scale(s), fmt, G) for s in scales])
        found = losses.nan_to_num(nan=math.inf).tolist()  # the device is waited for once an edge
        best = found.index(min(found))
        return scales[best] if best else None


def channel_scales(
    mean: Float[Tensor, "in"], a: float, sizes: Float[Tensor, "in"] | None = None
) -> Float[Tensor, "in"]:
    """mean|x|^a, over mean|w|^(1-a) if ``sizes`` of weights are given, its largest and smallest centred on one."""
    s = mean.clamp_min(1e-4) ** a
    if sizes is not None:
        s = s / sizes.clamp_min(1e-4) ** (1 - a)
    return s / (s.max() * s.min()).sqrt()


def _sizes(W: Matrix, fmt: Format | None) -> Float[Tensor, "in"]:
    """mean|w| of each column, every weight as a share of the largest in its block."""
    assert fmt is not None
    largest = fmt.block.split(W).abs().amax(-1).clamp_min(torch.finfo(W.dtype).tiny)
    return (W.abs() / fmt.block.spread(largest, tuple(W.shape))).mean(0)


def output_error(W: Matrix, s: Float[Tensor, "in"], fmt: Format, G: Float[Tensor, "in in"]) -> Float[Tensor, ""]:
    """tr(dW G dWᵀ) with dW = Q(W s)/s - W, W rounded to nearest, for a symmetric G."""
    dW = rounding_error(W, s, fmt)
    panel = _PANEL if W.device.type == "cpu" else _GPU_PANEL
    total = torch.zeros((), device=W.device)
    with _tensor_cores():
        for start in range(0, W.shape[1], panel):  # what lies below the diagonal is what lies above it
            here = slice(start, start + panel)
            product = (dW[:, here] @ G[here, here]).addmm_(dW[:, :start], G[:start, here], alpha=2)
            total += product.mul_(dW[:, here]).sum()
    return total


@contextlib.contextmanager
def _tensor_cores() -> Iterator[None]:
    """Products in TF32 on a GPU: a search compares losses that differ by far more than its rounding."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rounding_error(W: Matrix, s: Float[Tensor, "in"], fmt: Format) -> Matrix:
    """dW = Q(W s)/s - W, rounded to nearest with the range that every block has."""
    if fmt.block.follows_rows and not fmt.least_clip_steps and has_kernel(fmt, fmt.block.split(W[:1])):
        from lowbit.formats import snap_triton  # needs triton, which only a GPU has

        return snap_triton.scaled_error(W, s, fmt)
    scaled = W * s
    return fmt.nearest(scaled, fmt.fit(scaled)).values.div_(s).sub_(W)


METHOD = Awq
