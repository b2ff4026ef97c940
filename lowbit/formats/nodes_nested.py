"""One 8-bit parent whose upper bits are models of their own (MatQuant, arXiv 2502.06786).

Slicing rounds: ``S(q, r) = clamp(floor(q / 2^(8-r) + 1/2), 0, 2^r - 1) * 2^(8-r)``, on the parent's own scale and
zero. Without the clamp (extra precision) there is one more bucket, ``2^r``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.arrays import Float, Int, Tensor, UInt8
from lowbit.errors import FormatError
from lowbit.formats.blocks import ALL, Block
from lowbit.formats.nodes import Affine, Raw, Sum
from lowbit.formats.nodes_terms import Sparse
from lowbit.formats.pack import Codes
from lowbit.formats.tree import QTensor

PARENT_BITS = 8
WIDTHS = range(2, PARENT_BITS + 1)


def buckets(q: UInt8[Tensor, "*shape"], bits: int, extra: bool) -> Int[Tensor, "*shape"]:
    """The bucket of every 8-bit code at ``bits``: 0 .. 2^bits - 1, or 2^bits when ``extra``; int16."""
    drop = PARENT_BITS - bits
    half = (1 << drop) >> 1
    t = (q.to(torch.int16) + half) >> drop
    return t if extra else t.clamp_(max=(1 << bits) - 1)


@dataclass(frozen=True, eq=False)
class Nested(QTensor):
    """``scale * (S(q, bits) - zero)`` of an ``Affine`` with 8-bit codes, stored at full width, read at 2 to 8 bits."""

    inner: QTensor
    bits: int
    extra: bool

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = ALL) -> Float[Tensor, "out in"]:
        parent = self.parent
        sliced = buckets(parent.codes.unpack(rows), self.bits, self.extra) << (PARENT_BITS - self.bits)
        return parent.values(sliced.to(torch.float32), rows).to(dtype)

    @property
    def parent(self) -> Affine:
        assert isinstance(self.inner, Affine)  # what ``problem`` looks at
        return self.inner

    def problem(self) -> str:
        if not isinstance(self.inner, Affine) or self.inner.codes.levels != 1 << PARENT_BITS:
            return "only an Affine with 8-bit codes can be read at other widths"
        if self.inner.shape != self.shape:
            return f"a parent of shape {self.inner.shape}"
        return "" if self.bits in WIDTHS else f"{self.bits} bits of {PARENT_BITS}"


def repack(q: Nested) -> Affine | Sum:
    """The same values in ``bits``-bit codes, for shipping: the lower bits are gone.

    The scale takes up the factor 2^(8-bits) exactly, zeros become fractions of 1/2^(8-bits) (none for a symmetric
    parent), and the extra bucket is one step more at single weights, held in a ``Sparse`` (its ``count`` says how many;
    4 bytes each). Bit-identical to ``q`` where scales have float16's precision. Cost O(out * in).

    Raises FormatError for a parent whose zeros are no codes.
    """
    parent, drop = q.parent, PARENT_BITS - q.bits
    if not drop:
        return parent
    t = buckets(parent.codes.unpack(), q.bits, q.extra)
    over = t >> q.bits != 0
    step = parent.scale.decode() * (1 << drop)
    if isinstance(parent.zero, QTensor):
        raise FormatError("the parent's zeros are no codes", why="their fractions would need more bits than they have")
    zero = parent.zero and _fractions(parent.zero, step.shape, drop)
    codes = Codes.of(t - over.to(t.dtype), 1 << q.bits)
    base = Affine(q.shape, codes, Raw.of(_narrowest(step)), zero, parent.block)
    if not q.extra:
        return base
    wide = parent.block.spread(step, q.shape).expand(q.shape)
    return Sum(q.shape, (base, Sparse.of(wide, over, _narrowest(step).dtype)))


def _fractions(zero: Codes, blocks: torch.Size, drop: int) -> Affine:
    """8-bit zeros divided by 2^drop, still one byte each."""
    unit = Raw.of(torch.full((1, 1), 2.0**-drop, dtype=torch.float16, device=zero.data.device))
    origin = Codes(torch.zeros(1, 1, dtype=torch.uint8, device=zero.data.device), 1, 1 << PARENT_BITS)
    codes = Codes(zero.data.view(tuple(blocks)), blocks[1], 1 << PARENT_BITS)
    return Affine(tuple(blocks), codes, unit, origin, Block("tensor"))


def _narrowest(step: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The same values in the narrowest float that holds them all."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(step.to(dtype).to(torch.float32), step):
            return step.to(dtype)
    return step
