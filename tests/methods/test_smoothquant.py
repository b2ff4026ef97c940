"""SmoothQuant: what it is invariant to, what it gains, and the alpha that it finds."""

from __future__ import annotations

import pytest
import torch
from views import OneNorm, stats_of, with_outliers

from lowbit.formats.activation import activation
from lowbit.formats.presets import preset
from lowbit.methods.base import FoldScale, method

ONE = torch.ones(256)


def _data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1024, 256, generator=generator), torch.randn(256, 256, generator=generator)


def _error(x: torch.Tensor, W: torch.Tensor, s: torch.Tensor, weights: str = "int8-tensor-sym") -> float:
    """The relative error of the outputs with weights and inputs in int8, one scale a tensor, after smoothing by s."""
    fmt = preset(weights)
    Q = fmt.encode(W * s, fmt.fit(W * s)).decode()
    y = x @ W.t()
    return float((activation("int8-tensor-sym").round(x / s) @ Q.t() - y).square().sum() / y.square().sum())


def _scale(x: torch.Tensor, W: torch.Tensor, **options: object) -> torch.Tensor:
    (edit,) = method("smoothquant", options)(
        OneNorm({"q": W}, "int8-tensor-sym", "int8-tensor-sym"), stats_of(x, "block.q")
    )
    assert isinstance(edit, FoldScale)
    return edit.scale


def test_at_one_half_the_result_does_not_depend_on_how_large_the_outliers_are() -> None:
    x, W = _data()
    plain = _error(x, W, _scale(x, W))
    for k in (8.0, 32.0, 64.0):
        gain = torch.ones(256)
        gain[:6] = k
        assert _error(x * gain, W / gain, _scale(x * gain, W / gain)) == pytest.approx(plain, rel=1e-3)
    assert _error(x * gain, W / gain, ONE) > 500 * plain  # unsmoothed, they ruin the scale of all others


def test_activation_outliers_are_smoothed_best_near_one_half() -> None:
    x, W = _data()
    x, _ = with_outliers(x, 3, 40.0)
    unsmoothed, half, most = (_error(x, W, s) for s in (ONE, _scale(x, W), _scale(x, W, alpha=0.85)))
    assert half < most < unsmoothed
    assert unsmoothed > 10 * half


def test_linears_that_share_a_norm_share_its_scale() -> None:
    x, W = _data()
    V = 3 * W.roll(1, 0)
    view = OneNorm({"q": W, "v": V})
    (edit,) = method("smoothquant")(view, stats_of(x, "block.q", "block.v"))
    assert isinstance(edit, FoldScale)
    largest = torch.maximum(W.abs().amax(0), V.abs().amax(0))
    assert torch.allclose(edit.scale, (x.abs().amax(0) / largest).sqrt(), rtol=1e-5)


def test_auto_is_at_most_the_best_fixed_alpha_and_differs_with_the_outliers() -> None:
    x, W = _data()
    hard, _ = with_outliers(x, 3, 40.0)
    grid = [i / 10 for i in range(11)]

    def best(inputs: torch.Tensor) -> tuple[float, float]:
        losses = [_error(inputs, W, _scale(inputs, W, alpha=a)) for a in grid]
        return min(losses), grid[losses.index(min(losses))]

    found = [_scale(inputs, W, alpha="auto") for inputs in (x, hard)]
    for inputs, scale in zip((x, hard), found, strict=True):
        # found on a sample of 256 of these 1024 tokens
        assert _error(inputs, W, scale) <= 1.05 * best(inputs)[0]
    assert best(x)[1] != best(hard)[1]


def test_the_criteria_reconcile_linears_that_want_different_alphas() -> None:
    x, W = _data()
    x, chosen = with_outliers(x, 3, 40.0)
    peaked = W.clone()
    peaked[:, chosen] *= 30  # this one would rather take less
    view = OneNorm({"q": W, "v": peaked}, "int8-tensor-sym", "int8-tensor-sym")
    stats = stats_of(x, "block.q", "block.v")
    by = {
        c: next(method("smoothquant", {"alpha": "auto", "criterion": c})(view, stats)) for c in ("min", "mean", "max")
    }
    strength = {c: float(edit.scale[chosen].mean() / edit.scale.median()) for c, edit in by.items()}
    assert strength["min"] <= strength["mean"] <= strength["max"]
    assert strength["min"] < strength["max"]


def test_channels_that_were_always_zero_keep_their_scale() -> None:
    x, W = _data()
    x[:, 7] = 0
    scale = _scale(x, W)
    assert scale[7] == 1.0
    assert bool(torch.isfinite(scale).all())
