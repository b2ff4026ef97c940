"""Rotation: inputs enter a linear in a random orthogonal basis, in which no channel is an outlier.

QuaRot (Ashkboos et al., arXiv 2404.00456), QuIP# (arXiv 2402.04396): with R = diag(signs) · blockdiag(H) / sqrt(size),
``W x = (W R)(Rᵀ x)``. An outlier of one channel becomes a small part of all channels of its block, and weights become
close to normally distributed.

By default every linear rotates its own input, by a fast Hadamard transform when it is used (O(log size) a value).
``fused=true`` does as QuaRot does: the residual stream itself is in a rotated basis (:mod:`lowbit.models.rotated`), at
no cost at inference, and only linears that do not read it through a norm rotate their inputs: the output projection of
attention and the down projection. (QuaRot folds a part of the rotation before the output projection into the value
projection, head by head; here all of it is done when it is used, which needs no knowledge of heads.)

Options: ``sites``, a pattern of the linears that rotate their inputs; linears that read one input are rotated
together. ``seed`` chooses the signs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.calibration.stats import Stat, Stats
from lowbit.errors import FormatError
from lowbit.formats.hadamard import hadamard, largest_size, random_signs, sign_values
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import QTensor, Rotated
from lowbit.methods.base import BlockView, Edit, Kind, SetEntry
from lowbit.models.rotated import rotated
from lowbit.models.source import Source


@dataclass(frozen=True, eq=False)
class Rotation:
    """Into a linear by ``x R``."""

    signs: Codes
    size: int
    orthogonal: ClassVar[bool] = True

    @classmethod
    def random(cls, width: int, seed: int, device: torch.device | str = "cpu") -> Rotation:
        signs = random_signs(width, seed)
        return cls(replace(signs, data=signs.data.to(device)), largest_size(width))

    def enter(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens in"]:
        return hadamard(x * sign_values(self.signs).to(x.dtype), self.size)

    def weight(self, w: Matrix) -> Matrix:
        return self.enter(w)

    def wrap(self, q: QTensor) -> QTensor:
        own = replace(self.signs, data=self.signs.data.clone())  # files hold every tensor once
        return Rotated(q.shape, own, q, self.size)

    @property
    def note(self) -> str:
        """For the report of a site."""
        return f"inputs rotated in blocks of {self.size}"


@dataclass(frozen=True)
class Rotate:
    sites: str = "*"
    seed: int = 0
    fused: bool = False

    kind: ClassVar[Kind] = "transform"

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset()

    def prepare(self, source: Source) -> Source:
        """The model whose blocks this transform expects: with a rotated residual stream when ``fused``."""
        return rotated(source, self.seed) if self.fused else source

    def __call__(self, block: BlockView, stats: Mapping[str, Stats]) -> Iterator[Edit]:
        """One rotation an input. Cost O(log size) a weight.

        Raises FormatError for an odd number of inputs, which no Hadamard matrix divides.
        """
        rotated_already = _behind_norms(block) if self.fused else frozenset()
        for sites in block.inputs:
            wanted = any(fnmatch.fnmatchcase(s, self.sites) and block.format(s) is not None for s in sites)
            if not wanted or not rotated_already.isdisjoint(sites):
                continue
            W = block.weight(sites[0])
            width = W.shape[1]
            if largest_size(width) == 1:
                raise FormatError(
                    f"has an odd number of inputs ({width})", where=sites[0],
                    why="a Hadamard matrix mixes blocks of a power of two", fix="rotate,sites=PATTERN without it",
                )  # fmt: skip
            yield SetEntry(sites, Rotation.random(width, self.seed, W.device))


def _behind_norms(block: BlockView) -> frozenset[str]:
    return frozenset(f"{block.name}.{site}" for edge in block.edges if edge.norm for site in edge.consumers)


METHOD = Rotate
