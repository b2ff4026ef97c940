"""KV formats against a plain loop over heads and tokens, their exact sizes, and their spelling."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from lowbit.errors import FormatError, RecipeError
from lowbit.formats.heads import NAMES, CacheFormat, HeadFormat, head_format

SHAPE = (2, 3, 16, 8)  # batch, heads, tokens, d


def states(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Keys have channels of their own size and offset."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x * torch.logspace(-1, 1, shape[-1]) + torch.linspace(-2, 3, shape[-1])


def named(name: str) -> HeadFormat:
    fmt = head_format(name)
    assert fmt is not None
    return fmt


def rounded(vector: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """One block, by the textbook, with the scale in float16."""
    low, high = min(vector.min(), 0), max(vector.max(), 0)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = np.float32(np.float16(np.float32(max(high, -low)) / np.float32(top)))
        return np.clip(np.round(vector / scale), -top - 1, top) * scale
    scale = np.float32(np.float16(np.float32(high - low) / np.float32(2**bits - 1)))
    zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
    return (np.clip(np.round(vector / scale) + zero, 0, 2**bits - 1) - zero) * scale


def expected(x: torch.Tensor, bits: int, block: str, symmetric: bool) -> np.ndarray:
    out = x.numpy().copy()
    for b, h in np.ndindex(x.shape[:2]):
        head = out[b, h]
        if block.startswith("channel"):
            size = int(block[7:])
            for start in range(0, len(head), size):
                for c in range(head.shape[1]):
                    head[start : start + size, c] = rounded(head[start : start + size, c], bits, symmetric)
        else:
            size = head.shape[1] if block == "head" else int(block[1:])
            for t in range(len(head)):
                for start in range(0, head.shape[1], size):
                    head[t, start : start + size] = rounded(head[t, start : start + size], bits, symmetric)
    return out


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("block", ["head", "g4", "g3", "channel4", "channel8"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_read_is_each_block_rounded_alone(bits: int, block: str, symmetric: bool) -> None:
    x, fmt = states(), named(f"int{bits}-{block}{'-sym' if symmetric else ''}")
    got = fmt.decode(fmt.encode(x), SHAPE[-1], torch.float32)
    np.testing.assert_allclose(got.numpy(), expected(x, bits, block, symmetric), rtol=1e-6, atol=1e-6)


def test_floats_are_torchs_casts() -> None:
    x, fmt = states(), named("fp8-e4m3-head")
    step = (x.abs().amax(-1, keepdim=True) / 448).half().float()
    got = fmt.decode(fmt.encode(x), SHAPE[-1], torch.float32)
    torch.testing.assert_close(got, (x * step.reciprocal()).to(torch.float8_e4m3fn).float() * step)


def test_a_rotated_format_rounds_in_the_basis_of_a_hadamard_matrix() -> None:
    x, fmt = states(), named("int4-head-hadamard")
    H = torch.tensor(scipy.linalg.hadamard(8) / np.sqrt(8), dtype=torch.float32)
    plain = torch.from_numpy(expected(x @ H, 4, "head", False)) @ H
    torch.testing.assert_close(fmt.decode(fmt.encode(x), 8, torch.float32), plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(FormatError, match="a head of 80 numbers has no Hadamard matrix"):
        fmt.check(80)
    named("int4-head").check(80)


@pytest.mark.parametrize(
    "name", ["int8-head", "int3-head", "int4-g4", "int2-channel8", "int4-channel8-sym", "fp8-e5m2-head"]
)
def test_sizes_are_those_of_the_bytes(name: str) -> None:
    fmt, x = named(name), states()
    packed = fmt.encode(x)
    nbytes = sum(part.numel() * part.element_size() for part in packed if part is not None)
    assert 8 * nbytes / x.numel() == pytest.approx(fmt.bits(SHAPE[-1]))


def test_bits_of_a_real_head() -> None:
    """Head dimension 128: 4 bits, a float16 scale and a byte for the zero."""
    assert named("int4-head").bits(128) == 4 + 24 / 128
    assert named("int2-channel32").bits(128) == 2 + 24 / 32
    assert named("int4-head-sym").bits(128) == 4 + 16 / 128


def test_a_dtype_is_asked_for() -> None:
    fmt = named("int8-head")
    assert fmt.decode(fmt.encode(states().bfloat16()), 8, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_one_meaning(name: str) -> None:
    fmt = head_format(name)
    assert fmt is None if name == "raw" else named(name).name == name


@pytest.mark.parametrize(
    "name", ["int4", "int9-head", "int4-row", "int4-channel", "fp8-e4m3-head-sym", "int4-hadamard", ""]
)
def test_what_is_no_format_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="unknown KV format"):
        head_format(name)


@pytest.mark.parametrize(
    ("text", "fmt"),
    [
        ("int4-head", CacheFormat("int4-head", "int4-head")),
        ("int2-channel32:int2-head", CacheFormat("int2-channel32", "int2-head")),
        ("raw:int4-head-hadamard,sink=4", CacheFormat("raw", "int4-head-hadamard", sink=4)),
        ("int8-head,sink=4,window=32", CacheFormat("int8-head", "int8-head", 4, 32)),
    ],
)
def test_a_cache_format_has_one_spelling(text: str, fmt: CacheFormat) -> None:
    assert CacheFormat.parse(text) == fmt
    assert str(fmt) == text


@pytest.mark.parametrize(
    "text", ["", "int4-head:", "int4-head,sink", "int4-head,sink=-1", "int4-head,sink=1,sink=2", "a:b:c"]
)
def test_what_is_no_cache_format_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        CacheFormat.parse(text)
    with pytest.raises(RecipeError, match="counts of tokens"):
        CacheFormat("int4-head", "int4-head", window=-1)
