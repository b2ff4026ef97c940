"""Format: how values become codes. ``Format = Grid x Block x how the scale is stored``.

Four pure steps, so that a method is generic over formats (and a format over methods):

    fit(w, importance)        -> Params     the scale and zero of every block, as they will be stored
    snap(values, step, zero)  -> Snapped    the nearest codes and the values they decode to
    encode(w, params)         -> QTensor    nearest codes for a whole matrix, packed
    assemble(codes, params)   -> QTensor    codes chosen elsewhere (GPTQ), packed

and ``nbytes(shape)``, exact before any work is done.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.errors import FormatError
from lowbit.formats.blocks import Block
from lowbit.formats.grids import Grid, IntGrid, Table
from lowbit.formats.pack import Codes, Whole
from lowbit.formats.qtensor import Affine, Lookup, QTensor, Raw, Sum


@dataclass(frozen=True)
class Stored:
    """A scale kept as plain numbers of ``dtype``."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Params:
    """The fitted parameters of a matrix's blocks.

    ``scale`` is what will be stored (None: the grid is absolute); ``step`` is its decoded value, so that codes are
    chosen for the scale that a reader will see; ``zero`` holds integer zero points (asymmetric grids).
    """

    scale: QTensor | None
    step: Float[Tensor, "rows columns"]
    zero: Float[Tensor, "rows columns"] | None


class Snapped(NamedTuple):
    codes: Tensor
    values: Tensor


Snapper = Callable[[Tensor, int, Tensor, Tensor], None]
"""``(values, block, codes, out)``: writes the codes of ``values``, and what they decode to, on block row ``block``."""


@dataclass(frozen=True)
class Format:
    """A number format for matrices. ``name`` is its one spelling everywhere (see :mod:`lowbit.formats.presets`)."""

    name: str
    grid: Grid
    block: Block
    scale: Stored | Format | None
    centred: bool = False  # the mean is subtracted first and stored apart (double quantization)
    least_clip_steps: int = 0  # grids that min-max serves badly (ternary) are always searched

    def fit(self, w: Matrix, importance: Float[Tensor, "in"] | None = None, clip_steps: int = 0) -> Params:
        """Block parameters by min-max, or by a search over ``clip_steps`` smaller ranges.

        The search keeps, block by block, the range with the least squared error, each column weighted by
        ``importance`` (the mean square of its inputs) when given; min-max is among them. Where a scale is coded
        together with others (``nvfp4``, ``nf4-dq``) it is searched as if a few rows were the whole matrix, so that the
        error of one block may come out slightly above the least. Asymmetric ranges always include zero, so that
        one-sided blocks survive. Cost O(out * in * (1 + clip_steps)). Raises FormatError for values, or scales as
        stored, that are not finite.
        """
        self.check(tuple(w.shape))
        blocks = self.block.split(w)  # (rows, columns, n)
        low, high = blocks.amin(-1).clamp_(max=0), blocks.amax(-1).clamp_(min=0)
        clip_steps = max(clip_steps, self.least_clip_steps)
        if clip_steps:
            shrink = _search_clip(self, blocks, low, high, self._weights(importance, tuple(w.shape)), clip_steps)
            low, high = low * shrink, high * shrink
        return self._params(low, high)

    def snap(self, values: Tensor, step: Tensor, zero: Tensor | None) -> Snapped:
        """Nearest codes and their values; ``step`` and ``zero`` broadcast against ``values``. Cost O(values).

        Tables multiply by the reciprocal of the step, as bitsandbytes does, so that codes agree bit for bit.
        """
        if isinstance(self.grid, IntGrid):
            shift = zero if zero is not None else float(self.grid.offset)
            codes = torch.round(values / _divisible(step)).add_(shift).clamp_(0, self.grid.levels - 1)
            return Snapped(codes, (codes - shift) * step)
        codes = self.grid.nearest(values * _divisible(step).reciprocal())
        return Snapped(codes, self.grid.lookup(codes) * step)

    def snapper(self, step: Float[Tensor, "blocks n"], zero: Float[Tensor, "blocks n"] | None) -> Snapper:
        """``snap`` for a loop over vectors that use one row of ``step`` each; no temporaries for integer grids."""
        if not isinstance(self.grid, IntGrid):
            return functools.partial(_snap_table, self.grid, step)
        shift = torch.full_like(step, self.grid.offset) if zero is None else zero
        return functools.partial(
            _snap_integer, self.grid.levels - 1, step.unbind(), _divisible(step).unbind(), shift.unbind()
        )

    def encode(self, w: Matrix, params: Params) -> QTensor:
        """Every weight to its nearest code."""
        shape = tuple(w.shape)
        zero = None if params.zero is None else self.block.spread(params.zero, shape)
        return self.assemble(self.snap(w, self.block.spread(params.step, shape), zero).codes, params)

    def assemble(self, codes: Whole, params: Params) -> QTensor:
        """The QTensor of given codes and parameters."""
        packed = Codes.of(codes, self.grid.levels)
        shape = tuple(codes.shape)
        if isinstance(self.grid, IntGrid):
            if params.scale is None:
                raise FormatError("an integer grid needs a scale", where=self.name)
            zero = None if params.zero is None else Codes.of(params.zero.reshape(1, -1), self.grid.levels)
            return Affine(shape, packed, params.scale, zero, self.block)
        return Lookup(shape, packed, self.grid.name, params.scale, self.block)

    def join(self, columns: list[Params]) -> Params:
        """Parameters fitted apart for consecutive block columns, as one; their scales are stored as they are.

        Raises FormatError for coded scales, which depend on all of a matrix.
        """
        if not isinstance(self.scale, Stored):
            raise FormatError("scales that are themselves coded cannot be fitted group by group", where=self.name)
        step = torch.cat([p.step for p in columns], dim=1)
        zeros = [p.zero for p in columns if p.zero is not None]
        return Params(Raw.of(step.to(self.scale.dtype)), step, torch.cat(zeros, dim=1) if zeros else None)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes that a matrix of ``shape`` will occupy, scales and zeros included."""
        self.check(shape)
        rows, columns = shape
        blocks = self.block.count(shape)
        total = Codes.nbytes(rows, columns, self.grid.levels)
        if isinstance(self.grid, IntGrid) and not self.grid.symmetric:
            total += Codes.nbytes(1, math.prod(blocks), self.grid.levels)
        if isinstance(self.scale, Stored):
            total += math.prod(blocks) * self.scale.dtype.itemsize
        elif self.scale is not None:
            total += self.scale.nbytes(blocks)
        return total + (4 if self.centred else 0)

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Exact bits a weight of a matrix of ``shape``."""
        return 8 * self.nbytes(shape) / math.prod(shape)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises FormatError for a tensor that this format cannot take."""
        if len(shape) != 2 or 0 in shape:
            raise FormatError(f"{self.name} needs a matrix, got shape {tuple(shape)}", fix="keep this tensor in 16 bit")

    def _params(self, low: Tensor, high: Tensor) -> Params:
        """Parameters of ranges that include zero, rounded to how they are stored."""
        if isinstance(self.grid, IntGrid) and not self.grid.symmetric:
            scale = (high - low) / (self.grid.levels - 1)
        else:
            scale = torch.maximum(high, -low) / self._divisor()
        stored, step = self._store(scale)
        if not (isinstance(self.grid, IntGrid) and not self.grid.symmetric):
            return Params(stored, step, None)
        zero = torch.round(-low / _divisible(step)).clamp_(0, self.grid.levels - 1)
        return Params(stored, step, zero)

    def _divisor(self) -> float:
        """What the largest magnitude of a block is mapped to: OCP's power of two under a power-of-two scale."""
        if _is_power(self.scale) and isinstance(self.grid, Table):
            return self.grid.power_of_two_top
        return self.grid.top

    def _store(self, scale: Tensor) -> tuple[QTensor | None, Tensor]:
        """A scale as it is stored, and as it will be read back.

        A scale too small for its dtype becomes the smallest number that the dtype has, not zero, so that a block of
        tiny values keeps the levels it can.
        """
        if not torch.isfinite(scale).all():
            raise FormatError(
                "a block's range is not finite", where=self.name,
                why="a NaN or infinite value has no nearest code", fix="look for NaN in this weight",
            )  # fmt: skip
        if self.scale is None:
            return None, torch.ones_like(scale)
        if isinstance(self.scale, Stored):
            limits = torch.finfo(self.scale.dtype)
            smallest = limits.smallest_normal * limits.eps
            stored: QTensor = Raw.of(torch.where(scale > 0, scale.clamp_min(smallest), scale).to(self.scale.dtype))
        else:
            stored = self.scale.quantize_scale(scale)
        step = stored.decode()
        if not torch.isfinite(step).all():
            raise FormatError(
                f"a scale of {float(scale.abs().max()):.3g} does not fit its storage",
                where=self.name, fix="a format whose scales are float32, such as nf4",
            )  # fmt: skip
        return stored, step

    def quantize_scale(self, scale: Tensor) -> QTensor:
        """This format applied to a matrix of scales (all non-negative)."""
        if self.scale is None:  # powers of two, rounded down as OCP microscaling does; clamped to the table
            exponent = torch.floor(torch.log2(scale.clamp_min(2.0**-127))).clamp_(-127, 127)
            return Lookup(tuple(scale.shape), Codes.of(exponent + 127, 255), "e8m0", None, self.block)
        mean = scale.mean() if self.centred else None
        values = scale - mean if mean is not None else scale
        coded = self.encode(values, self.fit(values))
        if mean is None:
            return coded
        return Sum(coded.shape, (coded, Raw(coded.shape, mean.view(1, 1))))

    def _weights(self, importance: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        if importance is None:
            return None
        if self.block.follows_rows:
            return self.block.split(importance.view(1, -1))  # (1, columns, n), the same for every row
        return self.block.split(importance.view(1, -1).expand(shape))


def _is_power(scale: Stored | Format | None) -> bool:
    """Whether scales are powers of two, kept as exponents alone."""
    return isinstance(scale, Format) and scale.scale is None


def _divisible(step: Tensor) -> Tensor:
    """Steps that can be divided by: one where a block is all zeros, or so small that a reciprocal would overflow."""
    return step + (step.abs() < torch.finfo(torch.float32).tiny)


def _snap_integer(
    top: int, step: Sequence[Tensor], divisor: Sequence[Tensor], shift: Sequence[Tensor],
    values: Tensor, block: int, codes: Tensor, out: Tensor,
) -> None:  # fmt: skip
    torch.div(values, divisor[block], out=codes).round_().add_(shift[block]).clamp_(0, top)
    torch.sub(codes, shift[block], out=out).mul_(step[block])


def _snap_table(grid: Table, step: Tensor, values: Tensor, block: int, codes: Tensor, out: Tensor) -> None:
    nearest = grid.nearest(values * _divisible(step[block]).reciprocal())
    codes.copy_(nearest)
    torch.mul(grid.lookup(nearest), step[block], out=out)


_CHUNK = 1 << 18  # elements: bounds the temporaries of a search step to a few MB


def _search_clip(
    fmt: Format, blocks: Tensor, low: Tensor, high: Tensor, weights: Tensor | None, steps: int
) -> Float[Tensor, "rows columns"]:
    """The factor by which each block's range should shrink for the least squared error.

    One of ``steps`` in (0.4, 1]; for scales that are powers of two, which others round to, of 2, 1 and 1/2.
    """
    factors = [1.0, 2.0, 0.5] if _is_power(fmt.scale) else [1 - 0.6 * i / steps for i in range(steps)]
    best = torch.ones_like(low)
    per_chunk = max(1, _CHUNK // (blocks.shape[1] * blocks.shape[2]))
    for start in range(0, blocks.shape[0], per_chunk):
        rows = slice(start, start + per_chunk)
        chunk = blocks[rows]
        weight = None if weights is None else (weights if weights.shape[0] == 1 else weights[rows])
        least = torch.full_like(low[rows], math.inf)
        scratch = torch.empty_like(chunk)
        for factor in factors:
            error = _squared_error(fmt, chunk, fmt._params(low[rows] * factor, high[rows] * factor), weight, scratch)
            better = error < least
            least = torch.where(better, error, least)
            best[rows] = torch.where(better, factor, best[rows])
    return best


def _squared_error(fmt: Format, blocks: Tensor, params: Params, weight: Tensor | None, scratch: Tensor) -> Tensor:
    """Sum over each block of the (weighted) squared error after snapping, computed in units of the step."""
    step = params.step.unsqueeze(-1)
    scaled = blocks * _divisible(step).reciprocal()
    if isinstance(fmt.grid, IntGrid):
        zero = (torch.full_like(params.step, fmt.grid.offset) if params.zero is None else params.zero).unsqueeze(-1)
        torch.clamp(scaled, -zero, fmt.grid.levels - 1 - zero, out=scratch).round_()
    else:
        scratch.copy_(fmt.grid.round(scaled))
    scratch.sub_(scaled).square_()
    return (scratch if weight is None else scratch.mul_(weight)).sum(-1).mul_(params.step.square())
