"""Statistics that keep values, not sums: the range of each input, and a sample of whole input vectors."""

from __future__ import annotations

from typing import ClassVar

import torch

from lowbit.arrays import Float, Tensor
from lowbit.calibration.stats import Stat


class Range(Stat):
    """The lowest and highest value of each input, zero included."""

    def __init__(self, n_in: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.low = torch.zeros(n_in, device=device)
        self.high = torch.zeros(n_in, device=device)

    @staticmethod
    def nbytes(n_in: int) -> int:
        return 8 * n_in

    def update(self, x: Float[Tensor, "tokens in"]) -> None:
        if x.shape[0]:
            self.low = torch.minimum(self.low, x.amin(0).to(torch.float32))
            self.high = torch.maximum(self.high, x.amax(0).to(torch.float32))
        self.tokens += x.shape[0]

    def merge(self, other: Stat) -> None:
        assert isinstance(other, Range)
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.tokens += other.tokens


class Reservoir(Stat):
    """A uniform sample of ``SIZE`` input vectors, for losses that no sum determines (rounding of activations).

    Every token gets a random key from a seeded generator; those with the largest keys stay, so that merging two
    reservoirs is choosing among their union.
    """

    SIZE: ClassVar[int] = 256

    def __init__(self, n_in: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._keys = torch.empty(0, device=device)
        self._rows = torch.empty(0, n_in, device=device)

    @staticmethod
    def nbytes(n_in: int) -> int:
        return 4 * Reservoir.SIZE * (n_in + 1)

    def update(self, x: Float[Tensor, "tokens in"]) -> None:
        # seeded by what was seen, so that the same stream of tokens gives the same sample in any process
        generator = torch.Generator().manual_seed(self.tokens)
        self._keep(torch.rand(x.shape[0], generator=generator).to(x.device), x)
        self.tokens += x.shape[0]

    def merge(self, other: Stat) -> None:
        assert isinstance(other, Reservoir)
        self._keep(other._keys, other._rows)
        self.tokens += other.tokens

    @property
    def rows(self) -> Float[Tensor, "sample in"]:
        """The sample, in float32."""
        return self._rows

    def _keep(self, keys: Float[Tensor, "tokens"], rows: Float[Tensor, "tokens in"]) -> None:
        best = torch.topk(keys, min(self.SIZE, len(keys)), sorted=False).indices  # few of many, before any copy
        keys = torch.cat([self._keys, keys[best]])
        rows = torch.cat([self._rows, rows[best].to(torch.float32)])
        chosen = torch.topk(keys, min(self.SIZE, len(keys)), sorted=False).indices
        self._keys, self._rows = keys[chosen], rows[chosen]
