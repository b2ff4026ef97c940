"""Grids against published tables, torch's own small floats, and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lowbit.errors import RecipeError
from lowbit.formats.grids import Codebook, IntGrid, Quantile, Table, table_values

# QLoRA's table as printed, to seven digits.
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
TABLES = [
    "nf4",
    "af4",
    "fp4",
    "dynamic3",
    "dynamic8",
    "ternary",
    "e2m0",
    "e1m1",
    "e2m1",
    "e3m0",
    "e3m2",
    "e4m3",
    "e5m2",
]


def finite(name: str) -> torch.Tensor:
    values = torch.tensor(table_values(name), dtype=torch.float64)
    return values[~values.isnan()]


def test_nf4_is_the_published_table_and_its_formula() -> None:
    values = torch.tensor(table_values("nf4"), dtype=torch.float64)
    torch.testing.assert_close(values, torch.tensor(NF4, dtype=torch.float64), atol=1e-6, rtol=0)
    offset = 0.9677083  # 1 - (1/30 + 1/32) / 2, as printed
    positive = norm.ppf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -norm.ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    formula = sorted([*(positive / positive[0]), 0.0, *(negative / positive[0])])
    torch.testing.assert_close(values, torch.tensor(formula, dtype=torch.float64), atol=1.2e-7, rtol=0)


def test_af4_holds_the_medians_of_what_rounds_to_each_value() -> None:
    """Its definition: the least mean absolute error of N(0, 1) divided by the largest magnitude m of its block of 64.

    Given m, the others are a Gaussian cut off at m; F averages those over the density of m. Each side of the table is
    the best one between its end and zero, where -1, 0 and 1 are given: cells end at zero.
    """
    m = np.linspace(0.5, 7, 2001)
    within = 2 * norm.cdf(m) - 1
    density = norm.pdf(m) * within**63
    values = np.array(table_values("af4"))
    edges = (values[:-1] + values[1:]) / 2
    edges[[6, 7]] = 0

    def below(x: np.ndarray) -> np.ndarray:
        share = (norm.cdf(np.outer(x, m)) - norm.cdf(-m)) / within
        return np.trapezoid(share * density, m) / np.trapezoid(density, m)

    at_edge, at_value = below(edges), below(values)
    for i in [*range(1, 7), *range(8, 15)]:
        assert at_value[i] == pytest.approx((at_edge[i - 1] + at_edge[i]) / 2, abs=2e-5)


def test_fp4_is_bitsandbytes_and_not_e2m1() -> None:
    magnitudes = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert [12 * v for v in table_values("fp4")] == pytest.approx([*magnitudes, *(-m for m in magnitudes)])
    assert list(table_values("e2m1")) == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert math.copysign(1, table_values("e2m1")[8]) == -1


@pytest.mark.parametrize("name", FLOATS)
def test_small_floats_are_torchs_bit_patterns(name: str) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(FLOATS[name]).to(torch.float32)
    theirs[theirs.isinf()] = math.nan  # no code for an infinity is ever made
    ours = torch.tensor(table_values(name))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert torch.equal(ours.signbit()[~ours.isnan()], theirs.signbit()[~ours.isnan()])


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_to_small_floats_is_torchs_ties_included(name: str) -> None:
    values = finite(name).sort().values.to(torch.float32)
    x = torch.cat([(values[1:] + values[:-1]) / 2, torch.randn(5000, generator=torch.Generator().manual_seed(0))])
    x = x[x != 0]  # the sign of a zero is torch's to keep and ours to drop
    assert torch.equal(Table(name).nearest(x).to(torch.uint8), x.to(FLOATS[name]).view(torch.uint8))


def test_floats_of_other_widths() -> None:
    assert sorted(set(table_values("e3m0"))) == sorted({s * m for s in (1, -1) for m in (0, 0.25, 0.5, 1, 2, 4, 8, 16)})
    assert table_values("e3m2")[-1] == -28.0


def test_dynamic8_has_256_sorted_values_from_the_published_ends() -> None:
    values = table_values("dynamic8")
    assert len(set(values)) == 256
    assert list(values) == sorted(values)
    assert (values[0], values[-1], values[127]) == (pytest.approx(-0.99296875), 1.0, 0.0)
    assert min(v for v in values if v > 0) == pytest.approx(0.55e-6)


def test_the_dynamic_maps_of_other_widths() -> None:
    """A sign; per decade a run of zeros shorter by one leaves the fraction a bit more; then zero and one."""
    assert table_values("dynamic3") == pytest.approx(
        sorted([0, 1, *(s * v for s in (1, -1) for v in (0.055, 0.325, 0.775))])
    )
    for bits in range(3, 9):
        values = table_values(f"dynamic{bits}")
        assert len(set(values)) == 1 << bits
        assert list(values) == sorted(values)
        assert values[(1 << bits) // 2 - 1] == 0
        decades = [sum(10.0**-e > v > 10.0 ** -(e + 1) for v in values) for e in range(bits - 1)]
        assert decades == [1 << (bits - 2 - e) for e in range(bits - 1)]


def test_e8m0_is_powers_of_two_and_a_nan() -> None:
    values = table_values("e8m0")
    assert (values[0], values[127], values[254]) == (2.0**-127, 1.0, 2.0**127)
    assert len(values) == 256
    assert math.isnan(values[255])


@pytest.mark.parametrize("name", TABLES)
def test_nearest_is_the_argmin_of_the_distance(name: str) -> None:
    table, values = Table(name), finite(name)
    generator = torch.Generator().manual_seed(1)
    x = (2.4 * torch.rand(4000, generator=generator) - 1.2) * table.top
    if name == "dynamic8":
        x = x.clamp(-1, 1)
    x = torch.cat([x, torch.linspace(-1, 1, 201) * 1e-3 * table.top, values.to(torch.float32)])
    chosen = table.lookup(table.nearest(x)).double()
    assert torch.equal(table.round(x).double(), chosen)
    assert not chosen.isnan().any()
    least = (x.double().unsqueeze(1) - values).abs().amin(1)
    slack = 1.0 / 65535 if name == "dynamic8" else 1e-7 * table.top  # dynamic8 looks up on a lattice
    assert ((x.double() - chosen).abs() <= least + 2 * slack).all()
    if name != "dynamic8":
        assert torch.equal(chosen[-len(values) :].float(), values.float())


@pytest.mark.parametrize("name", ["nf4", "fp4", "ternary"])
def test_a_tie_goes_to_the_lower_value(name: str) -> None:
    values = finite(name).to(torch.float32).sort().values.unique()
    middles = (values[1:] + values[:-1]) / 2
    table = Table(name)
    assert torch.equal(table.lookup(table.nearest(middles)), values[:-1])


def test_zero_keeps_a_positive_sign_and_small_negatives_theirs() -> None:
    assert Table("e2m1").nearest(torch.tensor([0.0, -0.0, 1e-9, -1e-9])).tolist() == [0, 0, 0, 8]


def test_ternary_and_tops() -> None:
    assert table_values("ternary") == (-1.0, 0.0, 1.0)
    tops = {name: (Table(name).top, Table(name).power_of_two_top) for name in ("e2m1", "e4m3", "e5m2", "nf4")}
    assert tops == {"e2m1": (6, 4), "e4m3": (448, 256), "e5m2": (57344, 32768), "nf4": (1, 1)}
    assert (IntGrid(4, True).levels, IntGrid(4, True).offset, IntGrid(4, True).top) == (16, 8, 7.0)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_estimated_quantiles_are_the_middles_of_equal_shares(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 500, generator=generator) * 0.3 + 0.02
    n = (1 << bits) + 1
    edges = np.quantile(x.numpy(), np.arange(1, n + 1) / n)  # from the first to the last, the lowest share left out
    expected = (edges[:-1] + edges[1:]) / 2
    expected[np.abs(expected).argmin()] = 0
    expected = np.where(expected > 0, expected / expected.max(), expected / -expected.min())
    values = Quantile(bits).estimate(x)
    assert values.tolist() == pytest.approx(expected.tolist(), abs=2e-3)
    assert torch.equal(values, values.half().float())
    assert (len(values), values[0], values[-1], int((values == 0).sum())) == (1 << bits, -1, 1, 1)


def test_quantiles_of_a_large_weight_are_estimated_from_a_part_spread_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(300, 333, generator=torch.Generator().manual_seed(0))
    whole = Quantile(4).estimate(x)
    monkeypatch.setattr(Quantile, "_SAMPLE", 20_000)
    assert not torch.equal(Quantile(4).estimate(x), whole)
    torch.testing.assert_close(Quantile(4).estimate(x), whole, atol=0.05, rtol=0)


def test_quantiles_of_one_sided_and_of_constant_weights_are_finite() -> None:
    for x in (torch.rand(64, 64), -torch.rand(64, 64), torch.ones(8, 8), torch.zeros(8, 8), torch.ones(1, 1)):
        values = Quantile(4).estimate(x)
        assert values.isfinite().all()
        assert (values == 0).any()
        assert values.abs().max() <= 1


def test_a_stored_table_is_searched_as_a_named_one() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    book, table = Codebook.of(torch.tensor(table_values("nf4"))), Table("nf4")
    assert torch.equal(book.nearest(x), table.nearest(x))
    assert torch.equal(book.round(x), table.round(x))
    assert torch.equal(book.lookup(book.nearest(x)), book.round(x))


@pytest.mark.parametrize("name", ["nf5", "e9m1", "e4m4", "", "e2m1x", "dynamic2", "dynamic9", "quantile4"])
def test_an_unknown_table_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="unknown table"):
        table_values(name)
