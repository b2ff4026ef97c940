"""Every format's one spelling."""

from __future__ import annotations

import re

import pytest
import torch
from coding import gaussian, nmse
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import RecipeError
from lowbit.formats.blocks import Block
from lowbit.formats.format import Stored
from lowbit.formats.grids import Grid, IntGrid, Quantile, Table
from lowbit.formats.presets import PRESETS, preset

GROUP = Block("group", (96,))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_its_own_name(name: str) -> None:
    assert preset(name) is PRESETS[name]
    assert preset(name).name == name


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 8), st.integers(1, 300), st.booleans())
def test_any_group_size_is_a_format(bits: int, group: int, symmetric: bool) -> None:
    fmt = preset(f"int{bits}-g{group}{'-sym' if symmetric else ''}")
    assert (fmt.grid, fmt.block) == (IntGrid(bits, symmetric), Block("group", (group,)))
    w = gaussian(3, 50)
    q = fmt.encode(w, fmt.fit(w))
    assert q.nbytes == fmt.nbytes((3, 50))


@pytest.mark.parametrize(
    ("name", "hint"), [("int4-g12O", "int4-g128"), ("nf5", "nf4"), ("int9-row", "int8-row"), ("int4-g0", "int4-g")]
)
def test_an_unknown_spelling_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        preset(name)


@pytest.mark.parametrize(
    ("name", "grid", "block", "scale"),
    [
        ("nf4-g96", Table("nf4"), GROUP, torch.float16),
        ("af4-row", Table("af4"), Block("row"), torch.float16),
        ("fp4-tensor", Table("fp4"), Block("tensor"), torch.float16),
        ("fp4-e3m0-g96", Table("e3m0"), GROUP, torch.float16),
        ("fp3-e2m0-g96", Table("e2m0"), GROUP, torch.float16),
        ("fp6-e3m2-row", Table("e3m2"), Block("row"), torch.float16),
        ("fp8-e4m3-g96", Table("e4m3"), GROUP, torch.float32),
        ("fp8-e5m2-row", Table("e5m2"), Block("row"), torch.float32),
        ("dynamic5-g96", Table("dynamic5"), GROUP, torch.float16),
        ("quantile3-g96", Quantile(3), GROUP, torch.float16),
        ("ternary-row", Table("ternary"), Block("row"), torch.float16),
        ("int5-g96", IntGrid(5, False), GROUP, torch.float16),
        ("int5-g96-sym", IntGrid(5, True), GROUP, torch.float16),
    ],
)
def test_a_spelling_is_its_type_and_its_block(name: str, grid: Grid, block: Block, scale: torch.dtype) -> None:
    fmt = preset(name)
    assert (fmt.name, fmt.grid, fmt.block, fmt.scale, fmt.zero) == (name, grid, block, Stored(scale), None)
    assert bool(fmt.least_clip_steps) == name.startswith("ternary")


def test_a_16_bit_zero_is_a_matter_of_asymmetric_integers() -> None:
    fmt = preset("int4-g64-z16")
    assert (fmt.grid, fmt.zero, fmt.asymmetric) == (IntGrid(4, False), Stored(torch.float16), True)
    assert fmt.bits_per_weight((64, 4096)) == 4.5


def test_short_names_are_what_they_are_elsewhere() -> None:
    """bitsandbytes keeps float32 scales; -g64 is the same table with 16-bit ones."""
    w = gaussian(8, 256)
    for short, long in (("nf4", "nf4-g64"), ("fp4", "fp4-g64"), ("ternary", "ternary-g128")):
        a, b = preset(short), preset(long)
        assert (a.grid, a.block) == (b.grid, b.block)
        assert nmse(a, w) == pytest.approx(nmse(b, w), rel=1e-2)
    assert preset("nf4").bits_per_weight((64, 4096)) - preset("nf4-g64").bits_per_weight((64, 4096)) == 0.25
    assert preset("fp8-e4m3-row").scale == preset("fp8-e4m3").scale


@pytest.mark.parametrize(
    "name",
    ["fp4-e3m1-g64", "fp8-e0m7-g64", "fp2-e1m0-g64", "fp9-e4m4-g64", "nf4-g64-sym", "nf4-g64-z16", "int4-g64-z8",
     "int4-g64-sym-z16", "quantile9-g64", "quantile2-g64", "dynamic2-g64", "af4", "nf4-tile", "int1-row", "-g64", ""],
)  # fmt: skip
def test_other_spellings_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown format {re.escape(repr(name))}"):
        preset(name)
