"""Integer products: exact beside int64, as near to decoding as float32 allows, and chosen where they apply."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from lowbit.formats.activation import Input, activation
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import QTensor
from lowbit.runtime.kernels import REFERENCE, choose, usable
from lowbit.runtime.kernels.int8_products import MANY_ON_CPU, Int8Products, exact
from lowbit.runtime.linear import QLinear

UNIT = 2.0**-24
"""Half of the distance of float32 numbers, relatively."""

pytestmark = pytest.mark.skipif(not exact(torch.device("cpu")), reason="needs a CPU with VNNI")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coded(W: torch.Tensor, name: str = "int8-row-sym") -> QTensor:
    fmt = preset(name)
    return fmt.encode(W, fmt.fit(W))


def rounding(name: str) -> Input:
    fmt = activation(name)
    return Input(fmt, torch.tensor([-1.5]), torch.tensor([2.0])) if fmt.static else Input(fmt)


ROUNDINGS = [
    "int8-token",
    "int8-token-sym",
    "int8-tensor",
    "int4-tensor-sym",
    "int8-tensor-static",
    "int8-tensor-sym-static",
]


@settings(max_examples=40)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(2, 90), st.sampled_from(ROUNDINGS),
    st.sampled_from(["int8-row-sym", "int8-tensor-sym"]), st.sampled_from([0.0, 3.0, -40.0]), st.integers(0, 99),
)  # fmt: skip
def test_products_are_exact_up_to_three_roundings(
    tokens: int, rows: int, columns: int, name: str, weights: str, middle: float, seed: int
) -> None:
    """And within the bound of both from decoding and multiplying in float32; inputs far from zero too."""
    W = gaussian(rows, columns, seed=seed) * torch.logspace(-3, 2, rows)[:, None]
    x = gaussian(tokens, columns, seed=seed + 1) * torch.logspace(-2, 3, tokens)[:, None] + middle
    q, kernel = coded(W, weights), Int8Products(rounding(name))
    y = kernel.run(x, kernel.prepare(q, torch.float32))

    codes, step, shift = kernel.coded(x)
    whole = codes.long() + (0 if shift is None else shift.long())
    rounded, decoded = kernel.input.round(x), q.decode()
    assert torch.equal(whole.float() * step, rounded)  # what the float path multiplies, to the bit
    scale = q.scale.decode(torch.float64).view(-1)  # type: ignore[attr-defined]
    integers = torch.round(q.decode(torch.float64) / torch.where(scale == 0, 1.0, scale)[:, None]).long()
    truth = (whole @ integers.T).double() * step.double() * scale
    tiny = torch.finfo(torch.float32).smallest_normal  # products below it lose bits
    assert ((y.double() - truth).abs() <= 3.001 * UNIT * truth.abs() + 2 * tiny).all()

    reach = rounded.double().abs() @ decoded.double().abs().T
    assert ((y - linear(rounded, decoded)).double().abs() <= 1.01 * (columns + 5) * UNIT * reach + 2 * tiny).all()


def test_the_largest_sums_stay_whole() -> None:
    """Every product at its largest over the most columns: a sum of 2^31 less a few."""
    columns = (1 << 16) - 1
    W, x = torch.ones(2, columns), torch.full((1, columns), -1.0)
    W[1] = -1
    kernel = Int8Products(Input(activation("int8-tensor-static"), torch.tensor([-1.0]), torch.tensor([0.0])))
    y = kernel.run(x, kernel.prepare(coded(W), torch.float32))
    expected = columns * coded(W).decode()[:, 0].double() * kernel.input.round(x)[0, 0].double()
    torch.testing.assert_close(y[0].double(), expected, rtol=4 * UNIT, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8-token", "int8-tensor-static"])
def test_a_linear_multiplies_integers_wherever_it_may(dtype: torch.dtype, name: str) -> None:
    q, bias, x = coded(gaussian(48, 80)), gaussian(48).to(dtype), gaussian(3, 5, 80, seed=1).to(dtype)
    layer = QLinear.of(q, bias, dtype, rounding(name))
    assert layer.kernel(x).name == "int8-products"
    y = layer(x)
    layer.use("reference")
    assert layer.kernel(x) is REFERENCE
    expected = layer(x)
    assert y.dtype == expected.dtype == dtype
    error = (y.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert 0 < float(error) < (2e-6 if dtype == torch.float32 else 2e-2)
    layer.use("auto")
    assert layer.kernel(x.clone().requires_grad_(True)) is REFERENCE  # gradients pass through decoded weights


@pytest.mark.parametrize("name", ["int8-token", "int8-tensor-static"])
def test_a_token_that_is_none_stays_alone(name: str) -> None:
    x = gaussian(MANY_ON_CPU, 80)
    layer = QLinear.of(coded(gaussian(48, 80)), input=rounding(name))
    assert layer.kernel(x).name == "int8-products" != layer.kernel(x[1:]).name
    others = layer(x)
    x[2, 3] = torch.nan
    y = layer(x)
    assert y[2].isnan().all()
    keep = [0, 1, *range(3, MANY_ON_CPU)]
    assert torch.equal(y[keep], others[keep])


@pytest.mark.parametrize(
    ("weights", "inputs", "columns"),
    [("int8-row", "int8-token", 64), ("int8-g32-sym", "int8-token", 64), ("int4-row-sym", "int8-token", 64),
     ("int8-row-sym", "int8-g32", 64), ("int8-row-sym", "fp8-e4m3-token", 64), ("int8-row-sym", "int8-token", 1)],
)  # fmt: skip
def test_what_is_no_integer_product_is_left_to_others(weights: str, inputs: str, columns: int) -> None:
    q, x = coded(gaussian(16, columns), weights), torch.zeros(MANY_ON_CPU, columns)
    assert choose("auto", q.spec(), x, rounding(inputs)).name != "int8-products"
    assert choose("auto", q.spec(), x, rounding(inputs)) is choose("auto", q.spec(), x)


def test_it_is_listed_as_usable() -> None:
    assert dict((name, here) for name, here, _ in usable())["int8-products"]
