"""nf4 and fp4 are bitsandbytes' formats, bit for bit.

``tests/golden/bitsandbytes.safetensors`` holds some of the tensors that ``benchmarks/peers/bitsandbytes_codes.py``
writes, under its names.

All that differs: with double quantization bitsandbytes chooses the 4-bit codes for the exact absmax and stores a coded
one; lowbit chooses them for the absmax that a reader will decode. The codes of the absmax itself, their scale and their
offset agree. bitsandbytes' blocks run over the flattened weight and cross rows, lowbit's start anew at each row: they
are the same blocks where a row is a multiple of 64.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowbit.formats.grids import table_values
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Lookup, Raw, Sum

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "bitsandbytes.safetensors")
CASES = ["plain", "hard", "straddling_and_ragged"]  # hard: a block of zeros, an outlier, every midpoint of both tables
KINDS = ["nf4", "fp4"]


def weight(case: str) -> torch.Tensor:
    """A case's weight; as one row where blocks cross rows."""
    w = GOLDEN[f"{case}.weight"]
    return w if w.shape[1] % 64 == 0 else w.reshape(1, -1)


def encode(name: str, w: torch.Tensor) -> Lookup:
    fmt = preset(name)
    q = fmt.encode(w, fmt.fit(w))
    assert isinstance(q, Lookup)
    return q


@pytest.mark.parametrize("kind", [*KINDS, "nested"])
def test_tables(kind: str) -> None:
    ours = torch.tensor(table_values("dynamic8" if kind == "nested" else kind))
    assert torch.equal(ours, GOLDEN[f"{kind}.table"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_codes_and_absmax(case: str, kind: str) -> None:
    q, key = encode(kind, weight(case)), f"{case}.{kind}."
    assert torch.equal(q.codes.unpack().flatten(), GOLDEN[key + "codes"].flatten())
    assert isinstance(q.scale, Raw)
    assert torch.equal(q.scale.data.flatten(), GOLDEN[key + "absmax"])


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_values(kind: str) -> None:
    assert torch.equal(encode(kind, weight("hard")).decode(), GOLDEN[f"hard.{kind}.dequantized"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [*CASES, "two_nested_blocks"])
def test_coded_absmax(case: str, kind: str) -> None:
    """400 scales are one nested block of 256 and a ragged one of 144."""
    key, nested = f"{case}.{kind}.", preset("nf4-dq").scale
    absmax = GOLDEN[key + "absmax"]
    coded = nested.quantize_scale(absmax.view(1, -1))  # type: ignore[union-attr]
    assert isinstance(coded, Sum)
    lookup, mean = coded.terms
    assert isinstance(lookup, Lookup)
    assert isinstance(lookup.scale, Raw)
    assert isinstance(mean, Raw)
    assert torch.equal(lookup.codes.unpack().flatten(), GOLDEN[key + "nested.absmax"])
    assert torch.equal(lookup.scale.data.flatten(), GOLDEN[key + "nested.scale"])
    assert torch.equal(mean.data.flatten()[0], GOLDEN[key + "nested.offset"])


@pytest.mark.parametrize("kind", KINDS)
def test_their_codes_decode_to_their_values_under_double_quantization(kind: str) -> None:
    fmt, w = preset(f"{kind}-dq"), weight("hard")
    theirs = fmt.assemble(GOLDEN[f"hard.{kind}.codes"], fmt.fit(w))
    assert torch.equal(theirs.decode(), GOLDEN[f"hard.{kind}.nested.dequantized"])


@pytest.mark.parametrize("kind", KINDS)
def test_codes_chosen_for_the_stored_absmax_differ_rarely_and_never_decode_worse(kind: str) -> None:
    fmt, w = preset(f"{kind}-dq"), weight("plain")
    ours, theirs = encode(f"{kind}-dq", w), fmt.assemble(GOLDEN[f"plain.{kind}.codes"], fmt.fit(w))
    differ = ours.codes.unpack() != GOLDEN[f"plain.{kind}.codes"]
    assert 0 < int(differ.sum()) < 0.01 * w.numel()
    assert ((ours.decode() - w).abs() <= (theirs.decode() - w).abs() + 1e-8).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_installed_bitsandbytes(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    w = 0.02 * torch.randn(256, 192, generator=torch.Generator().manual_seed(7))
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind)
    q = encode(kind, w)
    flat = packed.flatten()
    codes = torch.stack([flat >> 4, flat & 15], dim=1).view(w.shape)
    assert torch.equal(q.codes.unpack(), codes)
    assert torch.equal(q.decode(), bnb.dequantize_4bit(packed, state))
