"""Integer-only linears: within one step of the real result, and no floating-point tensor on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit.errors import FormatError
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import QTensor
from lowbit.runtime.integer import IntegerLinear, Scaling


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coded(W: torch.Tensor, name: str = "int8-row-sym") -> QTensor:
    fmt = preset(name)
    return fmt.encode(W, fmt.fit(W))


def real(q: QTensor, bias: torch.Tensor | None, codes: torch.Tensor, x: Scaling, y: Scaling) -> torch.Tensor:
    """The float path in float64: decode, multiply, add, round to the output's codes."""
    out = (codes.double() - x.zero) * x.scale @ q.decode(torch.float64).T
    out = out if bias is None else out + bias.double()
    return (torch.round(out / y.scale) + y.zero).clamp(-128, 127)


@pytest.mark.parametrize("shape", [(64, 96), (33, 100), (5, 2)])
@pytest.mark.parametrize("weights", ["int8-row-sym", "int8-tensor-sym"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_code_is_within_one_of_the_float_path(shape: tuple[int, int], weights: str, with_bias: bool) -> None:
    """Rows of very different size, skewed inputs, and an output range that some results leave."""
    W = gaussian(*shape, seed=0) * torch.logspace(-2, 1, shape[0])[:, None]
    bias = gaussian(shape[0], seed=1) if with_bias else None
    inputs = gaussian(50, shape[1], seed=2) + 0.7
    q, x = coded(W, weights), Scaling.of_range(float(inputs.min()), float(inputs.max()))
    codes = x.encode(inputs)
    outputs = x.decode(codes) @ q.decode().T + (0 if bias is None else bias)
    y = Scaling.of_range(float(outputs.quantile(0.01)), float(outputs.quantile(0.99)))
    ours, theirs = IntegerLinear.of(q, bias, x, y)(codes), real(q, bias, codes, x, y)
    difference = (ours - theirs).abs()
    assert ours.dtype == torch.int8
    assert float(difference.max()) <= 1
    assert float((difference > 0).double().mean()) < 0.01  # at ties only
    assert ours.unique().numel() > 20
    assert {-128, 127} <= set(ours.flatten().tolist())


class NoFloats(TorchDispatchMode):
    """Fails on any operation that takes or gives a floating-point tensor or number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            floating = value.is_floating_point() if isinstance(value, torch.Tensor) else isinstance(value, float)
            assert not floating, func
        self.seen.append(str(func))
        return out


def test_no_float_takes_part_between_codes_and_codes() -> None:
    x, y = Scaling.of_range(-3.0, 4.0), Scaling.of_range(-30.0, 20.0)
    linear = IntegerLinear.of(coded(gaussian(64, 96, seed=0)), gaussian(64, seed=1), x, y)
    codes = x.encode(gaussian(2, 25, 96, seed=2))
    with NoFloats() as trace:
        out = linear(codes)
    assert out.shape == (2, 25, 64)
    assert "aten._int_mm.default" in trace.seen
    with pytest.raises(AssertionError), NoFloats():
        x.decode(codes)  # the trace does see floats


def test_multipliers_are_31_bits_of_the_ratio() -> None:
    q, x, y = coded(gaussian(64, 96, seed=0)), Scaling(0.013, 4), Scaling(0.21, -3)
    linear = IntegerLinear.of(q, None, x, y)
    ratio = q.scale.decode(torch.float64)[:, 0] * x.scale / y.scale  # type: ignore[attr-defined]
    stored = linear.multiplier.double() * torch.exp2(-linear.shift.double())
    torch.testing.assert_close(stored, ratio, rtol=2**-30, atol=0)
    assert (linear.multiplier >= 2**30).all()
    assert linear.bias.dtype == linear.multiplier.dtype == torch.int32


def test_a_row_of_zeros_gives_the_zero_point() -> None:
    W = gaussian(4, 32, seed=0)
    W[2] = 0
    x, y = Scaling.of_range(-1.0, 1.0), Scaling.of_range(-10.0, 5.0)
    out = IntegerLinear.of(coded(W), None, x, y)(x.encode(gaussian(8, 32, seed=1)))
    assert (out[:, 2] == y.zero).all()
    assert out[:, 1].unique().numel() > 1


def test_scalings_cover_their_range_and_zero() -> None:
    s = Scaling.of_range(0.5, 2.0)
    assert s.encode(torch.tensor([0.0, 2.0, 9.0, -1.0])).tolist() == [-128, 127, 127, -128]
    torch.testing.assert_close(s.decode(s.encode(torch.tensor([1.0]))), torch.tensor([1.0]), rtol=0, atol=s.scale / 2)
    for empty in ((0.0, 0.0), (0.0, float("inf"))):
        with pytest.raises(FormatError, match="has no scale"):
            Scaling.of_range(*empty)


def test_what_integers_cannot_do_is_refused() -> None:
    x, y = Scaling.of_range(-1.0, 1.0), Scaling.of_range(-10.0, 5.0)
    for name in ("int8-row", "int8-g32-sym", "int4-row-sym", "nf4"):
        with pytest.raises(FormatError, match="symmetric int8"):
            IntegerLinear.of(coded(gaussian(8, 64, seed=0), name), None, x, y)
    with pytest.raises(FormatError, match="one input"):
        IntegerLinear.of(coded(gaussian(8, 1, seed=0)), None, x, y)
    with pytest.raises(FormatError, match=r"a sum over 140000 products can reach"):
        IntegerLinear.of(coded(torch.ones(1, 140_000)), None, x, y)
    with pytest.raises(FormatError, match=r"a sum over 32 products can reach"):
        IntegerLinear.of(coded(gaussian(4, 32, seed=0)), torch.full((4,), 1e6), Scaling(1e-3, 0), y)
    with pytest.raises(FormatError, match="ratios of scales"):
        IntegerLinear.of(coded(gaussian(4, 32, seed=0)), None, x, Scaling(1e-15, 0))
