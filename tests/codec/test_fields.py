"""Layouts: bijections whatever the bytes, and the right bits in every field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import _native
from lowbit.codec.fields import LAYOUTS, pack_bits, unpack_bits
from lowbit.codec.gguf_blocks import BLOCKS
from lowbit.formats import pack

EVERY = LAYOUTS | BLOCKS


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n).astype(np.uint8)


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=4, deadline=None)
@given(records=st.integers(1, 40), seed=st.integers(0, 1 << 16))
def test_join_undoes_split(name: str, records: int, seed: int) -> None:
    layout = EVERY[name]
    data = noise(records * layout.width, seed)
    fields = layout.split(data)
    assert tuple(field.size for field in fields) == layout.counts(data.size)
    assert all(field.max() < 1 << part.bits for field, part in zip(fields, layout.parts, strict=True))
    np.testing.assert_array_equal(layout.join(fields), data)


def test_no_record_is_cut() -> None:
    assert LAYOUTS["bf16"].counts(7) is None
    assert BLOCKS["q4_k"].counts(2 * 144) == (2, 2, 2, 2, 16, 16, 512)


@pytest.mark.parametrize(
    ("name", "dtype", "bits", "mantissa"),
    [("bf16", torch.bfloat16, 8, 7), ("fp32", torch.float32, 8, 23), ("fp16", torch.float16, 5, 10),
     ("fp8-e4m3", torch.float8_e4m3fn, 4, 3), ("fp8-e5m2", torch.float8_e5m2, 5, 2)],
)  # fmt: skip
def test_exponents_are_those_of_the_numbers(name: str, dtype: torch.dtype, bits: int, mantissa: int) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, expected = torch.frexp(x.double())  # x = m 2^e with m in [0.5, 1)
    bias = (1 << (bits - 1)) - 1
    normal = x.double().abs() >= 2.0 ** (1 - bias)  # subnormal numbers share the exponent 0
    first = torch.from_numpy(LAYOUTS[name].split(x.view(torch.uint8).numpy())[0].astype(np.int64))
    assert torch.equal((first >> (8 - bits) if bits < 8 else first)[normal] - bias + 1, expected[normal])
    assert int(normal.sum()) > 900


@pytest.mark.parametrize("bits", range(1, 8))
def test_packed_codes_are_those_that_the_package_packs(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (6, 64), generator=torch.Generator().manual_seed(bits))
    data = pack.pack(codes, 1 << bits).numpy().reshape(-1)
    found = unpack_bits(data, bits)
    assert np.array_equal(np.bincount(found, minlength=128), np.bincount(codes.reshape(-1), minlength=128))
    assert np.array_equal(pack_bits(found, bits), data)


@pytest.mark.parametrize(
    ("name", "scale_at", "others"),
    [("q4_0", 0, ()), ("q5_0", 0, ()), ("q8_0", 0, ()), ("q6_k", 208, range(192, 208)), ("q4_1", 0, ()),
     ("q5_1", 0, ()),
     ("q4_k", 0, range(4, 16)), ("q5_k", 0, range(4, 16)), ("q2_k", 80, range(16)), ("q3_k", 108, range(96, 108))],
)  # fmt: skip
def test_codes_of_blocks_are_those_that_gguf_decodes(name: str, scale_at: int, others: range) -> None:
    """With every scale 1 and every minimum 0, a block decodes to its codes less a constant."""
    layout = BLOCKS[name]
    blocks = noise(5 * layout.width, 3).reshape(5, layout.width)
    blocks[:, scale_at : scale_at + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    if name in ("q4_1", "q5_1", "q4_k", "q5_k", "q2_k"):
        blocks[:, scale_at + 2 : scale_at + 4] = 0
    ones = {"q6_k": 1, "q2_k": 1, "q4_k": 1, "q5_k": 1}
    for i in others:
        blocks[:, i] = ones.get(name, 0)
    if name in ("q4_k", "q5_k"):
        blocks[:, 4:12], blocks[:, 12:16] = 1, 0x11  # all scales 1, all minima 1 of a scale of minima that is 0
    if name == "q3_k":
        blocks[:, 96:104], blocks[:, 104:108] = 0x11, 0xAA  # scales of six bits less 32: 33 - 32
    values = dequantize(blocks, GGMLQuantizationType[name.upper()]).reshape(5, -1)
    part, codes = layout.parts[-1], layout.split(blocks.reshape(-1))[-1]
    if name == "q2_k":
        part, codes = layout.parts[1], layout.split(blocks.reshape(-1))[1]
    offset = {"q4_0": 8, "q5_0": 16, "q6_k": 32, "q3_k": 4, "q8_0": 0}.get(name, 0)
    whole = codes.view(np.int8) if part.signed else codes
    assert whole.size == values.size
    np.testing.assert_array_equal(
        np.sort(whole.astype(np.int64)), np.sort(values.reshape(-1).astype(np.int64) + offset)
    )


def test_scales_of_k_blocks_are_the_six_bits_that_gguf_means() -> None:
    """One block a group: the scale of a group shows as the step of its codes."""
    layout = BLOCKS["q4_k"]
    block = noise(layout.width, 5).reshape(1, -1)
    block[:, :4] = np.frombuffer(np.array([1, 0], np.float16).tobytes(), np.uint8)
    block[:, 16:] = 0x11  # every code is 1, so that every value is the scale of its group
    values = dequantize(block, GGMLQuantizationType.Q4_K).reshape(8, 32)
    names = [part.name for part in layout.parts]
    np.testing.assert_array_equal(layout.split(block.reshape(-1))[names.index("scales")], values[:, 0])


def test_fields_of_unlike_lengths_are_not_joined() -> None:
    byte, word = np.zeros(16, np.uint8), np.zeros(8, np.uint16)
    for call in (
        lambda: _native.join_bf16(byte, byte, word),
        lambda: _native.join_fp16(byte[:8], byte, word),
        lambda: _native.join_fp32(byte, byte, byte, byte[:15], np.zeros(16, np.uint32)),
        lambda: _native.pack_bits(byte, byte[:5], 3),
        lambda: _native.pack_bits(byte, byte, 8),
    ):
        with pytest.raises(ValueError, match="not of one length"):
            call()
