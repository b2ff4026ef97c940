"""Statistics of a linear's inputs: all that a method may know about activations, and the only mutable objects.

Every one costs memory known before work starts (``nbytes``), takes tokens in chunks (``update``) and merges with
another of its kind (``merge``, associative up to rounding), so that shards, processes and resumed runs add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, TypeVar

import torch

from lowbit.arrays import Float, Tensor
from lowbit.errors import CalibrationError


class Stat(ABC):
    """Sufficient statistics of vectors of ``n_in`` inputs, over ``tokens`` of them."""

    tokens: int

    @abstractmethod
    def __init__(self, n_in: int, device: torch.device | str = "cpu") -> None: ...

    @staticmethod
    @abstractmethod
    def nbytes(n_in: int) -> int:
        """Bytes of one such statistic."""

    @abstractmethod
    def update(self, x: Float[Tensor, "tokens in"]) -> None:
        """Take in more tokens."""

    @abstractmethod
    def merge(self, other: Stat) -> None:
        """Take in all that another of the same kind has seen."""

    def rescale(self, by: Float[Tensor, "in"]) -> bool:
        """Become what it would be had every input been multiplied by ``by``; False where that does not follow."""
        return False


class Gram(Stat):
    """The sum of ``x xᵀ``: every quadratic error of a linear follows from it. Cost tokens * in² a chunk.

    16-bit inputs on a GPU are multiplied as they are, which is exact, and added up in float32.
    """

    _PANEL: ClassVar[int] = 96  # columns computed at a time; only panels at or above the diagonal are
    _GPU_PANEL: ClassVar[int] = 1024

    def __init__(self, n_in: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._upper = torch.zeros(n_in, n_in, dtype=torch.float32, device=device)
        self.memo: dict[tuple[float, bool], tuple[Tensor, Tensor]] = {}  # factorisations, shared by its readers

    @staticmethod
    def nbytes(n_in: int) -> int:
        return 4 * n_in * n_in

    @classmethod
    def of(cls, total: Float[Tensor, "in in"], tokens: int) -> Gram:
        """From the symmetric matrix itself."""
        gram = cls(total.shape[0], total.device)
        gram._upper, gram.tokens = torch.triu(total), tokens
        return gram

    def update(self, x: Float[Tensor, "tokens in"]) -> None:
        self.memo.clear()
        n, gpu = x.shape[1], x.is_cuda
        short = gpu and x.dtype in (torch.bfloat16, torch.float16)
        x = x if short else x.to(torch.float32)
        panel = self._GPU_PANEL if gpu else self._PANEL
        for start in range(0, n, panel):
            stop = min(start + panel, n)
            total, left, right = self._upper[start:stop, start:], x[:, start:stop].t(), x[:, start:]
            if short:
                total += torch.mm(left, right, out_dtype=torch.float32)
            else:
                total.addmm_(left, right)
        self.tokens += x.shape[0]

    def merge(self, other: Stat) -> None:
        assert isinstance(other, Gram)
        self.memo.clear()
        self._upper += other._upper
        self.tokens += other.tokens

    def rescale(self, by: Float[Tensor, "in"]) -> bool:
        self.memo.clear()
        self._upper.mul_(by).mul_(by[:, None])
        return True

    def sum(self) -> Float[Tensor, "in in"]:
        """The whole symmetric matrix ``sum x xᵀ``; a new tensor."""
        upper = torch.triu(self._upper)
        return upper + torch.triu(upper, 1).t()

    def mean_square(self) -> Float[Tensor, "in"]:
        """``E[x²]`` of each input: the importance of a column."""
        return self._upper.diagonal() / max(self.tokens, 1)


class AbsMax(Stat):
    """The largest magnitude of each input."""

    def __init__(self, n_in: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.value = torch.zeros(n_in, device=device)

    @staticmethod
    def nbytes(n_in: int) -> int:
        return 4 * n_in

    def update(self, x: Float[Tensor, "tokens in"]) -> None:
        if x.shape[0]:
            self.value = torch.maximum(self.value, x.abs().amax(0).to(torch.float32))
        self.tokens += x.shape[0]

    def merge(self, other: Stat) -> None:
        assert isinstance(other, AbsMax)
        self.value = torch.maximum(self.value, other.value)
        self.tokens += other.tokens

    def rescale(self, by: Float[Tensor, "in"]) -> bool:
        self.value = self.value * by.abs()
        return True


class AbsMean(Stat):
    """The mean magnitude of each input."""

    def __init__(self, n_in: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(n_in, dtype=torch.float64, device=device)

    @staticmethod
    def nbytes(n_in: int) -> int:
        return 8 * n_in

    def update(self, x: Float[Tensor, "tokens in"]) -> None:
        self._sum += x.to(torch.float32).abs().sum(0)
        self.tokens += x.shape[0]

    def merge(self, other: Stat) -> None:
        assert isinstance(other, AbsMean)
        self._sum += other._sum
        self.tokens += other.tokens

    def rescale(self, by: Float[Tensor, "in"]) -> bool:
        self._sum *= by.abs()
        return True

    @property
    def value(self) -> Float[Tensor, "in"]:
        return (self._sum / max(self.tokens, 1)).to(torch.float32)


class Moments(Stat):
    """The first four power sums over all inputs together, and each input's mean square."""

    def __init__(self, n_in: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._n_in = n_in
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._square = torch.zeros(n_in, dtype=torch.float64, device=device)
        self.absmax = 0.0

    @staticmethod
    def nbytes(n_in: int) -> int:
        return 8 * (n_in + 4)

    def update(self, x: Float[Tensor, "tokens in"]) -> None:
        if not x.shape[0]:
            return
        x = x.to(torch.float32)
        square = x.square()
        self._square += square.sum(0)
        powers = [x.sum(), square.sum(), (square * x).sum(), square.square().sum()]
        self._sums += torch.stack([p.to(torch.float64) for p in powers])
        self.absmax = max(self.absmax, float(x.abs().max()))
        self.tokens += x.shape[0]

    def merge(self, other: Stat) -> None:
        assert isinstance(other, Moments)
        self._sums += other._sums
        self._square += other._square
        self.absmax = max(self.absmax, other.absmax)
        self.tokens += other.tokens

    def mean_square(self) -> Float[Tensor, "in"]:
        return (self._square / max(self.tokens, 1)).to(torch.float32)

    @property
    def std(self) -> float:
        mean, square, *_ = (self._sums / max(self.tokens * self._n_in, 1)).tolist()
        return float(max(square - mean * mean, 0.0) ** 0.5)

    @property
    def kurtosis(self) -> float:
        """Fourth standardised moment (3 for a Gaussian); 0 for a constant."""
        m1, m2, m3, m4 = (self._sums / max(self.tokens * self._n_in, 1)).tolist()
        variance = m2 - m1 * m1
        if variance <= 0:
            return 0.0
        return float((m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4) / variance**2)


S = TypeVar("S", bound=Stat)


class Stats:
    """The statistics of one input, by kind; ``stats[Gram]``."""

    def __init__(self, where: str, values: Mapping[type[Stat], Stat]) -> None:
        self.where, self._values = where, dict(values)

    @classmethod
    def of(cls, where: str, kinds: Iterable[type[Stat]], n_in: int, device: torch.device | str = "cpu") -> Stats:
        ordered = sorted(kinds, key=lambda kind: kind.__name__)
        return cls(where, {kind: kind(n_in, device) for kind in ordered})

    def __getitem__(self, kind: type[S]) -> S:
        """Raises CalibrationError when the walk did not collect this kind, or saw no token."""
        if kind not in self._values:
            raise CalibrationError(f"no {kind.__name__} was collected", where=self.where, fix="calibrate the recipe")
        value = self._values[kind]
        if value.tokens == 0:
            raise CalibrationError(
                "no calibration token reached this linear", where=self.where,
                why="nothing is known about its inputs (an expert that was never chosen?)",
                fix="more calibration text, or rtn for this site",
            )  # fmt: skip
        assert isinstance(value, kind)
        return value

    def __contains__(self, kind: type[Stat]) -> bool:
        return kind in self._values and self._values[kind].tokens > 0

    def update(self, x: Float[Tensor, "tokens in"]) -> None:
        for value in self._values.values():
            value.update(x)

    def rescale(self, by: Float[Tensor, "in"]) -> None:
        """What they would be had every input been multiplied by ``by``; kinds of which that cannot be told go."""
        self._values = {kind: value for kind, value in self._values.items() if value.rescale(by)}
