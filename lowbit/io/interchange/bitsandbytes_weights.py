"""What the files of bitsandbytes hold of one linear, written and, from untrusted files, read (:mod:`bitsandbytes`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.arrays import Float, Tensor, UInt8
from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.blocks import Block
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import Affine, Lookup, QTensor, Raw, Sum
from lowbit.formats.tables import table_values

TABLES = ("nf4", "fp4")
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Blocks that bitsandbytes can have."""
NESTED, COEFFICIENTS = 256, "dynamic8"
"""Coded statistics: the block and the values."""
STATE = "weight.quant_state.bitsandbytes__"
_MAX_STATE = 1 << 12
_FLOATS = ("float32", "float16", "bfloat16")


# --- four bits -------------------------------------------------------------------------------------------------------


def pack_four(q: QTensor) -> dict[str, Tensor]:
    assert isinstance(q, Lookup)  # by its kind
    assert isinstance(q.table, str)
    flat = q.codes.unpack().flatten()
    pairs = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).view(-1, 2)
    state: dict[str, Any] = {
        "quant_type": q.table, "blocksize": q.block.size[0], "dtype": "float32", "shape": list(q.shape)
    }  # fmt: skip
    held = {"weight": pairs[:, :1] << 4 | pairs[:, 1:], "weight.quant_map": torch.tensor(table_values(q.table))}
    if isinstance(q.scale, Raw):
        held["weight.absmax"] = q.scale.decode().flatten()
    else:
        assert isinstance(q.scale, Sum)
        coded, mean = q.scale.terms
        assert isinstance(coded, Lookup)
        assert coded.scale is not None
        held |= {
            "weight.absmax": coded.codes.data.flatten(), "weight.nested_absmax": coded.scale.decode().flatten(),
            "weight.nested_quant_map": torch.tensor(table_values(COEFFICIENTS)),
        }  # fmt: skip
        offset = float(mean.decode()[0, 0])
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
    held[STATE + q.table] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return held


def unpack_four(read: Reader, shape: tuple[int, int]) -> Lookup:
    table, state = read.state(shape)
    count, size = math.prod(shape), state["blocksize"]
    grouped = shape[1] % size == 0
    block = Block("group" if grouped else "flat", (size,))
    blocks = block.count(shape)
    read.table("weight.quant_map", table)
    packed = read.codes("weight", -(-count // 2))
    flat = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:count]
    codes = Codes.of(flat.view(shape), 16)
    if "nested_offset" not in state:
        return Lookup(shape, codes, table, Raw.of(read.floats("weight.absmax", math.prod(blocks)).view(blocks)), block)
    read.table("weight.nested_quant_map", COEFFICIENTS)
    nested = Block("flat", (NESTED,))
    steps = read.floats("weight.nested_absmax", nested.count(blocks)[0]).view(-1, 1)
    absmax = read.tensor("weight.absmax", torch.uint8, (math.prod(blocks),)).view(blocks)
    coded = Lookup(blocks, Codes(absmax, blocks[1], 256), COEFFICIENTS, Raw.of(steps), nested)
    offset = Raw(blocks, torch.tensor([[state["nested_offset"]]]))
    return Lookup(shape, codes, table, Sum(blocks, (coded, offset)), block)


# --- eight bits ------------------------------------------------------------------------------------------------------


def pack_int8(site: str, q: Affine) -> dict[str, Tensor]:
    scale = q.scale.decode().flatten()
    product = (scale.double() * 127).float()
    near = torch.stack([product, product.nextafter(product * 2), product.nextafter(product / 2)])
    exact = _scale(near) == scale
    if not bool(exact.any(0).all()):
        row = int(exact.any(0).int().argmin())
        raise ExportError(
            f"the scale {float(scale[row])!r} of row {row} is no float32 divided by 127", where=site,
            fix="float16 scales, as int8-row-sym has",
        )  # fmt: skip
    return {
        "weight": (q.codes.unpack().to(torch.int16) - 128).to(torch.int8),
        "SCB": near.gather(0, exact.int().argmax(0, keepdim=True))[0],
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def unpack_int8(read: Reader, shape: tuple[int, int]) -> Affine:
    """Scales take float16 where it holds them, as presets do."""
    if (format := read.tensors.get("weight_format")) is not None:
        read.refuse("weight_format", format.numel() != 1 or int(format) != 0, "is not 0, by rows")
    weight = read.tensor("weight", torch.int8, shape)
    scale = _scale(read.floats("SCB", shape[0])).view(-1, 1)
    half = scale.half()
    stored = half if torch.equal(half.float(), scale) else scale
    return Affine(
        shape, Codes.of((weight.to(torch.int16) + 128).to(torch.uint8), 256), Raw.of(stored), None, Block("row")
    )


def _scale(absmax: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return (absmax.double() / 127).float()


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Checked tensors of one linear; every error names the tensor."""

    site: str
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        held = self.tensors.get(name)
        self.refuse(name, held is None, "is missing")
        assert held is not None
        found = f"is {held.dtype} {tuple(held.shape)}, expected {dtype} {shape}"
        self.refuse(name, held.dtype != dtype or tuple(held.shape) != shape, found)
        return held

    def floats(self, name: str, count: int) -> Float[Tensor, "n"]:
        held = self.tensor(name, torch.float32, (count,))
        self.refuse(name, not bool(torch.isfinite(held).all()), "is not finite")
        return held

    def codes(self, name: str, count: int) -> UInt8[Tensor, "n"]:
        """Bytes, whatever dtype they are stored under (bnb_4bit_quant_storage)."""
        held = self.tensors.get(name)
        self.refuse(name, held is None, "is missing")
        assert held is not None
        nbytes = held.numel() * held.element_size()
        self.refuse(name, nbytes != count, f"has {nbytes} bytes, expected {count}")
        return held.contiguous().flatten().view(torch.uint8)

    def table(self, name: str, table: str) -> None:
        """Readers use their own values: a file with others means something else."""
        values = torch.tensor(table_values(table))
        held = self.floats(name, len(values))
        self.refuse(name, not torch.allclose(held, values, rtol=0, atol=1e-6), f"are not the values of {table}")

    def state(self, shape: tuple[int, int]) -> tuple[str, dict[str, Any]]:
        """The table, and the fields of the JSON that come in a tensor, checked."""
        named = [table for table in TABLES if STATE + table in self.tensors]
        if len(named) != 1:
            raise CheckpointError("has no quant_state", where=self.site, why="its codes would have no meaning")
        name = STATE + named[0]
        held = self.tensors[name]
        self.refuse(name, held.dtype != torch.uint8 or held.dim() != 1 or held.numel() > _MAX_STATE, "is no short JSON")
        try:
            state = json.loads(bytes(held.tolist()))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"is no JSON: {error}", where=f"{self.site}.{name}") from error
        self.refuse(name, not isinstance(state, dict), "is no table")
        nested, offset = "nested_offset" in state, state.get("nested_offset")
        finite = type(offset) in (int, float) and abs(offset) < torch.finfo(torch.float32).max
        agrees = {
            "quant_type": state.get("quant_type") == named[0], "blocksize": state.get("blocksize") in SIZES,
            "shape": state.get("shape") == list(shape), "dtype": state.get("dtype") in _FLOATS,
            "nested_blocksize": not nested or state.get("nested_blocksize") == NESTED,
            "nested_offset": not nested or finite,
            "nested_absmax": nested == ("weight.nested_absmax" in self.tensors),
        }  # fmt: skip
        for field, right in agrees.items():
            self.refuse(name, not right, f"{field} is {state.get(field)!r:.60}")
        return named[0], state

    def refuse(self, name: str, wrong: bool, why: str) -> None:
        if wrong:
            raise CheckpointError(
                why, where=f"{self.site}.{name}", why="the file contradicts itself or its configuration"
            )
