"""Activation formats against torch's own fake quantizers, casts and a plain loop; what they refuse."""

from __future__ import annotations

import re

import pytest
import torch

from lowbit.errors import FormatError, RecipeError
from lowbit.formats.activation import NAMES, Input, activation, exact_columns
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Columns, QTensor, Raw, Sum


def values(*shape: int, seed: int = 0, shift: float = 0.3) -> torch.Tensor:
    """Skewed, so that zero points matter, with tokens of very different size."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift
    return x * torch.logspace(-2, 2, shape[-2]).unsqueeze(-1)


def by_torch(x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """One range for all of ``x``, by torch's fake quantizer."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        return torch.fake_quantize_per_tensor_affine(x, float(x.abs().max()) / top, 0, -top, top)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / (2**bits - 1)
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 2**bits - 1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block", ["token", "tensor", "g24"])
def test_integers_are_torchs_fake_quantizer_on_every_block(bits: int, symmetric: bool, block: str) -> None:
    x = values(3, 5, 64)
    rounded = activation(f"int{bits}-{block}{'-sym' if symmetric else ''}").round(x)
    pieces = {"token": list(x.view(15, 64)), "tensor": [x]}.get(block)
    if pieces is None:  # the last group of 24 has 16
        pieces = [part for row in x.view(15, 64) for part in row.split(24)]
    expected = torch.cat([by_torch(piece, bits, symmetric).flatten() for piece in pieces]).view(x.shape)
    torch.testing.assert_close(rounded, expected, rtol=1e-5, atol=0)
    assert not torch.equal(rounded, x)


@pytest.mark.parametrize(
    ("table", "dtype", "top"), [("e4m3", torch.float8_e4m3fn, 448), ("e5m2", torch.float8_e5m2, 57344)]
)
def test_floats_are_torchs_casts(table: str, dtype: torch.dtype, top: int) -> None:
    x = values(7, 64)
    step = x.abs().amax(-1, keepdim=True) / top
    expected = (x * step.reciprocal()).to(dtype).float() * step
    torch.testing.assert_close(activation(f"fp8-{table}-token").round(x), expected, rtol=1e-6, atol=0)


def test_what_is_on_the_grid_stays() -> None:
    for name in ("int8-token", "int4-g64-sym", "fp8-e4m3-tensor"):
        once = activation(name).round(values(9, 128))
        torch.testing.assert_close(activation(name).round(once), once, rtol=2e-6, atol=0)


def test_dtype_and_shape_are_kept_and_the_work_is_in_float32() -> None:
    x = values(2, 3, 32).bfloat16()
    rounded = activation("int8-token").round(x)
    assert (rounded.dtype, rounded.shape) == (torch.bfloat16, x.shape)
    assert torch.equal(rounded, activation("int8-token").round(x.float()).bfloat16())
    assert activation("int8-token").round(x[:0]).shape == (0, 3, 32)
    strided = values(4, 2, 64).transpose(0, 1)[..., ::2]
    assert torch.equal(activation("int4-token").round(strided), activation("int4-token").round(strided.contiguous()))


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_tokens_have_zero_in_their_range(sign: int) -> None:
    x = sign * (values(6, 64).abs() + 20)
    rounded = activation("int4-token").round(x)
    torch.testing.assert_close(rounded, torch.stack([by_torch(row, 4, False) for row in x]), rtol=1e-5, atol=0)
    assert 0 in activation("int4-tensor").round(torch.cat([x.flatten(), torch.tensor([sign * 0.1])])[None])


def test_zeros_and_tiny_tokens_survive_and_nan_stays_where_it_is() -> None:
    x = torch.zeros(3, 16)
    x[1] = 1e-30
    x[2, 3] = torch.nan
    rounded = activation("int8-token").round(x)
    assert not rounded[0].any()
    torch.testing.assert_close(rounded[1], x[1], rtol=1e-2, atol=0)
    assert torch.isfinite(rounded[:2]).all()
    assert rounded[2].isnan().any()


def test_a_static_range_is_used_whatever_comes() -> None:
    low, high = torch.tensor([-1.0]), torch.tensor([3.0])
    fmt, x = activation("int8-tensor-static"), torch.tensor([[-9.0, -0.5, 0.0, 1.234, 99.0]])
    rounded = Input(fmt, low, high).round(x)
    scale = 4 / 255
    expected = torch.fake_quantize_per_tensor_affine(x, scale, round(1 / scale), 0, 255)
    torch.testing.assert_close(rounded, expected)
    assert float(rounded.max()) <= 3.0 + scale
    assert torch.equal(Input(fmt, low, high).round(x[:, :3]), rounded[:, :3])  # no range of its own
    fp8 = Input(activation("fp8-e4m3-tensor-static"), low, high).round(x)
    torch.testing.assert_close(fp8[0, 1:4], (x[0, 1:4] * 448 / 3).to(torch.float8_e4m3fn).float() * 3 / 448)
    assert float(fp8.max()) == pytest.approx(3)


def test_ranges_that_do_not_belong_are_refused() -> None:
    one = torch.ones(1)
    for fmt, bounds in ((activation("int8-tensor-static"), (None, None)), (activation("int8-token"), (-one, one))):
        with pytest.raises(FormatError, match=fmt.name):
            Input(fmt, *bounds)
    with pytest.raises(FormatError, match="needs the range that calibration measured"):
        activation("int8-tensor-static").round(values(2, 8))
    with pytest.raises(FormatError, match="takes its ranges from its inputs"):
        activation("int8-tensor").round(values(2, 8), (-one, one))


def outliers(index: list[int], width: int) -> QTensor:
    """What LLM.int8() makes of a weight."""
    W, fmt = values(12, width), preset("int8-row-sym")
    rest = W.clone()
    rest[:, index] = 0
    held = Columns((12, width), torch.tensor(index, dtype=torch.int32), Raw.of(W[:, index].half()))
    return Sum((12, width), (fmt.encode(rest, fmt.fit(rest)), held))


def test_columns_that_meet_raw_weights_are_neither_rounded_nor_part_of_the_range() -> None:
    index = [30, 2]
    exact = exact_columns(outliers(index, 32))
    assert exact is not None
    assert exact.tolist() == [2, 30]
    x = values(4, 6, 32)
    x[..., index] *= 1000
    rounded = Input(activation("int8-token")).round(x, exact)
    assert torch.equal(rounded[..., index], x[..., index])
    others = [i for i in range(32) if i not in index]
    assert torch.equal(rounded[..., others], activation("int8-token").round(x[..., others]))


def test_only_raw_columns_are_exact() -> None:
    q, fmt = outliers([1], 32), preset("int8-row")
    assert exact_columns(fmt.encode(values(12, 32), fmt.fit(values(12, 32)))) is None
    assert isinstance(q, Sum)
    coded = fmt.encode(values(12, 1), fmt.fit(values(12, 1)))
    assert exact_columns(Sum(q.shape, (q.terms[0], Columns(q.shape, torch.tensor([1]), coded)))) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_one_meaning(name: str) -> None:
    fmt = activation(name)
    assert fmt.name == name
    assert fmt.static == name.endswith("-static")


@pytest.mark.parametrize(
    ("name", "fix"),
    [("int8-tokens", "int8-token"), ("fp8-e4m3", "fp8-e4m3-token"), ("int9-token", "int"), ("int8-row", "one of|mean"),
     ("int8-token-static", "int8-tensor-static"), ("int4-g64-sym-static", "int4-tensor-sym-static")],
)  # fmt: skip
def test_what_is_no_activation_format_is_refused(name: str, fix: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(repr(name))) as caught:
        activation(name)
    assert re.search(fix, caught.value.fix)
