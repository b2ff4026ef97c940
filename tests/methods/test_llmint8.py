"""LLM.int8(): which columns stay in 16 bit, and what that does to the error of a product in 8."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from lowbit.calibration.stats import AbsMax, Stats
from lowbit.errors import CalibrationError, FormatError, RecipeError
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Affine, Columns, QTensor, Raw, Sum
from lowbit.methods.base import Weight
from lowbit.methods.llmint8 import LlmInt8, outlier_columns
from lowbit.methods.rtn import Rtn

INT8 = preset("int8-row-sym")
OUTLIERS = [3, 77, 78, 200, 404, 511]


def inputs(size: float = 42.0) -> torch.Tensor:
    """Gaussian tokens, six channels ``size`` times as large."""
    x = torch.randn(600, 512, generator=torch.Generator().manual_seed(0))
    x[:, OUTLIERS] *= size
    return x


def seen(x: torch.Tensor) -> Stats:
    stats = Stats.of("layer.in", {AbsMax}, x.shape[1])
    stats.update(x)
    return stats


def weight(rows: int = 128) -> Weight:
    return Weight("layer.proj", torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)))


def product_error(q: QTensor, x: torch.Tensor, w: Weight) -> float:
    """Relative squared error when inputs are rounded to int8, one scale a token, but for those of kept columns."""
    kept = [int(j) for term in q.terms if isinstance(term, Columns) for j in term.index] if isinstance(q, Sum) else []
    rest = x.double().numpy().copy()
    rest[:, kept] = 0
    step = np.abs(rest).max(1, keepdims=True) / 127
    rounded = np.round(rest / step) * step
    rounded[:, kept] = x[:, kept]
    exact = x.double().numpy() @ w.matrix.double().numpy().T
    return float(np.square(rounded @ q.decode().double().numpy().T - exact).sum() / np.square(exact).sum())


def test_the_injected_channels_are_found_and_their_damage_is_gone() -> None:
    x, w = inputs(), weight()
    plain = LlmInt8(threshold=1e30)(w, seen(x), INT8)
    split = LlmInt8(relative=True)(w, seen(x), INT8)
    assert isinstance(split, Sum)
    rest, kept = split.terms
    assert isinstance(rest, Affine)
    assert isinstance(kept, Columns)
    assert kept.index.tolist() == OUTLIERS
    assert product_error(plain, x, w) == pytest.approx(1.3e-3, rel=0.1)
    assert product_error(split, x, w) < 6e-6


def test_the_sum_holds_16_bit_columns_and_codes_fitted_to_the_others() -> None:
    x, w = inputs(), weight()
    w.matrix[:, 77] = 30.0  # in the range of a row it would ruin the others
    q = LlmInt8(relative=True)(w, seen(x), INT8)
    got = q.decode()
    others = [j for j in range(512) if j not in OUTLIERS]
    assert torch.equal(got[:, OUTLIERS], w.matrix[:, OUTLIERS].half().float())
    assert torch.equal(got[:, others], INT8.encode(w.matrix[:, others], INT8.fit(w.matrix[:, others])).decode())
    assert q.nbytes == INT8.nbytes((128, 512)) + 6 * (2 * 128 + 2)


def test_an_absolute_threshold_counts_a_magnitude_that_reaches_it() -> None:
    absmax = torch.tensor([5.9, 6.0, 0.0, 61.0])
    assert outlier_columns(absmax, 6.0).tolist() == [1, 3]
    assert outlier_columns(absmax, math.inf).tolist() == []
    assert outlier_columns(absmax, 0.0).tolist() == [0, 1, 2, 3]
    assert outlier_columns(absmax, 10.0, relative=True).tolist() == [3]  # the median is 5.9
    q = LlmInt8()(weight(), seen(inputs(1.0)), INT8)
    assert isinstance(q, Affine)  # no channel of this Gaussian reaches 6


def test_no_threshold_is_16_bit_and_an_infinite_one_plain_int8() -> None:
    x, w = inputs(), weight()
    everything = LlmInt8(threshold=0.0)(w, seen(x), INT8)
    assert isinstance(everything, Raw)
    assert torch.equal(everything.decode(), w.matrix.half().float())
    assert everything.bits_per_weight == 16
    nothing = LlmInt8(threshold=math.inf)(w, seen(x), INT8)
    assert torch.equal(nothing.decode(), Rtn()(w, seen(x), INT8).decode())
    assert nothing.spec() == Rtn()(w, seen(x), INT8).spec()


def test_any_format_and_given_ranges_are_taken() -> None:
    x, w = inputs(), weight()
    q = LlmInt8(relative=True)(w, seen(x), preset("nf4"))
    assert isinstance(q, Sum)
    assert float((q.decode() - w.matrix)[:, OUTLIERS].abs().max()) < 2e-3
    limit = torch.full((128, 1), 1.27)
    clipped = LlmInt8(relative=True)(dataclasses.replace(w, ranges=(-limit, limit)), seen(x), INT8)
    assert isinstance(clipped, Sum)
    assert isinstance(clipped.terms[0], Affine)
    torch.testing.assert_close(clipped.terms[0].scale.decode(), limit / 127, rtol=1e-3, atol=0)


def test_a_column_beyond_float16_is_refused() -> None:
    x, w = inputs(), weight()
    w.matrix[:, 3] = 1e5
    with pytest.raises(FormatError, match=r"layer\.proj: a weight of 1e\+05"):
        LlmInt8(relative=True)(w, seen(x), INT8)


def test_it_needs_the_largest_magnitudes() -> None:
    assert LlmInt8().needs == {AbsMax}
    with pytest.raises(CalibrationError, match="AbsMax"):
        LlmInt8()(weight(), Stats("layer.in", {}), INT8)


@pytest.mark.parametrize("options", [{"threshold": -1.0}, {"threshold": float("nan")}, {"clip": -1}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        LlmInt8(**options)
