"""The layout of bitsandbytes: nf4 and fp4, with coded statistics or without, and int8.

4 bit:

    weight                                   uint8 (ceil(out * in / 2), 1): the matrix row by row, the even one above
    weight.absmax                            float32 (blocks), or uint8 where it is coded itself (``-dq``)
    weight.quant_map                         float32 (16): the values of the codes
    weight.quant_state.bitsandbytes__nf4     JSON in uint8: quant_type, blocksize, dtype, shape, and of coded statistics
                                             nested_blocksize, nested_dtype, nested_offset
    weight.nested_absmax, .nested_quant_map  float32 (ceil(blocks / 256)), float32 (256)

Blocks run over the flattened matrix, so that a QTensor's groups are held where they divide a row. Values are the same
bit for bit. int8:

    weight  int8 (out, in)        SCB  float32 (out): 127 times the scale        weight_format  uint8 (): 0, by rows

Codes and scales are held exactly; bitsandbytes itself divides by 127 as a product with a rounded 1/127, so that its
values may differ in the last bits of float32. It rounds the inputs of int8 linears too, to int8 a token; LLM.int8()'s
columns of 16 bit are no part of its files: at run time it takes the columns of large inputs from the int8 codes.

Facts: https://github.com/bitsandbytes-foundation/bitsandbytes, version 0.50.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lowbit.arrays import Tensor
from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.activation import ActivationFormat, Input, activation
from lowbit.formats.blocks import Block
from lowbit.formats.qtensor import Affine, QTensor
from lowbit.formats.spec import Spec
from lowbit.io.interchange.base import LowBitModel, Refusal
from lowbit.io.interchange.bitsandbytes_weights import (
    COEFFICIENTS,
    NESTED,
    SIZES,
    STATE,
    TABLES,
    Reader,
    pack_four,
    pack_int8,
    unpack_four,
    unpack_int8,
)

_EXPERT = re.compile(r".*\.experts\.\d+\..*")
_ROUNDED = "int8-token-sym"  # what bitsandbytes does to the inputs of int8 linears


@dataclass(frozen=True)
class Kind:
    """What all linears of a model have in common: the table, ``int8`` for none, and whether statistics are coded."""

    table: str
    nested: bool = False


@dataclass(frozen=True)
class BitsAndBytes:
    """bitsandbytes with one kind for a whole model."""

    name: ClassVar[str] = "bnb"
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {"weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
         *(STATE + table for table in TABLES), "SCB", "weight_format"}
    )  # fmt: skip
    kind: Kind
    skip: tuple[str, ...] = ()
    rounded: bool = False
    """Whether inputs are rounded as bitsandbytes does for int8 linears, with no outliers kept apart."""
    lost: tuple[str, ...] = ()

    @classmethod
    def refusal(cls, spec: Spec, input: ActivationFormat | None = None) -> Refusal | None:
        """None for nf4 and fp4 in blocks of the flattened matrix, and symmetric int8 with a scale a row."""
        found = _kind(spec)
        if isinstance(found, Refusal):
            return found
        if input is not None and not (found.table == "int8" and input.name == _ROUNDED):
            return Refusal(
                f"inputs in {input.name} cannot be said", f"{_ROUNDED} with int8-row-sym, or inputs as they are"
            )
        return None

    @classmethod
    def for_model(cls, model: LowBitModel) -> BitsAndBytes:
        first: tuple[str, Kind] | None = None
        for site, spec in model.specs.items():
            if refusal := cls.refusal(spec, model.inputs.get(site)):
                raise ExportError(refusal.why, where=site, fix=refusal.fix)
            if _EXPERT.fullmatch(site):
                raise ExportError(
                    "is an expert", where=site, why="transformers fuses experts and reads none from these files",
                    fix="compressed-tensors, or an override that keeps experts in 16 bit",
                )  # fmt: skip
            kind = _kind(spec)
            assert isinstance(kind, Kind)
            first = first or (site, kind)
            if kind != first[1]:
                raise ExportError(
                    f"is {_said(kind)}, {first[0]} is {_said(first[1])}", where=site,
                    why="bitsandbytes has one format for all linears of a model", fix="one format for all",
                )  # fmt: skip
        if first is None:
            raise ExportError("has no low-bit linears", where=model.architecture)
        if model.inputs and (plain := sorted(set(model.specs) - set(model.inputs))):
            raise ExportError(
                "does not round its inputs, others do", where=plain[0], fix=f"activations {_ROUNDED} for all"
            )
        lost: tuple[str, ...] = (
            () if model.kv is None else (f"the KV cache is not rounded in these files ({model.kv})",)
        )
        if first[1].table == "int8" and not model.inputs:
            lost += ("bitsandbytes rounds the inputs of int8 linears to int8 as it multiplies; this model does not",)
        return cls(first[1], model.dense, bool(model.inputs), lost)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> BitsAndBytes:
        where = "quantization_config"
        four, eight = (_flag(config, f"load_in_{bits}bit") or _flag(config, f"_load_in_{bits}bit") for bits in (4, 8))
        if four == eight:
            raise CheckpointError("load_in_4bit and load_in_8bit: one of them is true", where=where)
        skip = config.get("llm_int8_skip_modules") or []
        if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
            raise CheckpointError("llm_int8_skip_modules is no list of names", where=where)
        if eight:
            rounded = config.get("llm_int8_threshold", 6.0) == 0
            lost = (
                () if rounded else ("bitsandbytes rounds inputs of int8 linears that are no outliers; these are not",)
            )
            return cls(Kind("int8"), tuple(skip), rounded, lost)
        table = config.get("bnb_4bit_quant_type", "fp4")
        if table not in TABLES:
            raise CheckpointError(f"bnb_4bit_quant_type is {table!r:.40}, not nf4 or fp4", where=where)
        return cls(Kind(table, _flag(config, "bnb_4bit_use_double_quant")), tuple(skip))

    def config(self) -> dict[str, Any]:
        """Outliers are looked for in the inputs of int8 linears as the library does, unless all inputs are rounded."""
        four = self.kind.table != "int8"
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four,
            "_load_in_4bit": four, "_load_in_8bit": not four,
            "bnb_4bit_quant_type": self.kind.table if four else "fp4",
            "bnb_4bit_use_double_quant": self.kind.nested, "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 0.0 if self.rounded else 6.0,
            "llm_int8_skip_modules": list(self.skip), "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }  # fmt: skip

    def files(self) -> dict[str, Any]:
        return {}

    def notes(self) -> tuple[str, ...]:
        return self.lost

    def pack(self, site: str, q: QTensor, input: Input | None = None) -> dict[str, Tensor]:
        """Cost a few passes over the codes."""
        if (kind := _kind(q.spec())) != self.kind:
            why = kind.why if isinstance(kind, Refusal) else f"it is {_said(kind)}"
            raise ExportError(f"is not {_said(self.kind)}, as for_model saw", where=site, why=why)
        return pack_int8(site, q) if isinstance(q, Affine) else pack_four(q)

    def unpack(self, site: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> tuple[QTensor, Input | None]:
        read = Reader(site, tensors)
        q = unpack_int8(read, shape) if self.kind.table == "int8" else unpack_four(read, shape)
        return q, Input(activation(_ROUNDED)) if self.rounded else None


def _kind(spec: Spec) -> Kind | Refusal:
    """What bitsandbytes calls a linear, or why it has no name for it."""
    codes, scale = spec.leaf("codes"), spec.child("scale")
    if spec.node == "Affine" and codes is not None and scale is not None:
        plain = spec.leaf("zero") is None and spec.child("zero") is None and scale.node == "Raw"
        if codes.levels == 256 and plain and spec.get("block") == "row":
            return Kind("int8")
        return Refusal(
            "integers are symmetric int8 with a scale a row there", "int8-row-sym, nf4, or compressed-tensors"
        )
    if spec.node == "Sum":
        return Refusal(
            "16-bit columns beside the codes are no part of its files",
            "rtn:int8-row-sym, which bitsandbytes runs as LLM.int8()",
        )
    if spec.node != "Lookup" or spec.get("table") not in TABLES or scale is None:
        return Refusal(f"a {spec.node} tree is neither nf4, fp4 nor int8", "nf4, nf4-dq, fp4, or int8-row-sym")
    block = Block.parse(spec.get("block"))
    size = block.size[0] if block.kind in ("group", "flat") else 0
    if size not in SIZES or (block.kind == "group" and spec.shape[1] % size):
        return Refusal(
            f"rows of {spec.shape[1]} in blocks {block}: its blocks run over the flattened matrix",
            f"groups of {', '.join(map(str, SIZES[:4]))} that divide a row",
        )
    if scale.node == "Raw":
        return Kind(spec.get("table"))
    return (
        Kind(spec.get("table"), True) if _is_nested(scale) else Refusal("its scales are coded in another way", "nf4-dq")
    )


def _is_nested(scale: Spec) -> bool:
    """Whether scales are ``dynamic8`` codes in blocks of 256 plus one number."""
    coded, mean = scale.child("0"), scale.child("1")
    if scale.node != "Sum" or len(scale.children) != 2 or coded is None or mean is None:
        return False
    steps = coded.child("scale")
    plain = steps is not None and steps.node == "Raw" and mean.node == "Raw"
    one = [leaf.shape for leaf in mean.leaves] == [(1, 1)]
    return plain and one and (coded.get("table"), coded.get("block")) == (COEFFICIENTS, f"flat:{NESTED}")


def _said(kind: Kind) -> str:
    return kind.table + ("-dq" if kind.nested else "")


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{name} is {value!r:.40}, not true or false", where="quantization_config")
    return value
