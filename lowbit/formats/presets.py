"""Presets: every format's one spelling, as data.

    int{2..8}-{tensor,row,g32,g64,g128}[-sym]    fp16 scale; asymmetric ones add a zero of the codes' own bits
    nf4  nf4-dq  fp4  fp4-dq                     bitsandbytes: blocks of 64 along a row, fp32 absmax; -dq codes it
    fp4-e2m1                                     E2M1, groups of 32, fp16 scale
    fp8-e4m3  fp8-e5m2                           a fp32 scale a row
    mxfp4  mxfp8                                 OCP microscaling: groups of 32, power-of-two scale
    nvfp4                                        E2M1, groups of 16, e4m3 scale, one fp32 scale a tensor
    ternary                                      -1, 0, 1 in base 3, groups of 128, fp16 scale

nf4 and fp4 agree with bitsandbytes bit for bit where a row is a multiple of 64 (its blocks run over the flattened
weight, these start anew at each row). With -dq the absmax codes, their scale and offset agree too; the 4-bit codes are
chosen for the absmax that a reader decodes, bitsandbytes' for the exact one, so that about 4 in 1000 differ.

Bits a weight of an asymmetric integer format: b + (16 + b) / group; int4-g128 is 4.15625.
"""

from __future__ import annotations

import re

import torch

from lowbit.errors import RecipeError, nearest
from lowbit.formats.blocks import Block
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import IntGrid, Table

_FP16, _FP32 = Stored(torch.float16), Stored(torch.float32)
_ROW, _TENSOR = Block("row"), Block("tensor")


def _group(n: int) -> Block:
    return Block("group", (n,))


_DOUBLE = Format("dynamic8-flat256", Table("dynamic8"), Block("flat", (256,)), _FP32, centred=True)
_POWER = Format("e8m0", Table("e8m0"), _TENSOR, None)
_E4M3 = Format("e4m3-tensor", Table("e4m3"), _TENSOR, _FP32)

_FIXED = [
    Format("nf4", Table("nf4"), _group(64), _FP32),
    Format("nf4-dq", Table("nf4"), _group(64), _DOUBLE),
    Format("fp4", Table("fp4"), _group(64), _FP32),
    Format("fp4-dq", Table("fp4"), _group(64), _DOUBLE),
    Format("fp4-e2m1", Table("e2m1"), _group(32), _FP16),
    Format("fp8-e4m3", Table("e4m3"), _ROW, _FP32),
    Format("fp8-e5m2", Table("e5m2"), _ROW, _FP32),
    Format("mxfp4", Table("e2m1"), _group(32), _POWER),
    Format("mxfp8", Table("e4m3"), _group(32), _POWER),
    Format("nvfp4", Table("e2m1"), _group(16), _E4M3),
    Format("ternary", Table("ternary"), _group(128), _FP16, least_clip_steps=24),
]

_BLOCKS = {"tensor": _TENSOR, "row": _ROW, "g32": _group(32), "g64": _group(64), "g128": _group(128)}

PRESETS: dict[str, Format] = {f.name: f for f in _FIXED} | {
    name: Format(name, IntGrid(bits, symmetric), block, _FP16)
    for bits in range(2, 9)
    for spelling, block in _BLOCKS.items()
    for symmetric, name in ((False, f"int{bits}-{spelling}"), (True, f"int{bits}-{spelling}-sym"))
}


def preset(name: str) -> Format:
    """The format of a spelling; other group sizes (``int4-g96``) are accepted too.

    Raises RecipeError with the nearest known name.
    """
    if name in PRESETS:
        return PRESETS[name]
    if match := re.fullmatch(r"int([2-8])-g([1-9]\d{0,5})(-sym)?", name):
        return Format(name, IntGrid(int(match[1]), bool(match[3])), _group(int(match[2])), _FP16)
    raise RecipeError(f"unknown format {name!r}", fix=nearest(name, PRESETS))
