"""What GPTQ and AWQ files have in common: integer codes with a float16 scale and an integer zero a run of inputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from lowbit.arrays import Float, Tensor, UInt8
from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.activation import ActivationFormat
from lowbit.formats.blocks import Block
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import Affine, Raw
from lowbit.formats.spec import Spec
from lowbit.io.interchange.base import Refusal
from lowbit.io.interchange.words import run_of

_ELSEWHERE = {
    "nf4": "--to bnb", "fp4": "--to bnb", "e2m1": "--to compressed-tensors", "e4m3": "--to compressed-tensors",
}  # fmt: skip
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
T = TypeVar("T")


class Kind(NamedTuple):
    """Bits of a code, and inputs that share a scale; -1: all of a row."""

    bits: int
    group: int

    @classmethod
    def of(cls, spec: Spec) -> Kind:
        """Of an ``Affine`` that :func:`refusal` lets pass."""
        leaf = spec.leaf("codes")
        assert leaf is not None
        assert leaf.levels is not None
        block = Block.parse(str(spec.get("block")))
        return cls(leaf.levels.bit_length() - 1, block.size[0] if block.kind == "group" else -1)

    def __str__(self) -> str:
        return f"int{self.bits}-" + ("row" if self.group == -1 else f"g{self.group}")


def refusal(spec: Spec, bits: Collection[int], input: ActivationFormat | None) -> Refusal | None:
    """Why these integers are not those of a GPTQ or AWQ file, whose codes have one of ``bits``."""
    if input is not None:
        return Refusal(f"its inputs are rounded to {input.name}, the layout is for weights", "--to compressed-tensors")
    if spec.node != "Affine":
        table = str(spec.get("table"))
        return Refusal(f"a {spec.node} is no matrix of integers with a scale", _ELSEWHERE.get(table, "--to bf16"))
    codes, zero, scale = spec.leaf("codes"), spec.leaf("zero"), spec.child("scale")
    levels = 0 if codes is None or codes.levels is None else codes.levels
    if levels not in {1 << b for b in bits}:
        widths = ", ".join(map(str, sorted(bits)))
        return Refusal(f"codes of {levels} levels, the layout has {widths} bits", "--to compressed-tensors")
    if spec.child("zero") is not None or (zero is not None and zero.levels != levels):
        return Refusal("its zeros are no integers of the codes' own bits", "a format without -z16")
    if scale is None or scale.node != "Raw" or scale.leaves[0].dtype not in ("float16", "bfloat16", "float32"):
        return Refusal("its scales are coded themselves", "--to compressed-tensors, or a format with 16-bit scales")
    block = Block.parse(str(spec.get("block")))
    if block.kind not in ("row", "group"):
        return Refusal(f"scales a {block.kind}, the layout has them a row or a group of inputs", "-row or -g128")
    rows, columns = spec.shape
    kind = Kind.of(spec)
    if kind.group > 0 and columns % kind.group:
        divisor = math.gcd(columns, 128)
        return Refusal(
            f"{columns} inputs are no multiple of the group of {kind.group}: readers want whole groups",
            f"the format {kind._replace(group=divisor if divisor >= 32 else -1)}, at least for this site",
        )
    if columns % run_of(kind.bits) or rows % run_of(kind.bits):
        return Refusal(
            f"{rows} by {columns} codes of {kind.bits} bits do not fill words of 32",
            "--to compressed-tensors, or keep this site in 16 bit",
        )
    return None


class Grouped(NamedTuple):
    """The contents of an ``Affine``: packed codes, a scale a block as float16, a zero a block where it has them."""

    codes: Codes
    scales: Float[Tensor, "out groups"]
    zeros: UInt8[Tensor, "out groups"] | None

    @classmethod
    def of(cls, site: str, q: Affine) -> Grouped:
        """Raises ExportError when a scale is no float16 number."""
        blocks = q.block.count(q.shape)
        exact = q.scale.decode()
        scales = exact.to(torch.float16)
        if not torch.equal(scales.to(torch.float32), exact):
            raise ExportError(
                "a scale is no float16 number", where=site, why="the layout stores scales in float16",
                fix="a format with float16 scales, or --to compressed-tensors",
            )  # fmt: skip
        zeros = q.zero.unpack().view(blocks) if isinstance(q.zero, Codes) else None
        return cls(q.codes, scales, zeros)

    def without_zero(self, site: str) -> Grouped:
        """The same values where no zero is 0: such a group's codes and zero become one more.

        Raises ExportError for a group that has the largest code already. Whole groups only.
        """
        if self.zeros is None or self.zeros.all():
            return self
        codes, raised, top = self.codes.unpack(), self.zeros == 0, self.codes.levels - 1
        groups = codes.view(*raised.shape, -1)
        if (full := raised & (groups.amax(-1) == top)).any():
            raise ExportError(
                f"a zero is 0 in {int(full.sum())} of {full.numel()} groups, which the layout cannot store", where=site,
                why=f"zeros are stored less one, and readers disagree on what comes back of -1; codes that reach {top} "
                "cannot be moved up together with their zero", fix="--to gptq-v2, or a -sym format",
            )  # fmt: skip
        moved = (groups + raised.unsqueeze(-1)).view_as(codes)
        return self._replace(codes=Codes.of(moved, self.codes.levels), zeros=self.zeros + raised)

    def affine(self, shape: tuple[int, int], group: int) -> Affine:
        """The matrix; scales keep their dtype."""
        block = Block("row") if group == -1 else Block("group", (group,))
        zero = None if self.zeros is None else Codes.of(self.zeros.reshape(1, -1), self.codes.levels)
        return Affine(shape, self.codes, Raw.of(self.scales.contiguous()), zero, block)


def tensor(
    site: str, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """A tensor from an untrusted file; raises CheckpointError when it is missing or not of this shape and dtype."""
    where = f"{site}.{name}"
    if name not in tensors:
        raise CheckpointError("is missing", where=where, fix="download the files again")
    found = tensors[name]
    if tuple(found.shape) != shape or found.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(
            f"is {str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}, expected {wanted} {shape}",
            where=where, why="the model, quantization_config and the tensors must agree",
        )  # fmt: skip
    return found


def scales(
    site: str, tensors: Mapping[str, Tensor], groups: int, rows: int
) -> Float[Tensor, "out groups"]:  # of shape (rows, groups)
    """``scales`` (groups, out) of an untrusted file, transposed; raises CheckpointError, also for NaN and infinity."""
    found = tensor(site, tensors, "scales", (groups, rows), _FLOATS)
    if not torch.isfinite(found).all():
        raise CheckpointError("has a NaN or an infinity", where=f"{site}.scales", why="no weight could be decoded")
    return found.t().contiguous()


_REQUIRED = object()


def field(config: Mapping[str, Any], name: str, kind: type[T], default: Any = _REQUIRED) -> T:
    """A field of an untrusted ``quantization_config``; raises CheckpointError when it is missing or of another type."""
    value = config.get(name)
    if value is None and default is not _REQUIRED:
        value = default
    if type(value) is not kind:
        said = "is missing" if value is None else f"is {value!r}, no {kind.__name__}"
        raise CheckpointError(said, where=f"quantization_config.{name}")
    return value


def wrong(name: str, value: Any, why: str, fix: str = "") -> CheckpointError:
    """The error for a field of ``quantization_config`` that cannot be read as it is."""
    return CheckpointError(f"is {value!r}", where=f"quantization_config.{name}", why=why, fix=fix)
