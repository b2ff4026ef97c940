"""Format: how values become codes. ``Format = Grid x Block x how the scale is stored``.

Four pure steps, so that a method is generic over formats (and a format over methods):

    fit(w, importance, ...)   -> Params     the scale and zero of every block, as they will be stored
    snap(values, step, zero)  -> Snapped    the nearest codes and the values they decode to
    encode(w, params)         -> QTensor    nearest codes for a whole matrix, packed
    assemble(codes, params)   -> QTensor    codes chosen elsewhere (GPTQ), packed

and ``nbytes(shape)``, exact before any work is done.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass, replace

import torch

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.errors import FormatError
from lowbit.formats.blocks import Block
from lowbit.formats.clip import Cost, Ends, Importance, chunks, search
from lowbit.formats.grids import Codebook, Grid, IntGrid, Quantile, Table
from lowbit.formats.pack import Codes, Whole
from lowbit.formats.qtensor import Affine, Lookup, Offset, QTensor, Raw, Sum
from lowbit.formats.snap import Snapped, Snapper, divisible, integer_snapper, snap_integer, snap_table, table_snapper


@dataclass(frozen=True)
class Stored:
    """A scale kept as plain numbers of ``dtype``."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Params:
    """The fitted parameters of a matrix's blocks.

    ``scale`` is what will be stored (None: the grid is absolute); ``step`` is its decoded value, so that codes are
    chosen for the scale that a reader will see; ``zero`` holds zero points as stored (asymmetric grids); ``table`` the
    values of a grid that is estimated from the weight.
    """

    scale: QTensor | None
    step: Float[Tensor, "rows columns"]
    zero: Float[Tensor, "rows columns"] | None
    table: Float[Tensor, "levels"] | None = None


@dataclass(frozen=True)
class Format:
    """A number format for matrices. ``name`` is its one spelling everywhere (see :mod:`lowbit.formats.presets`)."""

    name: str
    grid: Grid
    block: Block
    scale: Stored | Format | None
    zero: Stored | None = None  # asymmetric grids: None stores whole zeros in the codes' own bits, else any number
    offset: Stored | Format | None = None  # asymmetric grids: blocks store their least value, not their zero
    centred: bool = False  # the mean is subtracted first and stored apart (double quantization)
    least_clip_steps: int = 0  # grids that min-max serves badly (ternary) are always searched

    def fit(
        self,
        w: Matrix,
        importance: Float[Tensor, "in"] | Float[Tensor, "in in"] | None = None,
        clip_steps: int = 0,
        ranges: tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]] | None = None,
        ends: Ends = "together",
    ) -> Params:
        """Block parameters by min-max, by a search over ``clip_steps`` smaller ranges, or for ``ranges`` (low, high).

        The search keeps, block by block, the range with the least error d = Q(w) - w, min-max among them: ``d dᵀ``, or
        with each column weighted by ``importance`` (the mean square of its inputs), or ``d G dᵀ`` when that is the
        Gram matrix of the inputs: the block's own output error (AWQ, arXiv 2306.00978; blocks along rows only). Both
        ends of a range shrink by one factor; ``ends="apart"`` searches each for itself as well, where the grid is
        asymmetric, and never ends with a larger error. Where a scale is coded together with others (``nvfp4``,
        ``nf4-dq``) it is searched as if a few rows were the whole matrix, so that the error of one block may come out
        slightly above the least. Ranges, given ones too, always include zero, so that one-sided blocks survive.

        Cost O(out * in) an evaluation, times n for a Gram matrix and blocks of n; ``1 + clip_steps`` evaluations, five
        times as many for ends apart. Raises FormatError for values, or scales as stored, that are not finite, and for
        ``ranges`` or ``importance`` of another shape.
        """
        shape = tuple(w.shape)
        self.check(shape)
        blocks = self.block.split(w)  # (rows, columns, n)
        low, high = (blocks.amin(-1), blocks.amax(-1)) if ranges is None else ranges
        if low.shape != blocks.shape[:2] or high.shape != low.shape:
            found = f"ranges of shapes {tuple(low.shape)} and {tuple(high.shape)}"
            raise FormatError(f"{found} for {tuple(blocks.shape[:2])} blocks", where=self.name)
        low, high = low.clamp(max=0), high.clamp(min=0)
        table = None
        if isinstance(self.grid, Quantile):
            step = self.block.spread(divisible(self._params(low, high).step), shape)
            table = self.grid.estimate((w / step).clamp_(-1, 1))
        clip_steps = max(clip_steps, self.least_clip_steps)
        if clip_steps and ranges is None:
            weights, factors = Importance.of(importance, self.block, w), _factors(self, clip_steps)
            apart = ends == "apart" and self.asymmetric
            if has_kernel(self, blocks) and (not apart if weights.gram is None else 16 <= blocks.shape[-1] <= 128):
                low, high = _search_on_gpu(self, blocks, low, high, weights, factors, apart)
            else:
                low, high = search(
                    low, high, factors, functools.partial(_cost, self, blocks, weights, table), chunks(blocks), apart
                )
        return self._params(low, high, table)

    @property
    def asymmetric(self) -> bool:
        """Whether blocks have a zero point beside their scale."""
        return isinstance(self.grid, IntGrid) and not self.grid.symmetric

    def snap(self, values: Tensor, step: Tensor, zero: Tensor | None, table: Tensor | None = None) -> Snapped:
        """Nearest codes and their values; ``step`` and ``zero`` broadcast against ``values``. Cost O(values).

        Raises FormatError where the grid is estimated from the weight and no ``table`` is given.
        """
        if isinstance(self.grid, IntGrid):
            return snap_integer(self.grid, self.zero is None, values, step, zero)
        return snap_table(self._book(table), values, step)

    def snapper(
        self,
        step: Float[Tensor, "blocks n"],
        zero: Float[Tensor, "blocks n"] | None,
        table: Float[Tensor, "levels"] | None = None,
    ) -> Snapper:
        """``snap`` for a loop over vectors that use one row of ``step`` each; no temporaries for integer grids."""
        if isinstance(self.grid, IntGrid):
            return integer_snapper(self.grid, self.zero is None, step, zero)
        return table_snapper(self._book(table), step)

    def encode(self, w: Matrix, params: Params) -> QTensor:
        """Every weight to its nearest code."""
        return self.assemble(self.nearest(w, params).codes, params)

    def nearest(self, w: Matrix, params: Params) -> Snapped:
        """The nearest code of every weight, and the value that it decodes to."""
        shape = tuple(w.shape)
        zero = None if params.zero is None else self.block.spread(params.zero, shape)
        step = self.block.spread(params.step, shape)
        return self.snap(w, step, zero, params.table)

    def assemble(self, codes: Whole, params: Params) -> QTensor:
        """The QTensor of given codes and parameters."""
        packed = Codes.of(codes, self.grid.levels)
        shape = tuple(codes.shape)
        if isinstance(self.grid, IntGrid):
            if params.scale is None:
                raise FormatError("an integer grid needs a scale", where=self.name)
            if self.offset is not None and params.zero is not None:
                least = self._stored_offset(-params.zero * divisible(params.step))
                return Offset(shape, packed, params.scale, least, self.block)
            return Affine(shape, packed, params.scale, self._stored_zero(params.zero), self.block)
        if isinstance(self.grid, Table):
            return Lookup(shape, packed, self.grid.name, params.scale, self.block)
        if params.table is None:
            raise self._no_table()
        return Lookup(shape, packed, params.table.to(torch.float16), params.scale, self.block)

    def join(self, columns: list[Params]) -> Params:
        """Parameters fitted apart for consecutive block columns, as one; their scales are stored as they are.

        Raises FormatError for coded scales and estimated tables, which depend on all of a matrix.
        """
        if not isinstance(self.scale, Stored) or isinstance(self.grid, Quantile):
            raise FormatError(
                "coded scales and estimated tables cannot be fitted group by group", where=self.name,
                why="they depend on all of a matrix", fix="static groups, or a format with plain scales",
            )  # fmt: skip
        step = torch.cat([p.step for p in columns], dim=1)
        zeros = [p.zero for p in columns if p.zero is not None]
        return Params(Raw.of(step.to(self.scale.dtype)), step, torch.cat(zeros, dim=1) if zeros else None)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes that a matrix of ``shape`` will occupy, scales and zeros included."""
        self.check(shape)
        rows, columns = shape
        blocks = self.block.count(shape)
        total = Codes.nbytes(rows, columns, self.grid.levels)
        if self.offset is not None:
            total += _stored_bytes(self.offset, blocks)
        elif self.asymmetric and self.zero is not None:
            total += math.prod(blocks) * self.zero.dtype.itemsize
        elif self.asymmetric:
            total += Codes.nbytes(1, math.prod(blocks), self.grid.levels)
        elif isinstance(self.grid, Quantile):
            total += self.grid.levels * torch.float16.itemsize
        if self.scale is not None:
            total += _stored_bytes(self.scale, blocks)
        return total + (4 if self.centred else 0)

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Exact bits a weight of a matrix of ``shape``."""
        return 8 * self.nbytes(shape) / math.prod(shape)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises FormatError for a tensor that this format cannot take."""
        if len(shape) != 2 or 0 in shape:
            raise FormatError(f"{self.name} needs a matrix, got shape {tuple(shape)}", fix="keep this tensor in 16 bit")

    def round_zero(self, zero: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Zero points as they will be read back: whole and within the codes' range, or rounded to their dtype.

        Raises FormatError where blocks store coded offsets, of which no zero can move by itself.
        """
        if isinstance(self.offset, Format):
            raise FormatError(
                "offsets are coded together", where=self.name, why="no zero can move by itself", fix="rtn"
            )
        if self.zero is None:
            return torch.round(zero).clamp_(0, self.grid.levels - 1)
        return zero.to(self.zero.dtype).to(torch.float32)

    def _params(self, low: Tensor, high: Tensor, table: Tensor | None = None) -> Params:
        """Parameters of ranges that include zero, rounded to how they are stored."""
        if not self.asymmetric:
            reach = torch.maximum(high, -low)
            if isinstance(self.grid, IntGrid) and self.grid.signed:
                reach = torch.where(high > -low, -reach, reach)
            return Params(*self._store(reach / self._divisor()), None, table)
        stored, step = self._store((high - low) / (self.grid.levels - 1))
        if self.offset is not None:
            return Params(stored, step, -self._stored_offset(low).decode() / divisible(step))
        return Params(stored, step, self.round_zero(-low / divisible(step)))

    def _stored_zero(self, zero: Tensor | None) -> Codes | Raw | None:
        if zero is None:
            return None
        if self.zero is None:
            return Codes.of(zero.reshape(1, -1), self.grid.levels)
        return Raw.of(zero.to(self.zero.dtype))

    def _stored_offset(self, low: Tensor) -> QTensor:
        """The least values of blocks as stored; coded ones are whole numbers times a negative scale."""
        if isinstance(self.offset, Format):
            coded = self.offset.quantize_scale(-low)
            assert isinstance(coded, Affine)
            return replace(coded, scale=coded.scale.map(torch.neg))
        assert self.offset is not None
        stored = Raw.of(low.to(self.offset.dtype))
        if not torch.isfinite(stored.data).all():
            raise FormatError(f"an offset of {float(low.min()):.3g} does not fit its storage", where=self.name)
        return stored

    def _book(self, table: Tensor | None) -> Table | Codebook:
        if isinstance(self.grid, Table):
            return self.grid
        if table is None:
            raise self._no_table()
        return Codebook.of(table)

    def _no_table(self) -> FormatError:
        return FormatError(
            "values that are estimated from the weight were not given", where=self.name,
            why="this method chooses codes before it knows what they stand for", fix="rtn, or a table such as nf4",
        )  # fmt: skip

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
            tiny = (scale != 0) & (scale.abs() < smallest)
            stored: QTensor = Raw.of(torch.where(tiny, scale.sign() * smallest, scale).to(self.scale.dtype))
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
        """This format applied to a matrix of scales (all non-negative, but for signed grids)."""
        if self.scale is None:  # powers of two, rounded down as OCP microscaling does; clamped to the table
            exponent = torch.floor(torch.log2(scale.clamp_min(2.0**-127))).clamp_(-127, 127)
            return Lookup(tuple(scale.shape), Codes.of(exponent + 127, 255), "e8m0", None, self.block)
        mean = scale.mean() if self.centred else None
        values = scale - mean if mean is not None else scale
        coded = self.encode(values, self.fit(values))
        if mean is None:
            return coded
        return Sum(coded.shape, (coded, Raw(coded.shape, mean.view(1, 1))))


def _stored_bytes(how: Stored | Format, blocks: tuple[int, int]) -> int:
    """Bytes of one number a block."""
    return math.prod(blocks) * how.dtype.itemsize if isinstance(how, Stored) else how.nbytes(blocks)


def _is_power(scale: Stored | Format | None) -> bool:
    """Whether scales are powers of two, kept as exponents alone."""
    return isinstance(scale, Format) and scale.scale is None


def has_kernel(fmt: Format, blocks: Float[Tensor, "*rows n"]) -> bool:
    """Whether kernels round blocks of this format: on a GPU, with plain scales and few values."""
    few = isinstance(fmt.grid, IntGrid) or (isinstance(fmt.grid, Table) and fmt.grid.levels <= 16)
    small = blocks.shape[-1] <= 1 << 14  # what the registers of one program hold
    plain = isinstance(fmt.scale, Stored) and fmt.offset is None
    plain = plain and not (isinstance(fmt.grid, IntGrid) and fmt.grid.signed)
    return blocks.is_cuda and few and small and plain and importlib.util.find_spec("triton") is not None


def _search_on_gpu(
    fmt: Format, blocks: Tensor, low: Tensor, high: Tensor, weights: Importance, factors: list[float], apart: bool
) -> tuple[Tensor, Tensor]:
    from lowbit.formats import clip_triton  # needs triton, which only a GPU has

    if weights.gram is None:
        return clip_triton.search(fmt, blocks, low, high, weights.diagonal, factors)
    return clip_triton.search_by_gram(fmt, blocks, low, high, weights.gram, factors, apart)


def _factors(fmt: Format, steps: int) -> list[float]:
    """What a search multiplies ranges by: ``steps`` in (0.4, 1]; for power-of-two scales, which round too, three."""
    return [1.0, 2.0, 0.5] if _is_power(fmt.scale) else [1 - 0.6 * i / steps for i in range(steps)]


def _cost(fmt: Format, blocks: Tensor, weights: Importance, table: Tensor | None, rows: slice) -> Cost:
    """The error of some block rows as a function of their ranges, computed in units of the step."""
    chunk = blocks[rows]
    scratch = torch.empty_like(chunk)

    def cost(low: Tensor, high: Tensor) -> Tensor:
        params = fmt._params(low, high)
        scaled = chunk * divisible(params.step).reciprocal().unsqueeze(-1)
        if isinstance(fmt.grid, IntGrid):
            zero = (torch.full_like(params.step, fmt.grid.offset) if params.zero is None else params.zero).unsqueeze(-1)
            top = fmt.grid.levels - 1
            if fmt.zero is None:
                torch.clamp(scaled, -zero, top - zero, out=scratch).round_()
            else:
                torch.add(scaled, zero, out=scratch).clamp_(0, top).round_().sub_(zero)
        else:
            scratch.copy_(fmt._book(table).round(scaled))
        return weights.cost(scratch.sub_(scaled), rows) * params.step.square()

    return cost
