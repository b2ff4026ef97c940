"""AWQ gains what outlier channels cost, and next to nothing without them; the clip search keeps what pays."""

from __future__ import annotations

import pytest
import torch
from views import OneNorm, stats_of, with_outliers

from lowbit.calibration.stats import Gram
from lowbit.formats.presets import preset
from lowbit.methods.awq import output_error
from lowbit.methods.base import FoldScale, SetRanges, Weight, method
from lowbit.methods.clip import ranges
from lowbit.methods.rtn import Rtn


def _inputs(seed: int = 0, correlated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, W = torch.randn(1024, 256, generator=generator), torch.randn(128, 256, generator=generator)
    if correlated:
        basis = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
        x = (x * torch.arange(1, 257.0).rsqrt()) @ basis.t()
    return x, W


def _ratio(x: torch.Tensor, W: torch.Tensor, fmt: str) -> float:
    """Output error after the search over that of plain rounding."""
    stats = stats_of(x, "block.q")
    edits = list(method("awq")(OneNorm({"q": W}, fmt), stats))
    G, one = stats["block.q"][Gram].sum(), torch.ones(W.shape[1])
    scale = edits[0].scale if edits else one
    return float(output_error(W, scale, preset(fmt), G) / output_error(W, one, preset(fmt), G))


@pytest.mark.parametrize("fmt", ["int4-g128", "int3-g128"])
@pytest.mark.parametrize("correlated", [False, True])
def test_the_gain_is_in_the_outlier_channels(fmt: str, correlated: bool) -> None:
    x, W = _inputs(correlated=correlated)
    assert (0.9 if correlated else 0.97) <= _ratio(x, W, fmt) <= 1.0
    assert 0.15 <= _ratio(with_outliers(x, 3, 40.0)[0], W, fmt) <= 0.30


def test_channels_of_large_weights_are_scaled_down_where_inputs_say_nothing() -> None:
    x, W = _inputs()
    W[:, [7, 100, 201]] *= 8.0  # each sets the steps of its group
    assert _ratio(x, W, "int4-g128") < 0.8


def test_injected_outliers_cost_nothing_after_the_search() -> None:
    """The norm's gain up and the weights down by k: AWQ comes back to the error of the model without them."""
    x, W = _inputs()
    gain = torch.ones(256)
    gain[[3, 90, 200]] = 32.0
    fmt, one = preset("int4-g128"), torch.ones(256)

    def error(x: torch.Tensor, W: torch.Tensor, scale: torch.Tensor) -> float:
        return float(output_error(W, scale, fmt, stats_of(x, "s")["s"][Gram].sum()))

    plain, injected = error(x, W, one), error(x * gain, W / gain, one)
    (edit,) = method("awq")(OneNorm({"q": W / gain}, "int4-g128"), stats_of(x * gain, "block.q"))
    assert isinstance(edit, FoldScale)
    assert injected > 1.5 * plain
    assert error(x * gain, W / gain, edit.scale) < 1.1 * plain


@pytest.mark.parametrize("fmt", ["int4-g64", "nf4", "int3-row"])
def test_the_error_is_that_of_the_whole_product(fmt: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(400, 300, generator=generator) + 1, torch.randn(16, 300, generator=generator)  # two panels
    s = torch.rand(300, generator=generator) + 0.5
    rounded = preset(fmt).encode(W * s, preset(fmt).fit(W * s)).decode() / s
    expected = (x.double() @ (rounded - W).double().t()).square().sum()
    assert float(output_error(W, s, preset(fmt), x.t() @ x)) == pytest.approx(float(expected), rel=1e-4)


def test_the_clip_is_that_of_the_least_output_error_and_leaves_query_and_key_alone() -> None:
    x, W = _inputs(correlated=True)
    W = W * torch.exp(W.abs() / 2)  # heavy tails
    view = OneNorm({"q_proj": W, "v_proj": W}, "int2-g64")
    stats = stats_of(x, "block.q_proj", "block.v_proj")
    (edit,) = method("clip")(view, stats)
    assert isinstance(edit, SetRanges)
    assert edit.site == "block.v_proj"
    fmt, G = preset("int2-g64"), stats["block.v_proj"][Gram].sum()

    def error(ranges: tuple[torch.Tensor, torch.Tensor] | None) -> float:
        dW = Rtn()(Weight("v", W, ranges), stats["block.v_proj"], fmt).decode() - W
        return float((dW @ G).mul_(dW).sum())

    (together,) = method("clip", {"apart": False})(view, stats)
    assert isinstance(together, SetRanges)
    assert error(edit.ranges) < error(together.ranges) < 0.9 * error(None)


@pytest.mark.parametrize("fmt", ["int4-g64", "int3-g32-sym", "nf4", "int8-row"])
def test_ranges_of_fitted_grids_give_the_grids_back(fmt: str) -> None:
    _, W = _inputs()
    fitted = preset(fmt).fit(W, None, 10)
    again = preset(fmt).fit(W, ranges=ranges(preset(fmt), fitted))
    assert torch.allclose(fitted.step, again.step, rtol=2e-3)
    assert fitted.zero is None or torch.equal(fitted.zero, again.zero)  # type: ignore[arg-type]
