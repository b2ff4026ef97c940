"""Round to nearest and its options."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibration.stats import Moments, Stats
from lowbit.errors import CalibrationError, RecipeError
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import QTensor
from lowbit.methods.base import Weight
from lowbit.methods.rtn import Rtn

NOTHING = Stats("layer.in", {})


def weight() -> Weight:
    w = torch.randn(16, 200, generator=torch.Generator().manual_seed(0))
    w[:, 7] *= 5
    return Weight("layer", w)


def moments(scale: torch.Tensor) -> Stats:
    stats = Stats.of("layer.in", {Moments}, 200)
    stats.update(torch.randn(400, 200, generator=torch.Generator().manual_seed(1)) * scale)
    return stats


def error(q: QTensor, w: Weight, weights: torch.Tensor | float = 1.0) -> float:
    return float(((q.decode() - w.matrix).square() * weights).sum())


@pytest.mark.parametrize("name", ["int4-g64", "nf4", "int8-row-sym", "mxfp4", "ternary"])
def test_plain_is_the_formats_own_nearest_codes(name: str) -> None:
    w, fmt = weight(), preset(name)
    q = Rtn()(w, NOTHING, fmt)
    assert torch.equal(q.decode(), fmt.encode(w.matrix, fmt.fit(w.matrix)).decode())
    assert Rtn().needs == frozenset()
    assert not Rtn().true_sequential


def test_more_ranges_searched_never_cost() -> None:
    w, fmt = weight(), preset("int2-g64")
    errors = [error(Rtn(clip=clip)(w, NOTHING, fmt), w) for clip in (0, 1, 20)]
    assert errors[0] == errors[1] > errors[2]


def test_weighted_lowers_the_error_that_inputs_see() -> None:
    w, fmt = weight(), preset("int3-g64")
    stats = moments(torch.rand(200, generator=torch.Generator().manual_seed(2)).square() * 4)
    seen = stats[Moments].mean_square()
    assert Rtn(weighted=True).needs == {Moments}
    weighted, plain = Rtn(weighted=True)(w, stats, fmt), Rtn(clip=20)(w, NOTHING, fmt)
    assert error(weighted, w, seen) < error(plain, w, seen)
    assert error(plain, w) < error(weighted, w)


def test_weighted_without_statistics_is_an_error_that_names_the_input() -> None:
    with pytest.raises(CalibrationError, match=r"layer\.in"):
        Rtn(weighted=True)(weight(), NOTHING, preset("int4-g64"))


def test_a_negative_search_is_refused() -> None:
    with pytest.raises(RecipeError, match="clip"):
        Rtn(clip=-1)
