"""What the files of compressed-tensors hold of one linear, written and, from untrusted files, read.

:mod:`compressed_tensors` says what each tensor is, :mod:`compressed_scheme` which scheme has which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lowbit.arrays import Float, Int, Tensor, UInt8
from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.activation import ActivationFormat, Input
from lowbit.formats.blocks import Block
from lowbit.formats.pack import Codes, unpack
from lowbit.formats.qtensor import Affine, Lookup, QTensor, Raw
from lowbit.io.interchange.compressed_scheme import FLOAT, MXFP4, MXFP8, NVFP4, PACKED, Scheme

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_E8M0_NAN, _E4M3_NAN = 255, 127

# --- integers --------------------------------------------------------------------------------------------------------


def pack_integers(q: Affine, scheme: Scheme) -> dict[str, Tensor]:
    half = q.codes.levels // 2
    held = {"weight_scale": _stored_scale(q.scale, scheme.block)}
    zero = q.zero.unpack().view(q.block.count(q.shape)) if isinstance(q.zero, Codes) else None
    if scheme.format == PACKED:
        held |= {"weight_packed": _words(q.codes), "weight_shape": torch.tensor(q.shape, dtype=torch.int64)}
    else:
        held["weight"] = _centred(q.codes.unpack(), half)
    if zero is not None:
        packed = _words(Codes.of(zero.t(), q.codes.levels)).t() if scheme.packed_zeros else _centred(zero, half)
        held["weight_zero_point"] = packed.reshape(1) if scheme.block.kind == "tensor" else packed.contiguous()
    return held


def unpack_integers(read: Reader, scheme: Scheme) -> Affine:
    levels, blocks = 1 << scheme.bits, scheme.block.count(read.shape)
    scale = read.scale(scheme.block)
    if scheme.format == PACKED:
        read.check_shape()
        codes = read.words("weight_packed", read.shape, levels)
    else:
        codes = read.whole("weight", read.shape, levels)
    if scheme.symmetric:
        return Affine(read.shape, Codes.of(codes, levels), scale, None, scheme.block)
    if scheme.packed_zeros:
        zero = read.words("weight_zero_point", (blocks[1], blocks[0]), levels, down=True).t()
    else:
        zero = read.whole("weight_zero_point", blocks, levels)
    return Affine(read.shape, Codes.of(codes, levels), scale, Codes.of(zero.reshape(1, -1), levels), scheme.block)


def _words(codes: Codes) -> Int[Tensor, "rows words"]:
    """Packed rows as 32-bit words, filled up with zero bits."""
    return torch.nn.functional.pad(codes.data, (0, -codes.data.shape[1] % 4)).contiguous().view(torch.int32)


def _centred(codes: UInt8[Tensor, "rows columns"], half: int) -> Int[Tensor, "rows columns"]:
    return (codes.to(torch.int16) - half).to(torch.int8)


# --- floats ----------------------------------------------------------------------------------------------------------


def pack_floats(site: str, q: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    assert isinstance(q, Lookup)  # by its scheme
    assert q.scale is not None
    if scheme.format == FLOAT:
        codes = q.codes.data.view(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": _stored_scale(q.scale, scheme.block)}
    assert isinstance(q.scale, Lookup)
    scales = q.scale.codes.data
    if scheme.format == MXFP8:
        return {"weight": q.codes.data.view(torch.float8_e4m3fn), "weight_scale": scales}
    if scheme.format == MXFP4:
        return {"weight_packed": q.codes.data, "weight_scale": scales}
    assert q.scale.scale is not None
    return {
        "weight_packed": q.codes.data, "weight_scale": scales.view(torch.float8_e4m3fn),
        "weight_global_scale": _divisor(site, q.scale.scale.decode().reshape(1)),
    }  # fmt: skip


def unpack_floats(read: Reader, scheme: Scheme) -> Lookup:
    rows, columns = read.shape
    if scheme.bits == 8:
        weight, table = Codes.of(read.e4m3("weight", read.shape), 256), "e4m3"
    else:
        packed = read.tensor("weight_packed", torch.uint8, (rows, columns // 2))
        weight, table = Codes(packed, columns, 16), "e2m1"
    blocks = scheme.block.count(read.shape)
    scale: QTensor
    if scheme.format == FLOAT:
        scale = read.scale(scheme.block)
    elif scheme.format == NVFP4:
        codes = read.e4m3("weight_scale", blocks)
        whole = _multiplier(read.number("weight_global_scale"))
        scale = Lookup(blocks, Codes(codes, blocks[1], 256), "e4m3", Raw.of(whole.view(1, 1)), Block("tensor"))
    else:
        codes = read.tensor("weight_scale", torch.uint8, blocks)
        read.refuse("weight_scale", bool((codes == _E8M0_NAN).any()), "holds NaN")
        scale = Lookup(blocks, Codes(codes, blocks[1], 255), "e8m0", None, Block("tensor"))
    return Lookup(read.shape, weight, table, scale, scheme.block)


def _divisor(site: str, scale: Float[Tensor, "1"]) -> Float[Tensor, "1"]:
    """The float32 nearest to ``1 / scale``; 1 for a matrix of zeros."""
    divisor = scale.double().reciprocal().float() if float(scale) else torch.ones(1)
    if not float(scale) >= 0 or not 0 < float(divisor) < math.inf:
        raise ExportError(f"its scale {float(scale)!r} has no reciprocal in float32", where=site, fix="mxfp4")
    return divisor


def _multiplier(divisor: Float[Tensor, "1"]) -> Float[Tensor, "1"]:
    """The scale of a divisor: of the float32 nearest to its reciprocal, one whose own reciprocal it is, if any."""
    nearest = divisor.double().reciprocal().float()
    found = [nearest, nearest.nextafter(nearest * 2), nearest.nextafter(nearest / 2)]
    return min(found, key=lambda scale: abs(float(scale.double().reciprocal().float() - divisor)))


# --- inputs ----------------------------------------------------------------------------------------------------------


def pack_input(site: str, input: Input) -> dict[str, Tensor]:
    """Step and zero of a measured range; nothing for ranges that are taken at every call."""
    if input.low is None or input.high is None:
        return {}
    step, zero = _step(input.format, input.low, input.high)
    if not float(step):
        raise ExportError("its inputs were all zero in calibration", where=site, fix="more calibration text")
    held = {"input_scale": step}
    if zero is not None:
        held["input_zero_point"] = (zero - input.format.format.grid.levels // 2).to(torch.int8)
    return held


def _step(fmt: ActivationFormat, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
    """What :class:`ActivationFormat` makes of a range, which always includes zero."""
    low, high, grid = low.float().clamp(max=0), high.float().clamp(min=0), fmt.format.grid
    if not fmt.format.asymmetric:
        return torch.maximum(high, -low) / grid.top, None  # type: ignore[union-attr]
    step = (high - low) / (grid.levels - 1)
    return step, torch.round(-low / torch.where(step > 0, step, 1.0))


def unpack_input(read: Reader, fmt: ActivationFormat) -> Input:
    """A range with the file's step and zero. Where no float32 end has the step, that of the nearest: its last bit."""
    if not fmt.static:
        return Input(fmt)
    step, grid = read.number("input_scale"), fmt.format.grid
    below, above = 0.0, grid.top  # the step is that of the larger magnitude
    if fmt.format.asymmetric:
        zero = int(read.whole("input_zero_point", (1, 1), grid.levels))
        below, above = -float(zero), float(grid.levels - 1 - zero)
    ends = torch.tensor([above, below]) * step  # the larger one is moved
    if -below > above:
        ends = ends.flip(0)
    moved = [ends[:1], *(ends[:1].nextafter(ends[:1] * factor) for factor in (0.5, 2.0))]
    ranges = [torch.cat([end, ends[1:]]).sort().values for end in moved]
    low, high = min(ranges, key=lambda r: abs(float(_step(fmt, r[:1], r[1:])[0] - step))).split(1)
    return Input(fmt, low, high)


# --- reading ---------------------------------------------------------------------------------------------------------


def _stored_scale(scale: QTensor, block: Block) -> Tensor:
    assert isinstance(scale, Raw)  # by its scheme
    whole = scale.data.expand(scale.shape)
    return whole.reshape(1).contiguous() if block.kind == "tensor" else whole.contiguous()


class Reader:
    """Checked tensors of one linear; every error names the tensor."""

    def __init__(self, site: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        self.site, self.shape, self.tensors = site, shape, tensors

    def tensor(self, name: str, dtype: torch.dtype | tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> Tensor:
        held = self.tensors.get(name)
        self.refuse(name, held is None, "is missing")
        assert held is not None
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        found = f"is {held.dtype} {tuple(held.shape)}, expected {dtypes[0]} {shapes[0]}"
        self.refuse(name, held.dtype not in dtypes or tuple(held.shape) not in shapes, found)
        return held

    def e4m3(self, name: str, shape: tuple[int, int]) -> UInt8[Tensor, "rows columns"]:
        """Bit patterns of finite ones."""
        codes = self.tensor(name, torch.float8_e4m3fn, shape).view(torch.uint8)
        self.refuse(name, bool((codes & 127 == _E4M3_NAN).any()), "holds NaN")
        return codes

    def number(self, name: str) -> Float[Tensor, "1"]:
        """A positive one."""
        held = self.tensor(name, (torch.float32, *_FLOATS), (1,), ()).float().reshape(1)
        self.refuse(name, not bool(torch.isfinite(held) & (held > 0)), f"is {float(held)}")
        return held

    def scale(self, block: Block) -> Raw:
        blocks = block.count(self.shape)
        shapes = [blocks, (1,), ()] if block.kind == "tensor" else [blocks]
        held = self.tensor("weight_scale", _FLOATS, *shapes).reshape(blocks)
        self.refuse("weight_scale", not bool(torch.isfinite(held).all()), "is not finite")
        return Raw.of(held)

    def whole(self, name: str, shape: tuple[int, int], levels: int) -> UInt8[Tensor, "rows columns"]:
        """Codes from one int8 each."""
        held = self.tensor(name, torch.int8, shape, *([(1,), ()] if shape == (1, 1) else [])).reshape(shape)
        codes = held.to(torch.int16) + levels // 2
        self.refuse(name, bool(((codes < 0) | (codes >= levels)).any()), f"leaves the range of {levels} levels")
        return codes.to(torch.uint8)

    def words(
        self, name: str, shape: tuple[int, int], levels: int, down: bool = False
    ) -> UInt8[Tensor, "rows columns"]:
        """Codes from 32-bit words, which run along the rows, or ``down`` the columns of what is stored.

        Older files fill a word with whole codes only: they are known by their width.
        """
        rows, columns = shape
        bits = levels.bit_length() - 1
        dense, older = -(-columns * bits // 32), -(-columns // (32 // bits))
        shapes = [(width, rows) if down else (rows, width) for width in (dense, older)]
        held = self.tensor(name, torch.int32, *shapes)
        held = (held.t() if down else held).contiguous()
        if held.shape[1] == dense:
            bytes_of_rows = held.flatten().view(torch.uint8).view(rows, -1)
            return unpack(bytes_of_rows, columns, levels)[:, :columns]
        shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
        return ((held.unsqueeze(-1) >> shifts) & (levels - 1)).flatten(1)[:, :columns].to(torch.uint8)

    def check_shape(self) -> None:
        held = self.tensor("weight_shape", (torch.int64, torch.int32), (2,))
        self.refuse("weight_shape", tuple(held.tolist()) != self.shape, f"is {held.tolist()}, the model's {self.shape}")

    def refuse(self, name: str, wrong: bool, why: str) -> None:
        if wrong:
            raise CheckpointError(why, where=f"{self.site}.{name}", why="the file contradicts its configuration")
