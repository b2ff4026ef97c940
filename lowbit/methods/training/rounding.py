"""Learned rounding of one linear: where between two codes each weight lies, moved by the sign of its gradient.

Every weight keeps a position on the grid of its block, in units of the block's step; its code is the nearest one. The
gradient of the loss at the rounded weight is taken for that of the position (straight through), and only its sign is
used (SignRound, Cheng et al., arXiv 2309.05516), so that one rate fits all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.errors import FormatError
from lowbit.formats.ec import Entropy
from lowbit.formats.format import Format, Params, Stored
from lowbit.formats.grids import IntGrid, Table
from lowbit.formats.pack import Whole
from lowbit.formats.qtensor import QTensor, Raw
from lowbit.formats.snap import Snapped, divisible

_EDGE = 0.98  # how far towards the neighbouring code a weight may start, in halves of the distance


class Rounding:
    """The positions (and, when asked, step sizes) of one linear's weights while they are learned.

    Starts exactly at ``codes``: each weight where it lies itself if its nearest code is the one given, else as close to
    it as the given code allows. Memory: one float32 a weight. Blocks must lie along rows, or be the whole matrix.
    """

    def __init__(self, w: Matrix, codes: Whole, params: Params, fmt: Format) -> None:
        self.fmt, self.params, self.shape = fmt, params, tuple(w.shape)
        self._step = params.step.unsqueeze(-1)  # (rows, columns, 1)
        self._zero = None if params.zero is None else params.zero.unsqueeze(-1)
        self._stretch = torch.ones_like(self._step)
        self._low, self._high, self._gap, least = self._grid()
        own = fmt.block.split(w) / divisible(self._step)
        given = fmt.block.split(fmt.assemble(codes, params).decode()) / divisible(self._step)
        close = given + (own - given).clamp_(-_EDGE / 2 * least, _EDGE / 2 * least)
        keeps = self._snap(own).codes == fmt.block.split(codes.to(torch.float32))
        position = torch.where(keeps, own, close)  # (rows, columns, n)
        self._position = torch.minimum(torch.maximum(position, self._low), self._high)

    def weight(self) -> Matrix:
        """The rounded weight, as it now is."""
        return self._join(self._snap(self._position).values * (self._step * self._stretch))

    def move(self, grad: Matrix, rate: float, scale_rate: float) -> None:
        """One step down: every position by ``rate`` code distances, every step size by a share ``scale_rate`` of it.

        Scales that are coded themselves stay as they are.
        """
        g = self.fmt.block.split(grad)
        if scale_rate and isinstance(self.fmt.scale, Stored):
            slope = (g * self._snap(self._position).values).sum(-1, keepdim=True)
            self._stretch -= scale_rate * slope.sign_()
        self._position.sub_(g.sign(), alpha=rate * self._gap)
        torch.maximum(self._position, self._low, out=self._position)
        torch.minimum(self._position, self._high, out=self._position)

    def encode(self) -> QTensor:
        """The result, with step sizes as they will be stored."""
        params = self.params
        if isinstance(self.fmt.scale, Stored) and bool((self._stretch != 1).any()):
            scale = Raw.of((self._step * self._stretch).squeeze(-1).to(self.fmt.scale.dtype))
            params = Params(scale, scale.decode(), params.zero, params.table)
        return self.fmt.assemble(self._join(self._snap(self._position).codes), params)

    def _snap(self, position: Float[Tensor, "rows columns n"]) -> Snapped:
        """The nearest codes, and their values in units of the step."""
        return self.fmt.snap(position, torch.ones_like(self._step), self._zero, self.params.table)

    def _grid(self) -> tuple[Tensor, Tensor, float, float]:
        """The lowest and highest position, and the mean and least distance of codes, all in units of the step.

        Half a distance beyond the last code: further out nothing changes, and the way back would be longer.
        """
        grid, device = self.fmt.grid, self._step.device
        if isinstance(grid, IntGrid):
            zero = torch.tensor(float(grid.offset), device=device) if self._zero is None else self._zero
            return -zero - 0.5, grid.levels - 0.5 - zero, 1.0, 1.0
        values = torch.tensor(grid.values, device=device) if isinstance(grid, Table) else self.params.table
        assert values is not None  # codes of an estimated grid come with its values
        levels = values[values.isfinite()].to(torch.float32).unique()
        mean = float(levels[-1] - levels[0]) / (len(levels) - 1)
        return levels[0] - mean / 2, levels[-1] + mean / 2, mean, float(levels.diff().min())

    def _join(self, blocks: Tensor) -> Tensor:
        rows, columns = self.shape
        return blocks.reshape(rows, -1)[:, :columns]


@dataclass(frozen=True)
class Held:
    """A linear whose codes are settled: the same, without moves."""

    q: QTensor

    def weight(self) -> Matrix:
        return self.q.decode()

    def move(self, grad: Matrix, rate: float, scale_rate: float) -> None:
        """Nothing: its size is what was asked for."""

    def encode(self) -> QTensor:
        return self.q


def learnable(fmt: Format, where: str) -> None:
    """Raises FormatError for a format whose rounding cannot be learned."""
    if isinstance(fmt, Entropy):
        raise FormatError(
            f"{fmt.name} has no room to learn in", where=where, why="a changed rounding changes the size",
            fix="steps=0: the correction, then GPTQ",
        )  # fmt: skip
    if not fmt.block.follows_rows and fmt.block.kind != "tensor":
        raise FormatError(f"learned rounding needs blocks along rows, {fmt.name} has {fmt.block}", where=where)
