"""QLLM: outlier channels are split into several, similar channels are merged, so that inputs round well.

Liu et al., arXiv 2310.08041. Disassembly: a channel with max|x_j| > theta becomes T = ceil(max|x_j| / theta) copies of
x_j / T, each of which meets its weights: exact, for T - 1 more columns. Assembly: among the other channels, the pairs
that matter least to the outputs, by ``E (x_i - x_j)² |W_i - W_j|² / 4``, become ``(x_i + x_j) / 2`` with weights
``W_i + W_j``, until there are as many columns as before; pairs come from bipartite matching. Then a low-rank error
correction is added to the weight before it is rounded, so that it costs nothing at inference.

What this file does where the paper differs:

- theta is chosen for each input by the error of the outputs of the linears that read it, weights and inputs rounded as
  the recipe says, on a sample of inputs. (The paper's error is that of softmax(QKᵀ)V, or of the feed-forward part.)
  No split at all is one of the choices.
- A column holds at most two channels, so a channel is matched once; one round of the paper's matching.
- The correction is in closed form, where the paper trains it for ten epochs. With z the rounded columns (rounding taken
  as independent noise) the best weight against the original outputs is the Wiener filter ``E[y zᵀ] E[z zᵀ]⁻¹``; its
  difference to the rounded weight is made up for in one direction after the other, ``rank`` of them, as long as that
  helps. It makes up for rounding to nearest; with ``gptq``, which does so itself, take
  ``rank=0``.

As in the paper, the output projection of attention is left alone. Inputs that the recipe does not round are, too.
Options: ``assemble=false`` keeps the additional columns, ``rank=0`` leaves the correction out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lowbit.arrays import Float, Int, Matrix, Tensor
from lowbit.calibration.samples import Reservoir
from lowbit.calibration.stats import AbsMax, Gram, Stat, Stats
from lowbit.errors import RecipeError
from lowbit.formats.activation import ActivationFormat
from lowbit.formats.format import Format
from lowbit.formats.qtensor import Gathered, QTensor, Raw
from lowbit.methods.base import BlockView, Edit, Kind, SetEntry, SetWeight

_THETAS = 12  # tried, in equal ratios from the largest channel's maximum to the median's
_WIDEST = 2.0  # columns, as a multiple of the channels, that a theta may lead to
_ITERATIONS = 30  # of the power method
_DAMP = 1e-6  # of the mean of a diagonal, added to it
_NONE = torch.empty(0, 2, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Columns:
    """Into a linear by other columns: column c takes ``sum_s scale[c, s] x[index[c, s]]``; a scale of 0 is no slot."""

    index: Int[Tensor, "k 2"]
    scale: Float[Tensor, "k 2"]
    width: int

    def enter(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens k"]:
        scale, index = self.scale.to(x.dtype), self.index.long()
        return x[..., index[:, 0]] * scale[:, 0] + x[..., index[:, 1]] * scale[:, 1]

    def weight(self, w: Matrix) -> Float[Tensor, "out k"]:
        """A copy of a split channel's weights in each of its columns, the sum of those that are merged."""
        used, index = (self.scale != 0).to(w.dtype), self.index.long()
        return w[:, index[:, 0]] * used[:, 0] + w[:, index[:, 1]] * used[:, 1]

    def wrap(self, q: QTensor) -> QTensor:
        scale = Raw.of(self.scale.to(torch.float32))
        return Gathered((q.shape[0], self.width), self.index.clone(), scale, q)  # files hold no shared tensors

    @property
    def note(self) -> str:
        """For the report of a site: how many channels were split into how many columns, and how many merged."""
        split = (self.scale[:, 0] != 1) & (self.scale[:, 1] == 0)
        channels, merged = int(self.index[split, 0].unique().numel()), int((self.scale[:, 1] != 0).sum())
        what = f"{channels} split into {int(split.sum())}, {merged} pairs merged"
        return f"{self.width} channels in {len(self.index)} columns: {what}"


@dataclass(frozen=True)
class Linear:
    """One linear that reads the input in question, and how the recipe rounds it."""

    site: str
    W: Matrix
    format: Format
    activation: ActivationFormat

    def weight_values(self, columns: Columns) -> Float[Tensor, "out k"]:
        """The rounded weight that entered inputs meet."""
        inner = columns.weight(self.W)
        return self.format.encode(inner, self.format.fit(inner)).decode()

    def input_values(self, columns: Columns, x: Float[Tensor, "sample in"]) -> Float[Tensor, "sample k"]:
        """The rounded inputs that meet it; the range of a static format is that of the sample."""
        e = columns.enter(x)
        return self.activation.round(e, (e.min().view(1), e.max().view(1)) if self.activation.static else None)

    def error(self, columns: Columns, x: Float[Tensor, "sample in"], target: Float[Tensor, "sample out"]) -> float:
        """The squared error of the outputs on a sample."""
        found = self.input_values(columns, x) @ self.weight_values(columns).t()
        return float((found - target).square().sum())


@dataclass(frozen=True)
class Qllm:
    assemble: bool = True
    rank: int = 4

    kind: ClassVar[Kind] = "transform"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise RecipeError(f"rank {self.rank} is negative", where="qllm", fix="rank=4, or 0 for no correction")

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({AbsMax, Reservoir, Gram})

    def __call__(self, block: BlockView, stats: Mapping[str, Stats]) -> Iterator[Edit]:
        """New columns for each input, and a corrected weight for each linear that gains by it.

        Cost for each input: a dozen products of the sample with the weights, O(in² out) for the pairs and O(in³) for
        the correction; memory 4 in² doubles.
        """
        left_alone = attention_out(block.inputs)
        for sites in block.inputs:
            linears = [
                Linear(site, block.weight(site), fmt, rounding)
                for site in sites
                if (fmt := block.format(site)) and (rounding := block.activation(site))
            ]
            found = stats.get(sites[0])
            if sites == left_alone or len(linears) < len(sites) or found is None or Reservoir not in found:
                continue
            columns = self._columns(linears, found)
            if columns is not None:
                yield SetEntry(sites, columns)
            if self.rank:
                plain = columns or gathered(torch.ones_like(found[AbsMax].value, dtype=torch.int64))
                for linear in linears:
                    if (W := corrected(linear, plain, found, self.rank)) is not None:
                        yield SetWeight(linear.site, W)

    def _columns(self, linears: list[Linear], stats: Stats) -> Columns | None:
        """The columns with the least error of all thetas; None when no split is best."""
        absmax, x = stats[AbsMax].value, stats[Reservoir].rows
        targets = [x @ linear.W.t() for linear in linears]
        ones = torch.ones_like(absmax, dtype=torch.int64)
        cost = merging_cost(stats[Gram], torch.cat([linear.W for linear in linears])) if self.assemble else None
        choices: list[Columns] = [gathered(ones)]
        for theta in thetas(absmax):
            times = disassembled(absmax, theta)
            more = int(times.sum()) - len(times)
            if more == 0 or len(times) + more > _WIDEST * len(times):
                continue
            pairs = _NONE if cost is None else matched(cost, torch.nonzero(times == 1).flatten(), more)
            if pairs is not None:
                choices.append(gathered(times, pairs))
        errors = [sum(li.error(c, x, t) for li, t in zip(linears, targets, strict=True)) for c in choices]
        best = min(range(len(choices)), key=errors.__getitem__)
        return choices[best] if best else None


def thetas(absmax: Float[Tensor, "in"]) -> list[float]:
    """The grid of thresholds, falling; none where all channels are zero or at most half of them are not."""
    high, low = float(absmax.max()), float(absmax.median())
    return [low * (high / low) ** (1 - i / _THETAS) for i in range(1, _THETAS + 1)] if low > 0 else []


def disassembled(absmax: Float[Tensor, "in"], theta: float) -> Int[Tensor, "in"]:
    """How many columns each channel takes so that none exceeds theta (equation 4)."""
    return torch.ceil(absmax / theta).clamp_min(1).to(torch.int64)


def merging_cost(gram: Gram, W: Matrix) -> Float[Tensor, "in in"]:
    """What merging channels i and j does to the outputs: ``E (x_i - x_j)² |W_i - W_j|² / 4`` (equation 7)."""
    return _distances(gram.sum() / gram.tokens).mul_(_distances(W.t() @ W)).div_(4)


def _distances(S: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    d = S.diagonal()
    return (d[:, None] + d - 2 * S).clamp_min_(0)


def matched(cost: Float[Tensor, "n n"], free: Int[Tensor, "m"], pairs: int) -> Int[Tensor, "pairs 2"] | None:
    """Disjoint pairs of the channels ``free`` at low cost, each of an even and an odd one in their order.

    In every round those are paired that are each other's cheapest among the rest. None when there are too few
    channels. Cost O(m²) a round; a few rounds are usual.
    """
    a, b = free[0::2], free[1::2]
    if pairs > len(b):
        return None
    left = cost[a][:, b]
    found = [_NONE.to(free.device)]
    while sum(len(f) for f in found) < pairs:
        choice = left.argmin(dim=1)
        i = torch.nonzero(left.argmin(dim=0)[choice] == torch.arange(len(a), device=a.device)).flatten()
        j = choice[i]
        real = torch.isfinite(left[i, j])
        i, j = i[real], j[real]
        found.append(torch.stack([a[i], b[j]], dim=1))
        left[i], left[:, j] = torch.inf, torch.inf
    both = torch.cat(found)
    return both[cost[both[:, 0], both[:, 1]].argsort(stable=True)[:pairs]]


def gathered(times: Int[Tensor, "in"], pairs: Int[Tensor, "pairs 2"] = _NONE) -> Columns:
    """Columns in the order of channels: ``times`` copies of each, the second of a pair within the first."""
    width, pairs = len(times), pairs.to(times.device)
    channel = torch.arange(width, device=times.device)
    partner, times = channel.clone(), times.clone()
    partner[pairs[:, 0]] = pairs[:, 1]
    times[pairs[:, 1]] = 0
    first = channel.repeat_interleave(times)
    second = partner[first]
    merged = second != first
    each = torch.where(merged, 0.5, 1 / times[first].to(torch.float64))
    scale = torch.stack([each, torch.where(merged, 0.5, 0.0).to(torch.float64)], dim=1)
    short = torch.int16 if width <= 1 << 15 else torch.int32
    return Columns(torch.stack([first, second], dim=1).to(short), scale, width)


def corrected(linear: Linear, columns: Columns, stats: Stats, rank: int) -> Matrix | None:
    """The weight with a correction of at most ``rank`` for what rounding and merging do; None if none helps.

    Columns of one channel round alike, so they count as one input z = E x + noise with as many times the weight. A
    correction AB of z's weight is AB E in terms of the original inputs. Rounding the corrected weight again makes new
    errors in every entry that moved, so directions are corrected one by one, each from the weight as it rounds with
    the ones before, as long as the outputs of the sample come closer to the original ones.
    """
    x, W = stats[Reservoir].rows, linear.W
    _, times = columns.index[:, 0].unique_consecutive(return_counts=True)
    start = times.cumsum(0) - times
    E = Columns(columns.index[start], columns.scale[start] * times[:, None], columns.width)
    noise = (linear.input_values(columns, x) - columns.enter(x))[:, start] * times
    H = stats[Gram].sum().to(torch.float64) / stats[Gram].tokens
    cross = E.enter(H)  # E[x zᵀ]
    Hz = E.enter(cross.t()) + torch.diag(noise.square().mean(0).to(torch.float64))
    Hz.diagonal().add_(_DAMP * Hz.diagonal().mean())
    wanted = torch.linalg.solve(Hz, cross.t() @ W.to(torch.float64).t()).t().to(torch.float32)
    owner = torch.repeat_interleave(torch.arange(len(start), device=W.device), times)
    target = x @ W.t()
    best, least = linear, linear.error(columns, x, target)
    for _ in range(rank):
        rounded = torch.zeros_like(wanted).index_add_(1, owner, best.weight_values(columns)) / times
        better = replace(best, W=best.W + E.wrap(Raw.of(step(wanted - rounded, Hz.to(W.dtype)))).decode())
        if (error := better.error(columns, x, target)) >= least:
            break
        best, least = better, error
    return None if best is linear else best.W


def step(dW: Matrix, H: Float[Tensor, "in in"]) -> Matrix:
    """A matrix of rank one that lowers ``tr((dW - AB) H (dW - AB)ᵀ)`` much and moves weights little.

    A is the direction of outputs with the most error, by power iteration; B is that of steepest descent from there,
    uᵀ dW H, as far as the error falls. (The rank-one minimum B = uᵀ dW moves every weight by its own error, most of
    which meets no variance of the inputs; each moved weight is rounded anew.)
    """
    u = torch.randn(len(dW), generator=torch.Generator().manual_seed(0)).to(dW)
    for _ in range(_ITERATIONS):
        u = torch.nn.functional.normalize(dW @ (H @ (dW.t() @ u)), dim=0)
    b = H @ (dW.t() @ u)
    length = b.square().sum() / (b @ (H @ b)).clamp_min(torch.finfo(b.dtype).tiny)
    return torch.outer(u, length * b)


def attention_out(inputs: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The linears that read what attention made: the last to run in the module whose linears run first; or none."""
    module = inputs[0][0].rpartition(".")[0]
    later = [sites for sites in inputs[1:] if any(site.rpartition(".")[0] == module for site in sites)]
    return later[-1] if later else ()


METHOD = Qllm
