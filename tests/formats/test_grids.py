"""Grids against published tables, torch's own small floats, and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm

from lowbit.errors import RecipeError
from lowbit.formats.grids import IntGrid, Table, table_values

# QLoRA's table as printed, to seven digits.
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
TABLES = ["nf4", "fp4", "dynamic8", "ternary", "e2m1", "e3m0", "e3m2", "e4m3", "e5m2"]


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


@pytest.mark.parametrize("name", ["nf5", "e9m1", "e4m4", "", "e2m1x"])
def test_an_unknown_table_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="unknown table"):
        table_values(name)
