"""HQQ against its definition in numpy, a brute-force search, and its own promises."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lowbit.calibration.stats import Stats
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.format import Format
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Affine, QTensor, Raw
from lowbit.methods.base import Weight
from lowbit.methods.hqq import Hqq
from lowbit.methods.rtn import Rtn

NOTHING = Stats("layer.in", {})


def weight(rows: int = 16, columns: int = 256, seed: int = 0) -> Weight:
    """Student-t(4): outliers in every group."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    chi = torch.randn(4, rows, columns, generator=generator).square().mean(0).sqrt()
    return Weight("layer.proj", normal / chi)


def loss(fmt: Format, w: Weight, q: QTensor) -> torch.Tensor:
    """Its own criterion: the sum of squared errors of every block."""
    return fmt.block.split((q.decode() - w.matrix).square()).sum(-1)


def zero_of(q: QTensor) -> torch.Tensor:
    assert isinstance(q, Affine)
    assert isinstance(q.zero, Raw)
    return q.zero.decode()


def textbook(x: np.ndarray, start: float, top: int, o: dict[str, float]) -> float:
    """One block, in units of its step: the zero of the least sum of squares among those visited."""
    visited = []
    for shift in {1: [0.0], 2: [0.0, -0.5], 3: [0.0, 1 / 3, -1 / 3]}[int(o["starts"])]:
        z, beta = float(np.float16(start + shift)), o["beta"]
        for _ in range(int(o["iterations"]) + 1):
            q = np.clip(np.round(x + z), 0, top)
            d = x - (q - z)
            visited.append((np.sum(d**2), z))
            e = np.sign(d) * np.maximum(np.abs(d) - np.maximum(np.abs(d), 1e-30) ** (o["p"] - 1) / beta, 0)
            z = float(np.float16(np.mean(q - (x - e))))
            beta *= o["kappa"]
    return min(visited)[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"p": 0.5, "beta": 3.0, "kappa": 1.2}, {"iterations": 3, "starts": 2}, {"beta": 20.0, "starts": 1}],
    ids=str,
)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_single_block_goes_where_the_textbook_goes(bits: int, options: dict[str, float]) -> None:
    fmt = preset(f"int{bits}-g64-z16")
    o = {"p": 0.7, "beta": 1.0, "kappa": 1.01, "iterations": 6, "starts": 3} | options
    moved = 0
    for seed in range(8):
        w = Weight("w", torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)))
        start = fmt.fit(w.matrix)
        x = (w.matrix / start.step).double().numpy()[0]
        expected = textbook(x, float(start.zero), 2**bits - 1, o)
        got = float(zero_of(Hqq(**options)(w, NOTHING, fmt)))
        assert got == pytest.approx(expected, abs=4e-3 * 2**bits / 4)  # float16, and float32 sums
        moved += got != float(start.zero)
    assert moved >= 2


def test_outliers_that_a_clipped_range_cuts_off_are_forgiven() -> None:
    fmt, w = preset("int4-g64-z16"), weight(1, 64)
    w.matrix[0, 0] = 40.0
    ranges = torch.full((1, 1), -2.0), torch.full((1, 1), 2.0)
    w = dataclasses.replace(w, ranges=ranges)
    step, start = 4 / 15, 7.5
    x = (w.matrix / torch.tensor(step).half().float()).double().numpy()[0]
    o = {"p": 0.7, "beta": 1.0, "kappa": 1.01, "iterations": 1, "starts": 1}
    got = float(zero_of(Hqq(iterations=1, starts=1)(w, NOTHING, fmt)))
    assert got == pytest.approx(textbook(x, start, 15, o), abs=0.02)
    # least squares alone would move the zero by the outlier's 142 steps / 64
    assert abs(got - start) < 1


@pytest.mark.parametrize(
    "name", ["int2-g64-z16", "int3-g50-z16", "int4-g64-z16", "int6-g128-z16", "int3-row-z16", "int3-tensor-z16"]
)
def test_no_block_is_worse_than_round_to_nearest_and_the_sum_is_better(name: str) -> None:
    fmt, w = preset(name), weight(24, 230)
    rtn, hqq = loss(fmt, w, Rtn()(w, NOTHING, fmt)), loss(fmt, w, Hqq()(w, NOTHING, fmt))
    assert (hqq <= rtn * (1 + 1e-5)).all()
    assert hqq.sum() < rtn.sum() * 0.998


def test_it_gets_a_good_part_of_what_the_best_zero_would_gain() -> None:
    fmt, w = preset("int3-g64-z16"), weight(8, 256)
    params = fmt.fit(w.matrix)
    rtn, hqq = loss(fmt, w, Rtn()(w, NOTHING, fmt)), loss(fmt, w, Hqq()(w, NOTHING, fmt))
    least = hqq.clone()
    for shift in torch.linspace(-2, 2, 81):
        moved = dataclasses.replace(params, zero=fmt.round_zero(params.zero + shift))
        least = torch.minimum(least, loss(fmt, w, fmt.encode(w.matrix, moved)))
    assert (rtn - hqq).sum() > 0.7 * (rtn - least).sum()


def test_a_ragged_group_is_fitted_to_its_own_weights_alone() -> None:
    fmt, w = preset("int3-g64-z16"), weight(8, 72)
    whole = zero_of(Hqq(iterations=1)(w, NOTHING, fmt))
    last = zero_of(Hqq(iterations=1)(Weight("w", w.matrix[:, 64:].contiguous()), NOTHING, preset("int3-g8-z16")))
    assert torch.equal(whole[:, 1:], last)


def test_weights_times_a_power_of_two_have_the_same_codes() -> None:
    fmt, w = preset("int4-g64-z16"), weight()
    small = Hqq()(Weight("w", w.matrix / 64), NOTHING, fmt)
    assert torch.equal(small.decode() * 64, Hqq()(w, NOTHING, fmt).decode())


def test_without_iterations_it_is_round_to_nearest() -> None:
    fmt, w = preset("int4-g64-z16"), weight()
    for clip in (0, 10):
        ours, rtn = Hqq(iterations=0, starts=1, clip=clip)(w, NOTHING, fmt), Rtn(clip=clip)(w, NOTHING, fmt)
        assert torch.equal(ours.decode(), rtn.decode())


def test_ranges_found_by_an_earlier_step_give_the_scale() -> None:
    fmt, w = preset("int4-g64-z16"), weight()
    ranges = torch.full((16, 4), -2.0), torch.full((16, 4), 2.0)
    q = Hqq()(dataclasses.replace(w, ranges=ranges), NOTHING, fmt)
    assert isinstance(q, Affine)
    assert torch.equal(q.scale.decode(), torch.full((16, 4), 4 / 15).half().float())


def test_it_stores_a_16_bit_scale_and_zero() -> None:
    fmt, w = preset("int4-g64-z16"), weight()
    q = Hqq()(w, NOTHING, fmt)
    assert q.bits_per_weight == 4.5
    assert q.nbytes == fmt.nbytes((16, 256))
    assert Hqq().needs == frozenset()


def test_zeros_and_constants_survive() -> None:
    w = torch.zeros(4, 128)
    w[1], w[2] = 3.0, -3.0
    got = Hqq()(Weight("w", w), NOTHING, preset("int4-g64-z16")).decode()
    torch.testing.assert_close(got, w, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "fix"), [("int4-g64", "int4-g64-z16"), ("int4-g64-sym", "rtn"), ("nf4", "rtn"), ("ternary", "rtn")]
)
def test_formats_without_fractional_zeros_are_refused_with_one_that_has_them(name: str, fix: str) -> None:
    with pytest.raises(FormatError, match=r"layer\.proj") as caught:
        Hqq()(weight(), NOTHING, preset(name))
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "options",
    [{"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": 0.9}, {"iterations": -1}, {"starts": 0}, {"clip": -1}],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        Hqq(**options)
