"""QLinear: computes x Wᵀ + b, moves without rounding, and is its own state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lowbit.errors import FormatError
from lowbit.formats.activation import Input, activation
from lowbit.formats.hadamard import random_signs
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Columns, Gathered, QTensor, Raw, Rotated, Sum
from lowbit.runtime.linear import QLinear

FORMATS = ["int4-g64", "int8-row-sym", "nf4", "nf4-dq", "nvfp4"]


def quantized(name: str, seed: int = 0) -> QTensor:
    fmt = preset(name)
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))
    return fmt.encode(W, fmt.fit(W))


def parts(q: QTensor) -> dict[str, torch.Tensor]:
    return {part.path: part.data for part in q.parts()}


X = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("policy", ["auto", "reference", "dense"])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_it_is_a_linear_with_the_decoded_weight(policy: str, bias: torch.Tensor | None) -> None:
    q = quantized("int4-g64")
    layer = QLinear.of(q, bias)
    layer.use(policy)
    torch.testing.assert_close(layer(X), linear(X, q.decode()) + (0 if bias is None else bias))
    assert (layer.in_features, layer.out_features) == (128, 64)
    assert f"bias={bias is not None}" in repr(layer)


def test_a_bias_is_added_after_a_kernel_for_few_tokens() -> None:
    q = quantized("int4-g64")
    layer = QLinear.of(q, BIAS.bfloat16(), torch.bfloat16)
    x = X[0].bfloat16()
    expected = linear(x, q.decode(torch.bfloat16)) + BIAS.bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "convert", [nn.Module.half, nn.Module.double, nn.Module.bfloat16, lambda m: m.to(torch.float16)]
)
def test_a_change_of_dtype_leaves_every_stored_part_as_it_is(name: str, convert: object) -> None:
    """float32 scales would lose half their bits, and their spec would no longer describe them."""
    q = quantized(name)
    before = {path: data.clone() for path, data in parts(q).items()}
    model = nn.Sequential(QLinear.of(q, BIAS), nn.Linear(64, 4))
    convert(model)  # type: ignore[operator]
    after = parts(model[0].weight.qtensor())  # type: ignore[union-attr, operator]
    assert all(torch.equal(before[path], after[path]) and before[path].dtype == after[path].dtype for path in before)
    dtype = model[1].weight.dtype
    assert dtype != torch.float32
    assert model[0].bias.dtype == model[0].weight.dtype == dtype  # type: ignore[union-attr]


def test_a_move_takes_the_parts_along() -> None:
    model = nn.Sequential(QLinear.of(quantized("nf4-dq"), BIAS))
    model.to("meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_what_a_kernel_prepared_is_dropped_when_weights_or_policy_change() -> None:
    old, new = quantized("int4-g64", 0), quantized("int4-g64", 1)
    layer = QLinear.of(old)
    layer.use("dense")
    layer(X)
    layer.load_state_dict(QLinear.of(new).state_dict())
    torch.testing.assert_close(layer(X), linear(X, new.decode()))
    layer.double()
    assert torch.equal(layer(X.double()), linear(X.double(), new.decode(torch.float64)))
    layer.use("reference")
    torch.testing.assert_close(layer(X), linear(X, new.decode()))


def test_one_layer_serves_two_dtypes() -> None:
    layer = QLinear.of(quantized("int4-g64"))
    layer.use("dense")
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert layer(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", FORMATS)
def test_state_makes_a_round_trip(name: str) -> None:
    q = quantized(name)
    first = QLinear.of(q, BIAS)
    second = QLinear(q.spec(), True, torch.float32, device="cpu")
    second.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {"bias"} | {f"weight.{path}" for path in parts(q)}
    assert torch.equal(first(X), second(X))
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(copied(X), first(X))


def test_parts_of_another_spec_are_refused_when_used() -> None:
    layer = QLinear.of(quantized("int4-g64"))
    layer.weight.codes = layer.weight.codes[:32]
    with pytest.raises(FormatError, match="codes"):
        layer(X)


def test_the_stored_bytes_are_those_of_the_qtensor() -> None:
    q = quantized("nf4-dq")
    state = QLinear.of(q).state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) == q.nbytes
    assert not list(QLinear.of(q).parameters())  # nothing for an optimizer to touch


# --- inputs ----------------------------------------------------------------------------------------------------------


def rotated() -> QTensor:
    q = quantized("int4-g64")
    return Rotated(q.shape, random_signs(128, 0), q, 64)


def gathered() -> QTensor:
    """Channel 1 in two halves, 2 and 3 as their mean, the others as they are."""
    index = torch.arange(128)[:, None].repeat(1, 2)
    scale = torch.tensor([1.0, 0.0]).repeat(128, 1)
    index[0], scale[0] = torch.tensor([1, 1]), torch.tensor([0.5, 0])
    index[1], scale[1] = torch.tensor([1, 1]), torch.tensor([0.5, 0])
    index[2], scale[2] = torch.tensor([2, 3]), torch.tensor([0.5, 0.5])
    inner = quantized("int4-g64")
    return Gathered((64, 130), index.to(torch.int32), Raw.of(scale), inner)


def nested() -> QTensor:
    inner = gathered()
    return Rotated(inner.shape, random_signs(130, 1), inner, 2)


TREES = {"plain": lambda: quantized("int4-g64"), "rotated": rotated, "gathered": gathered, "nested": nested}


@pytest.mark.parametrize("policy", ["auto", "reference", "dense"])
@pytest.mark.parametrize("tree", TREES)
def test_a_weight_in_another_basis_is_multiplied_there(tree: str, policy: str) -> None:
    q = TREES[tree]()
    layer = QLinear.of(q, BIAS)
    layer.use(policy)
    x = torch.randn(3, q.shape[1], generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(layer(x), linear(x, q.decode(), BIAS), rtol=1e-4, atol=1e-4)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), linear(x, q.decode(), BIAS), rtol=0, atol=0.3)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["int8-token", "int4-g32-sym", "fp8-e4m3-tensor", "int4-tensor-static"])
def test_what_is_rounded_is_what_the_inner_weight_meets(tree: str, name: str) -> None:
    q, fmt = TREES[tree](), activation(name)
    bounds = (torch.tensor([-2.5]), torch.tensor([2.0])) if fmt.static else ()
    rounding = Input(fmt, *bounds)
    layer = QLinear.of(q, BIAS, input=rounding)
    x = torch.randn(2, 3, q.shape[1], generator=torch.Generator().manual_seed(4))
    inner, entered = q, x
    while isinstance(inner, Rotated | Gathered):
        entered, inner = inner.enter(entered), inner.inner
    torch.testing.assert_close(layer(x), linear(rounding.round(entered), inner.decode(), BIAS))
    assert not torch.allclose(layer(x), linear(x, q.decode(), BIAS), atol=1e-3)
    assert name in repr(layer)


def test_outlier_columns_meet_inputs_that_are_not_rounded() -> None:
    """The rule of LLM.int8(): the int8 part sees rounded inputs, the 16-bit part exact ones."""
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    fmt, index = preset("int8-row-sym"), [5, 70]
    rest = W.clone()
    rest[:, index] = 0
    coded, raw = fmt.encode(rest, fmt.fit(rest)), Raw.of(W[:, index])
    x = X.clone()
    x[..., index] *= 300
    layer = QLinear.of(Sum((64, 128), (coded, Columns((64, 128), torch.tensor(index), raw))), None, input=INT8)
    others = x.clone()
    others[..., index] = 0
    expected = linear(INT8.round(others), coded.decode()) + x[..., index] @ W[:, index].T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-3)
    everything = QLinear.of(coded, None, input=INT8)
    assert float((layer(x) - linear(x, W)).abs().mean()) < 0.1 * float((everything(x) - linear(x, rest)).abs().mean())


INT8 = Input(activation("int8-token-sym"))


def test_a_static_range_moves_loads_and_keeps_its_dtype() -> None:
    q, fmt = quantized("int4-g64"), activation("int8-tensor-static")
    first = QLinear.of(q, BIAS, input=Input(fmt, torch.tensor([-1.7]), torch.tensor([1.3])))
    assert {"input.low", "input.high"} < first.state_dict().keys()
    second = QLinear(q.spec(), True, torch.float32, device="cpu", input=fmt)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(X), second(X))
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(copied(X), first(X))
    second.half()
    assert second.input is not None
    assert second.input.low.dtype == torch.float32  # type: ignore[union-attr]
    second.to("meta")
    assert {part.device.type for part in second.state_dict().values()} == {"meta"}
    assert QLinear.of(q, input=INT8).state_dict().keys() == QLinear.of(q).state_dict().keys()  # nothing to store
