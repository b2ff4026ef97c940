"""Presets: every format's one spelling, as data.

TYPE-BLOCK, with a 16-bit scale a block:

    TYPE     int{2..8}                   integers; a zero of the codes' own bits. -sym: none. -z16: a 16-bit float
             nf4  af4  fp4               tables made for Gaussians, bitsandbytes' float
             fp{k}-e{E}m{M}              floats of k = 1 + E + M <= 8 bits
             dynamic{3..8}               a sign, a decimal exponent, a linear fraction
             quantile{3..8}              values estimated from each weight and stored with it
             ternary                     -1, 0, 1 in base 3
    BLOCK    tensor  row  g{n}           the whole matrix, a row, n weights along a row

and names that have a meaning elsewhere:

    nf4  nf4-dq  fp4  fp4-dq             bitsandbytes: blocks of 64 along a row, fp32 absmax; -dq codes it
    fp4-e2m1                             E2M1, groups of 32, fp16 scale
    fp8-e4m3  fp8-e5m2                   a fp32 scale a row
    mxfp4  mxfp8                         OCP microscaling: groups of 32, power-of-two scale
    nvfp4                                E2M1, groups of 16, e4m3 scale, one fp32 scale a tensor
    ternary                              groups of 128
    q4_0  q5_0  q8_0                     ggml's blocks: groups of 32, fp16 scale, which is negative where that helps
    q4_1  q5_1                           groups of 32, fp16 scale and fp16 least value
    q2_k  q3_k  q4_k  q5_k  q6_k         groups of 16 or 32, scales (and least values) coded in blocks of 256
    ec1 .. ec8                           entropy coded at that many bits a weight, decimals allowed (ec2.5)
    ec                                   the same at what a budget of bytes leaves

Floats of four exponent bits and more reach so high that their scales would be too small for float16: they have float32.

nf4 and fp4 agree with bitsandbytes bit for bit where a row is a multiple of 64 (its blocks run over the flattened
weight, these start anew at each row). With -dq the absmax codes, their scale and offset agree too; the 4-bit codes are
chosen for the absmax that a reader decodes, bitsandbytes' for the exact one, so that about 4 in 1000 differ.

Bits a weight of an asymmetric integer format: b + (16 + b) / group; int4-g128 is 4.15625; with -z16 b + 32 / group.
"""

from __future__ import annotations

import re

import torch

from lowbit.errors import RecipeError, nearest
from lowbit.formats.blocks import Block
from lowbit.formats.ec import entropy
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import Grid, IntGrid, Quantile, Table

_FP16, _FP32 = Stored(torch.float16), Stored(torch.float32)
_ROW, _TENSOR = Block("row"), Block("tensor")


def _group(n: int) -> Block:
    return Block("group", (n,))


_DOUBLE = Format("dynamic8-flat256", Table("dynamic8"), Block("flat", (256,)), _FP32, centred=True)
_POWER = Format("e8m0", Table("e8m0"), _TENSOR, None)
_E4M3 = Format("e4m3-tensor", Table("e4m3"), _TENSOR, _FP32)
_TERNARY_STEPS = 24

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
    Format("ternary", Table("ternary"), _group(128), _FP16, least_clip_steps=_TERNARY_STEPS),
]


def _coded(bits: int, each: int, symmetric: bool = False) -> Format:
    """How K-quants store scales: whole numbers of so many bits, and one fp16 for a block of 256 weights."""
    per = 256 // each
    return Format(f"int{bits}-g{per}{'-sym' if symmetric else ''}", IntGrid(bits, symmetric), _group(per), _FP16)


def _with_least(name: str, bits: int, each: int, scale: Stored | Format) -> Format:
    return Format(name, IntGrid(bits, False), _group(each), scale, zero=_FP32, offset=scale)


_GGML = [
    Format("q4_0", IntGrid(4, True, signed=True), _group(32), _FP16),
    Format("q5_0", IntGrid(5, True, signed=True), _group(32), _FP16),
    Format("q8_0", IntGrid(8, True), _group(32), _FP16),
    _with_least("q4_1", 4, 32, _FP16),
    _with_least("q5_1", 5, 32, _FP16),
    _with_least("q2_k", 2, 16, _coded(4, 16)),
    Format("q3_k", IntGrid(3, True, signed=True), _group(16), _coded(6, 16, symmetric=True)),
    _with_least("q4_k", 4, 32, _coded(6, 32)),
    _with_least("q5_k", 5, 32, _coded(6, 32)),
    Format("q6_k", IntGrid(6, True, signed=True), _group(16), _coded(8, 16, symmetric=True)),
]

_BLOCKS = {"tensor": _TENSOR, "row": _ROW, "g32": _group(32), "g64": _group(64), "g128": _group(128)}

PRESETS: dict[str, Format] = {f.name: f for f in (*_FIXED, *_GGML)} | {
    name: Format(name, IntGrid(bits, symmetric), block, _FP16)
    for bits in range(2, 9)
    for spelling, block in _BLOCKS.items()
    for symmetric, name in ((False, f"int{bits}-{spelling}"), (True, f"int{bits}-{spelling}-sym"))
}

_SPELLING = re.compile(r"(?P<type>.+?)-(?:(?P<whole>tensor|row)|g(?P<group>[1-9]\d{0,5}))(?:-(?P<zero>sym|z16))?")
_EXAMPLES = ["int4-g64-z16", "fp4-e3m0-g64", "fp3-e2m0-g64", "nf4-g64", "af4-g64", "dynamic4-g64", "quantile4-g64",
             "ec3"]  # fmt: skip


def preset(name: str) -> Format:
    """The format of a spelling: one of ``PRESETS``, any TYPE-BLOCK, or a rate.

    Raises RecipeError with the nearest known name.
    """
    if name in PRESETS:
        return PRESETS[name]
    if (coded := entropy(name)) is not None:
        return coded
    if (match := _SPELLING.fullmatch(name)) and (grid := _grid(match["type"], match["zero"])):
        block = _BLOCKS[match["whole"]] if match["whole"] else _group(int(match["group"]))
        wide = isinstance(grid, Table) and re.match(r"e[4-7]", grid.name)
        return Format(
            name, grid, block, _FP32 if wide else _FP16, zero=_FP16 if match["zero"] == "z16" else None,
            least_clip_steps=_TERNARY_STEPS if match["type"] == "ternary" else 0,
        )  # fmt: skip
    raise RecipeError(f"unknown format {name!r}", fix=nearest(name, [*PRESETS, *_EXAMPLES]))


def _grid(kind: str, zero: str | None) -> Grid | None:
    """The values of a TYPE, if there is one; a zero point is a matter of integers only."""
    if match := re.fullmatch(r"int([2-8])", kind):
        return IntGrid(int(match[1]), zero == "sym")
    if zero:
        return None
    if kind in ("nf4", "af4", "fp4", "ternary") or re.fullmatch(r"dynamic[3-8]", kind):
        return Table(kind)
    if match := re.fullmatch(r"quantile([3-8])", kind):
        return Quantile(int(match[1]))
    if match := re.fullmatch(r"fp([3-8])-e([1-7])m([0-6])", kind):
        bits, exponent, mantissa = map(int, match.groups())
        return Table(f"e{exponent}m{mantissa}") if 1 + exponent + mantissa == bits else None
    return None
