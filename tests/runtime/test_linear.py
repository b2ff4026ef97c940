"""QLinear: computes x Wᵀ + b, moves without rounding, and is its own state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lowbit.errors import FormatError
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import QTensor
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
    assert torch.equal(layer(X), linear(X, q.decode()) + (0 if bias is None else bias))
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
    assert torch.equal(layer(X), linear(X, new.decode()))
    layer.double()
    assert torch.equal(layer(X.double()), linear(X.double(), new.decode(torch.float64)))
    layer.use("reference")
    assert torch.equal(layer(X), linear(X, new.decode()))


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
