"""Products with packed weights on every processor's path: exact weights, float32 sums, no other row's codes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from lowbit import _native
from lowbit.formats.blocks import Block
from lowbit.formats.format import Stored
from lowbit.formats.pack import Codes
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Affine, Lookup, QTensor, Raw
from lowbit.runtime.kernels import REFERENCE, choose
from lowbit.runtime.kernels.packed import FEW_TOKENS, PACKED, together
from lowbit.runtime.linear import QLinear

FORMATS = [
    "int2-g16", "int3-g32", "int4-g64", "int4-g48", "int4-row-sym", "int4-tensor", "int5-g64", "int6-g32-sym",
    "int7-row", "int8-g32", "int4-g64-z16",
    "nf4", "nf4-dq", "fp4", "mxfp4", "nvfp4", "fp8-e4m3", "fp6-e3m2-g32", "quantile3-g64",
    "q4_0", "q4_1", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q6_k", "float16", "bfloat16",
]  # fmt: skip
SHAPES = [(41, 208), (9, 100), (1, 7)]


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LOWBIT_ISA", request.param)
    return str(request.param)


def quantized(name: str, shape: tuple[int, int]) -> QTensor:
    """Weights with a shift, so that zeros matter."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.02
    if name in ("float16", "bfloat16"):
        W[0, 0] = 2.0**-24 if name == "float16" else 2.0**-130  # no normal numbers
        return Raw.of(W.to(getattr(torch, name)))
    fmt = preset(name)
    return fmt.encode(W, fmt.fit(W))


def inputs(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))


def product(x: torch.Tensor, q: QTensor) -> torch.Tensor:
    assert PACKED.takes(q.spec(), x)
    return PACKED.run(x, PACKED.prepare(q, x.dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_plain_decoding_and_products_differ_by_the_order_of_sums(name: str, isa: str) -> None:
    for shape in SHAPES:
        q = quantized(name, shape)
        weights, out = q.decode(), torch.full(shape, torch.nan)
        PACKED.prepare(q, torch.float32).native.decode(0, out.numpy(), 1)
        assert torch.equal(out, weights), shape
        x = inputs(FEW_TOKENS + 1, shape[1])
        exact = x.double() @ weights.double().T
        together = product(x[:11], q)  # 8 + 2 + 1 tokens at once
        assert float((together - exact[:11]).abs().max() / exact.abs().max()) < 2e-6, shape
        assert all(torch.equal(product(x[i], q), together[i]) for i in (0, 9, 10)), shape
        torch.testing.assert_close(product(x, q), linear(x, weights))


def test_threads_do_not_change_a_bit(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = quantized("int4-g64", (301, 576)), inputs(3, 576)
    alone = product(x, q)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(product(x, q), alone)


def test_weights_of_one_input_are_multiplied_together_as_alone(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four-bit codes meet their inputs in another order than others do."""
    qs = [quantized(name, (rows, 208)) for name, rows in (("q4_0", 41), ("float16", 7), ("int4-row-sym", 150))]
    states = [PACKED.prepare(q, torch.float32) for q in qs]
    x = inputs(3, 208).view(3, 1, 208)
    alone = [product(x, q) for q in qs]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = together(x, states)
    assert [y.shape for y in found] == [(3, 1, 41), (3, 1, 7), (3, 1, 150)]
    assert all(map(torch.equal, found, alone))


def test_what_lies_behind_a_ragged_row_is_not_multiplied(isa: str) -> None:
    """The next row's codes stand for no numbers, and they share a chunk of 16 columns with this one's last."""
    for columns in (20, 36):
        codes = torch.zeros(3, columns, dtype=torch.uint8)
        codes[0], codes[1] = 1, 15
        table = torch.arange(16.0)
        table[15] = torch.nan
        q = Lookup((3, columns), Codes.of(codes, 16), table, None, Block("row"))
        y = product(torch.ones(1, columns), q)[0]
        assert y[[0, 2]].tolist() == [columns, 0]
        assert torch.isnan(y[1])


def test_zeros_of_codes_and_blocks_that_fill_rows(isa: str) -> None:
    """Blocks of the flattened matrix are groups where rows are multiples of them."""
    shape, g = (6, 96), torch.Generator().manual_seed(2)
    codes = Codes.of(torch.randint(0, 16, shape, generator=g).to(torch.uint8), 16)
    scale = Raw.of(torch.rand(18, 1, generator=g).to(torch.float16))
    zero = Codes.of(torch.randint(0, 16, (1, 18), generator=g).to(torch.uint8), 16)
    x = inputs(2, 96)
    for q in (
        Affine(shape, codes, scale, zero, Block("flat", (32,))),
        Affine(shape, codes, scale, None, Block("flat", (32,))),
    ):
        torch.testing.assert_close(product(x, q), linear(x, q.decode()))
    assert not PACKED.takes(dataclasses.replace(q, block=Block("flat", (72,))).spec(), x)


def test_bfloat16_is_as_exact_as_its_outputs() -> None:
    q = quantized("int4-g64", (48, 128))
    for tokens in (2, FEW_TOKENS + 1):
        x = inputs(tokens, 128).bfloat16()
        y = product(x, q)
        assert y.dtype == torch.bfloat16
        expected = x.double() @ q.decode().double().T
        assert float((y - expected).abs().max() / expected.abs().max()) < 1e-2


@pytest.mark.parametrize("name", ["int4-g40", "ternary"])
def test_what_it_cannot_read_goes_to_the_reference(name: str) -> None:
    assert choose("auto", quantized(name, (8, 80)).spec(), inputs(1, 80)) is REFERENCE


def test_codes_stay_where_they_are() -> None:
    """No copy of the weight is kept: the last rows alone have one, with room behind it."""
    q = quantized("int4-g64", (64, 128))
    assert isinstance(q, Affine)
    state, x = PACKED.prepare(q, torch.float32), inputs(1, 128)
    q.codes.data[:32] = 0
    torch.testing.assert_close(PACKED.run(x, state), linear(x, q.decode()))


def test_sizes_that_disagree_are_refused_before_memory_is_read() -> None:
    codes, scale, table = torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2), torch.zeros(16)
    good: tuple[Any, ...] = (codes, 64, 4, 32, scale, None, None, table)
    made_of: Any = _native.Packed
    made = made_of(*good)
    for at, wrong in (
        (1, 66), (1, 0), (2, 5), (2, 0), (3, 24), (3, 0), (4, scale[:7].clone()), (4, scale.double()),
        (5, torch.ones(8, 3)), (6, torch.ones(2, 2)), (7, table[:15].clone()),
    ):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011 - each has its own words
            made_of(*good[:at], wrong, *good[at + 1 :])
    x, y = torch.ones(2, 64), torch.empty(2, 8)
    other = _native.Packed(codes[:, :16].contiguous(), 32, 4, 32, torch.ones(8, 1), None, None, table)
    for natives, inputs, outputs in (
        ((made,), 64 + 32, 8), ((made,), 128, 15), ((made, other), 128, 32), ((), 128, 16), ((made, made), 128, 16),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"x is|y is|columns|bias"):
            _native.packed_multiply(natives, (0,) * len(natives), x.data_ptr(), inputs, y.data_ptr(), outputs, 1)
    for data in (torch.ones(2, 8), torch.ones(2, 8, dtype=torch.int16), torch.ones(2, 0, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"float16 or bfloat16|no columns"):
            _native.Packed(data)
    with pytest.raises(ValueError, match="rows"):
        made.decode(7, torch.empty(2, 64).numpy(), 1)


def test_a_linear_keeps_what_each_kernel_made_and_its_copies_make_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantized("int4-g64", (32, 128))
    layer, x, asked = QLinear.of(q), inputs(2, 128), 0

    def counted(*arguments: object) -> object:
        nonlocal asked
        asked += 1
        return choose(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("lowbit.runtime.linear.choose", counted)
    expected = layer(x)
    state = layer._states["packed"]
    assert torch.equal(layer(x), expected)
    assert asked == 1
    layer(x.requires_grad_())  # by the reference
    assert layer.kernel(x) is REFERENCE
    assert layer._states["packed"] is state
    twin = copy.deepcopy(layer)
    assert not twin._states
    assert torch.equal(twin(x.detach()), expected)


def test_zero_points_of_sixteen_bits() -> None:
    fmt = dataclasses.replace(preset("int8-row"), zero=Stored(torch.float16))
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)) + 0.3
    q = fmt.encode(W, fmt.fit(W))
    torch.testing.assert_close(product(inputs(1, 64), q), linear(inputs(1, 64), q.decode()))
