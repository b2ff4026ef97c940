"""Schemes of compressed-tensors: which QTensor each one is, and its JSON in ``config_groups``.

A scheme says how the weights of some linears are stored and how their inputs are rounded:

    format                  weights
    pack-quantized          int2..int8, packed in 32-bit words; a scale a tensor, row or group; with zeros or without
    int-quantized           the same in one int8 each: what linears that round their inputs have
    float-quantized         fp8-e4m3; a scale a tensor, row, group or tile
    nvfp4-pack-quantized    E2M1 in groups of 16, e4m3 scales, one divisor a tensor
    mxfp4-pack-quantized    E2M1 in groups of 32, power-of-two scales
    mxfp8-quantized         E4M3 in groups of 32, power-of-two scales

Facts: https://github.com/vllm-project/compressed-tensors, version 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.errors import CheckpointError, RecipeError, nearest
from lowbit.formats.activation import ActivationFormat, activation
from lowbit.formats.blocks import Block
from lowbit.formats.grids import IntGrid, Table
from lowbit.formats.pack import bits_for
from lowbit.formats.spec import Spec
from lowbit.io.interchange.base import Refusal

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
FORMATS = (PACKED, INT, FLOAT, NVFP4, MXFP4, MXFP8)
_NAIVE = "naive-quantized"  # the older name of the two plain ones
_STRATEGIES = {"tensor": "tensor", "row": "channel", "group": "group", "tile": "block"}
_SIXTEEN = "lowbit export --to bf16"


@dataclass(frozen=True)
class Scheme:
    """How weights are stored, and how inputs are rounded."""

    format: str
    kind: Literal["int", "float"]
    bits: int
    symmetric: bool
    block: Block
    input: ActivationFormat | None = None

    def __str__(self) -> str:
        said = _said(self.kind, self.bits, self.symmetric, self.block)
        return f"{said} ({self.format})" + ("" if self.input is None else f" with inputs in {self.input.name}")

    @property
    def packed_zeros(self) -> bool:
        """Whether zeros are packed in words; else, where there are any, they have one int8 each."""
        return self.format == PACKED and not self.symmetric and self.block.kind != "tensor"

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """One entry of ``config_groups``."""
        return {
            "targets": targets, "weights": self._weights(), "input_activations": _input_json(self.input),
            "output_activations": None, "format": self.format,
        }  # fmt: skip

    def _weights(self) -> dict[str, Any]:
        strategy = "tensor_group" if self.format == NVFP4 else _STRATEGIES[self.block.kind]
        weights = _arguments(self.bits, self.kind, self.symmetric, strategy, self.block)
        dtype = {NVFP4: "torch.float8_e4m3fn", MXFP4: "torch.uint8", MXFP8: "torch.uint8"}.get(self.format)
        return weights if dtype is None else {**weights, "scale_dtype": dtype, "zp_dtype": dtype}


def scheme_of(spec: Spec, input: ActivationFormat | None = None) -> Scheme | Refusal:
    """The scheme of a linear, or why there is none."""
    if input is not None and (why := _input_problem(input)):
        return Refusal(why, "int8-token-sym, fp8-e4m3-token, or inputs as they are")
    match spec.node:
        case "Affine":
            found = _integers(spec, INT if input is not None else PACKED)
        case "Lookup":
            found = _floats(spec)
        case _:
            return Refusal(f"a {spec.node} tree is no matrix of codes with one scale a block", _SIXTEEN)
    if isinstance(found, Refusal):
        return found
    if found.block.kind == "group" and spec.shape[1] % found.block.size[0]:
        n = found.block.size[0]
        return Refusal(
            f"{spec.shape[1]} columns in groups of {n} leave a shorter last group",
            f"a group size that divides {spec.shape[1]}, or a scale a row",
        )
    return Scheme(found.format, found.kind, found.bits, found.symmetric, found.block, input)


def _integers(spec: Spec, format: str) -> Scheme | Refusal:
    levels, block, scale = _levels(spec), Block.parse(spec.get("block")), spec.child("scale")
    bits = bits_for(levels)
    if bits < 2 or levels != 1 << bits:
        return Refusal(f"{levels} levels are not 2 to 8 whole bits", "int2 to int8")
    if spec.child("zero") is not None:
        return Refusal("its zeros lie between the codes", "whole zeros (no -z16, no hqq), or -sym")
    if scale is None or scale.node != "Raw":
        return Refusal("its scales are coded", "a format with plain scales")
    if block.kind not in ("tensor", "row", "group"):
        return Refusal(f"integers in blocks {block}", "a scale a row or group")
    return Scheme(format, "int", bits, spec.leaf("zero") is None, block)


def _floats(spec: Spec) -> Scheme | Refusal:
    table, block, scale = spec.get("table"), Block.parse(spec.get("block")), spec.child("scale")
    coded = None if scale is None or scale.node != "Lookup" else scale.get("table")
    match (table, coded, str(block)):
        case ("e4m3", "e8m0", "group:32"):
            return Scheme(MXFP8, "float", 8, True, block)
        case ("e2m1", "e8m0", "group:32"):
            return Scheme(MXFP4, "float", 4, True, block)
        case ("e2m1", "e4m3", "group:16") if scale is not None and scale.get("block") == "tensor":
            return Scheme(NVFP4, "float", 4, True, block)
        case ("e4m3", None, _) if scale is not None and scale.node == "Raw" and block.kind in _STRATEGIES:
            return Scheme(FLOAT, "float", 8, True, block)
    stored = "values stored with the weight" if table is None else f"values of {table}"
    return Refusal(f"{stored} with such scales have no scheme", "nvfp4, mxfp4, mxfp8, fp8-e4m3, or int4-g128")


def _levels(spec: Spec) -> int:
    codes = spec.leaf("codes")
    return 0 if codes is None or codes.levels is None else codes.levels


# --- inputs ----------------------------------------------------------------------------------------------------------


def _input_problem(fmt: ActivationFormat) -> str:
    grid = fmt.format.grid
    return f"inputs in {fmt.name} cannot be said" if isinstance(grid, Table) and grid.name != "e4m3" else ""


def _input_json(fmt: ActivationFormat | None) -> dict[str, Any] | None:
    if fmt is None:
        return None
    grid, block = fmt.format.grid, fmt.format.block
    bits, kind, symmetric = (grid.bits, "int", grid.symmetric) if isinstance(grid, IntGrid) else (8, "float", True)
    strategy = "token" if block.kind == "row" else block.kind
    return {**_arguments(bits, kind, symmetric, strategy, block), "dynamic": not fmt.static}


def _input_of(value: Any, where: str) -> ActivationFormat | None:
    if value is None:
        return None
    a = _Arguments(value, where)
    strategy, dynamic = a.one_of("strategy", ("token", "tensor", "group")), a.flag("dynamic")
    block = f"g{a.number('group_size', 1, 1 << 16)}" if strategy == "group" else strategy
    if a.one_of("type", ("int", "float")) == "int":
        name = f"int{a.number('num_bits', 2, 8)}-{block}" + ("-sym" if a.flag("symmetric") else "")
    else:
        a.number("num_bits", 8, 8)
        name = f"fp8-e4m3-{block}"
    try:
        return activation(name if dynamic else f"{name}-static")
    except RecipeError as error:
        raise CheckpointError(f"inputs that lowbit has no format for: {error.what}", where=where) from error


# --- JSON ------------------------------------------------------------------------------------------------------------


def _arguments(bits: int, kind: str, symmetric: bool, strategy: str, block: Block) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy,
        "group_size": block.size[0] if block.kind == "group" else None,
        "block_structure": list(block.size) if block.kind == "tile" else None,
        "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip


def scheme_from(group: Mapping[str, Any], default: str, where: str) -> Scheme:
    """The scheme of an untrusted entry of ``config_groups``; ``default`` is the file's ``format``.

    Raises CheckpointError naming the field, for schemes that lowbit has no tree for too.
    """
    named = group.get("format") or default
    if group.get("output_activations") is not None:
        raise CheckpointError("rounds outputs, which lowbit does not", where=f"{where}.output_activations")
    a = _Arguments(group.get("weights"), f"{where}.weights")
    kind: Literal["int", "float"] = "int" if a.one_of("type", ("int", "float")) == "int" else "float"
    format = {"int": INT, "float": FLOAT}[kind] if named == _NAIVE else named
    if format not in FORMATS:
        raise CheckpointError(
            f"format {named!r} is not known", where=f"{where}.format", fix=nearest(str(named), [*FORMATS, _NAIVE])
        )
    if a.value.get("actorder") in ("group", "dynamic"):
        raise CheckpointError(
            "actorder 'group' has been removed from compressed-tensors", where=f"{where}.weights.actorder",
            fix="quantize again with actorder 'weight'",
        )  # fmt: skip
    bits, symmetric, block = a.number("num_bits", 2, 8), a.flag("symmetric"), a.block()
    allowed = {
        PACKED: kind == "int" and block.kind != "tile",
        INT: kind == "int" and block.kind != "tile",
        FLOAT: (kind, bits, symmetric) == ("float", 8, True),
        NVFP4: (kind, bits, symmetric, str(block)) == ("float", 4, True, "group:16"),
        MXFP4: (kind, bits, symmetric, str(block)) == ("float", 4, True, "group:32"),
        MXFP8: (kind, bits, symmetric, str(block)) == ("float", 8, True, "group:32"),
    }
    if not allowed[format]:
        said = _said(kind, bits, symmetric, block)
        raise CheckpointError(f"{said} is nothing that {format} holds", where=f"{where}.weights")
    return Scheme(
        format, kind, bits, symmetric, block, _input_of(group.get("input_activations"), f"{where}.input_activations")
    )


def _said(kind: str, bits: int, symmetric: bool, block: Block) -> str:
    return f"{kind}{bits}{'' if symmetric else ' with zeros'} in blocks {block}"


class _Arguments:
    """Checked reading of ``QuantizationArgs``; every error names the field."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise CheckpointError(f"is {value!r:.40}, not a table", where=where)
        self.value, self.where = value, where

    def number(self, name: str, low: int, high: int) -> int:
        found = self.value.get(name, 8 if name == "num_bits" else None)
        if type(found) is not int or not low <= found <= high:
            raise self._wrong(name, found, f"a whole number from {low} to {high}" if low < high else str(low))
        return found

    def flag(self, name: str) -> bool:
        found = self.value.get(name, name == "symmetric")
        if type(found) is not bool:
            raise self._wrong(name, found, "true or false")
        return found

    def one_of(self, name: str, known: tuple[str, ...]) -> str:
        found = self.value.get(name, self._default(name))
        if found not in known:
            raise self._wrong(name, found, " or ".join(known))
        return str(found)

    def block(self) -> Block:
        strategies = {**{v: k for k, v in _STRATEGIES.items()}, "tensor_group": "group"}
        kind = strategies[self.one_of("strategy", tuple(strategies))]
        if kind == "group":
            return Block("group", (self.number("group_size", 1, 1 << 20),))
        if kind != "tile":
            return Block(kind)  # type: ignore[arg-type]
        found = self.value.get("block_structure")
        if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in found):
            raise self._wrong("block_structure", found, "two sizes")
        return Block("tile", tuple(found))

    def _default(self, name: str) -> str | None:
        """What a missing field means: the strategy follows from the group size."""
        if name != "strategy":
            return "int" if name == "type" else None
        size = self.value.get("group_size")
        return "tensor" if size is None else "channel" if size == -1 else "group"

    def _wrong(self, name: str, found: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"is {found!r:.60}, not {expected}", where=f"{self.where}.{name}")
