"""Formats against published error figures, exact sizes, and their own promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError, RecipeError
from lowbit.formats.blocks import Block
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import IntGrid, Table
from lowbit.formats.presets import PRESETS, preset
from lowbit.formats.qtensor import Affine, Lookup

INTEGERS = sorted(name for name in PRESETS if name.startswith("int"))
OTHERS = sorted(set(PRESETS) - set(INTEGERS))
SHAPES = [(33, 100), (48, 172), (16, 256), (1, 7)]


def gaussian(rows: int = 64, columns: int = 4096, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def code(fmt: Format, w: torch.Tensor, clip: int = 0, importance: torch.Tensor | None = None) -> torch.Tensor:
    """What is left of a matrix."""
    return fmt.encode(w, fmt.fit(w, importance, clip)).decode()


def nmse(fmt: Format, w: torch.Tensor, clip: int = 0) -> float:
    return float((code(fmt, w, clip) - w).square().sum() / w.square().sum())


def block_error(fmt: Format, w: torch.Tensor, got: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    error = (got - w).square() if weights is None else (got - w).square() * weights
    return fmt.block.split(error).sum(-1)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("nf4", 4.5), ("fp4", 4.5), ("nf4-dq", 4.127), ("fp4-dq", 4.127), ("int4-g128", 4.15625), ("int4-g64", 4.3125),
        ("int3-g64", 3.296875), ("int2-g128", 2.140625), ("int4-g128-sym", 4.125), ("mxfp4", 4.25), ("mxfp8", 8.25),
        ("nvfp4", 4.5), ("fp4-e2m1", 4.5), ("int8-row", 8 + 24 / 4096), ("int8-row-sym", 8 + 16 / 4096),
        ("fp8-e4m3", 8 + 32 / 4096), ("ternary", 1.6 + 16 / 128),
    ],
)  # fmt: skip
def test_bits_per_weight_are_the_published_ones(name: str, bits: float) -> None:
    slack = 2e-3 if name in ("nf4-dq", "fp4-dq", "ternary") else 1e-5
    assert preset(name).bits_per_weight((4096, 4096)) == pytest.approx(bits, abs=slack)


@pytest.mark.parametrize("name", PRESETS)
def test_a_plan_knows_the_exact_bytes(name: str) -> None:
    fmt = preset(name)
    for shape in SHAPES:
        w = gaussian(*shape)
        q = fmt.encode(w, fmt.fit(w))
        assert q.nbytes == fmt.nbytes(shape)
        assert q.bits_per_weight == fmt.bits_per_weight(shape)
        assert q.shape == shape


# --- error -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "expected"), [(8, 3.5e-5), (6, 5.7e-4), (4, 0.0101), (3, 0.0464), (2, 0.253)])
def test_the_noise_ladder_of_asymmetric_groups_of_128(bits: int, expected: float) -> None:
    assert nmse(preset(f"int{bits}-g128"), gaussian()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("name", "entropy", "expected"),
    [("nf4", 3.884, 0.00845), ("fp4", 3.709, 0.01487), ("fp4-e2m1", 3.817, 0.01117), ("int4-g64-sym", 3.499, 0.01159),
     ("int4-g64", 3.754, 0.00830)],
)  # fmt: skip
def test_error_and_entropy_of_4_bit_formats_in_blocks_of_64(name: str, entropy: float, expected: float) -> None:
    fmt, w = dataclasses.replace(preset(name), block=Block("group", (64,))), gaussian()
    q = fmt.encode(w, fmt.fit(w))
    assert nmse(fmt, w) == pytest.approx(expected, rel=0.02)
    assert isinstance(q, Affine | Lookup)
    codes = q.codes.unpack().long()
    # The published entropies are of values: the two zeros of a float count as one.
    symbols = codes if isinstance(fmt.grid, IntGrid) else fmt.grid.lookup(codes).unique(return_inverse=True)[1]
    p = symbols.flatten().bincount().double() / symbols.numel()
    assert float(-(p[p > 0] * p[p > 0].log2()).sum()) == pytest.approx(entropy, rel=0.02)


@pytest.mark.parametrize(
    ("block", "nf4", "int4"),
    [(32, 0.00762, 0.00941), (64, 0.00845, 0.01159), (256, 0.00974, 0.01596), (1024, 0.01086, 0.02030)],
)
def test_error_by_block_size(block: int, nf4: float, int4: float) -> None:
    group, w = Block("group", (block,)), gaussian(256)
    assert nmse(dataclasses.replace(preset("nf4"), block=group), w) == pytest.approx(nf4, rel=0.02)
    assert nmse(dataclasses.replace(preset("int4-g64-sym"), block=group), w) == pytest.approx(int4, rel=0.02)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization_changes_the_error_by_less_than_a_percent(kind: str) -> None:
    assert nmse(preset(f"{kind}-dq"), gaussian()) == pytest.approx(nmse(preset(kind), gaussian()), rel=0.01)


# --- hard blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["int4-g128", "int8-row", "int4-g128-sym", "fp8-e4m3"])
def test_a_one_sided_group_comes_back(name: str, sign: int) -> None:
    w = sign * (10 + torch.rand(4, 128, generator=torch.Generator().manual_seed(0)))
    assert float(code(preset(name), w).mean()) == pytest.approx(sign * 10.5, abs=0.3)


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith(("int2", "int3", "tern"))])
def test_groups_of_zeros_stay_zero(name: str) -> None:
    w = gaussian(4, 256)
    w[1] = 0
    w[2, :128] = 0
    got = code(preset(name), w)
    if name.endswith("-dq"):  # a decoded scale is near zero, not zero; the codes are
        assert got[1].abs().max() < 1e-2
    else:
        assert not got[1].any()
        assert not got[2, :128].any()
    assert torch.equal(code(preset(name), torch.zeros(3, 70)), torch.zeros(3, 70))


@pytest.mark.parametrize(("name", "most"), [("int4-g128", 0.04), ("int8-g128", 0.02), ("nf4", 0.01), ("mxfp4", 0.02)])
def test_a_tiny_group_beside_normal_ones_keeps_its_precision(name: str, most: float) -> None:
    w = gaussian(4, 256)
    w[:, :128] *= 1e-6 / w[:, :128].abs().max()
    error = (code(preset(name), w) - w)[:, :128]
    assert float(error.square().sum() / w[:, :128].square().sum()) < most


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-dq", "fp8-e4m3", "mxfp4", "nvfp4"])
def test_power_of_two_scaling_commutes_with_coding(name: str) -> None:
    w = gaussian(8, 256)
    assert torch.equal(code(preset(name), w * 2.0**-20), code(preset(name), w) * 2.0**-20)


@pytest.mark.parametrize("name", PRESETS)
def test_values_that_are_not_finite_are_refused(name: str) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = gaussian(4, 256)
        w[2, 5] = bad
        with pytest.raises(FormatError, match="not finite"):
            preset(name).fit(w)


def test_a_scale_beyond_its_dtype_is_refused_with_a_way_out() -> None:
    w = gaussian(4, 128) * 1e6
    with pytest.raises(FormatError, match=r"does not fit its storage(.|\n)*nf4"):
        preset("int4-g128").fit(w)
    assert nmse(preset("nf4"), w) == pytest.approx(nmse(preset("nf4"), w / 1e6), rel=1e-3)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), (4, 0)], ids=str)
def test_only_matrices_are_taken(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="needs a matrix"):
        preset("int4-g64").nbytes(shape)


# --- coding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OTHERS, "int4-g64", "int3-g32-sym", "int8-row", "int2-tensor"])
def test_coding_what_was_coded_changes_nothing(name: str) -> None:
    fmt, w = preset(name), gaussian(16, 200)
    params = fmt.fit(w)
    once = fmt.encode(w, params)
    again = fmt.encode(once.decode(), params)
    torch.testing.assert_close(again.decode(), once.decode(), atol=0, rtol=0)


@pytest.mark.parametrize("name", [*OTHERS, "int4-g64", "int4-g64-sym", "int8-row", "int2-tensor"])
def test_every_value_goes_to_the_nearest_that_its_block_has(name: str) -> None:
    fmt, w = preset(name), gaussian(6, 70)
    params = fmt.fit(w)
    step = fmt.block.spread(params.step, (6, 70)).expand(6, 70)
    if isinstance(fmt.grid, IntGrid):
        zero = params.zero if params.zero is not None else torch.full_like(params.step, fmt.grid.offset)
        levels = torch.arange(fmt.grid.levels) - fmt.block.spread(zero, (6, 70)).expand(6, 70).unsqueeze(-1)
    else:
        values = torch.tensor(fmt.grid.values)
        levels = values[~values.isnan()].expand(6, 70, -1)
    choices = levels * step.unsqueeze(-1)
    least = (choices - w.unsqueeze(-1)).abs().amin(-1)
    error = (fmt.encode(w, params).decode() - w).abs()
    assert (error <= least + 1e-6 * step.abs()).all()


@pytest.mark.parametrize("name", ["int4-g64", "int3-g64-sym", "nf4", "fp8-e4m3", "ternary"])
def test_the_fast_snapper_is_snap(name: str) -> None:
    fmt, w = preset(name), gaussian(32, 256)
    w[3] = 0
    params = fmt.fit(w)
    step, zero = params.step.t().contiguous(), None if params.zero is None else params.zero.t().contiguous()
    snap, codes, out = fmt.snapper(step, zero), torch.empty(32), torch.empty(32)
    for block in range(len(step)):
        values = gaussian(1, 32, seed=block)[0]
        expected = fmt.snap(values, step[block], None if zero is None else zero[block])
        snap(values, block, codes, out)
        assert torch.equal(codes, expected.codes.float())
        assert torch.equal(out, expected.values)


def test_groups_fitted_apart_join_to_the_whole() -> None:
    fmt, w = preset("int4-g64"), gaussian(8, 150)
    whole = fmt.fit(w)
    joined = fmt.join([fmt.fit(w[:, i : i + 64]) for i in (0, 64, 128)])
    assert torch.equal(fmt.encode(w, joined).decode(), fmt.encode(w, whole).decode())
    with pytest.raises(FormatError, match="coded"):
        preset("nf4-dq").join([preset("nf4-dq").fit(w)])


def test_power_of_two_scales_round_down_as_ocp_says() -> None:
    w = torch.zeros(3, 32)
    w[:, 0] = torch.tensor([6.0, 7.9, 8.0])  # e2m1 tops out at 6 = 1.5 * 2^2
    assert preset("mxfp4").fit(w).step.flatten().tolist() == [1.0, 1.0, 2.0]


# --- clip search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["int2-g64", "int3-g64-sym", "int4-row", "nf4", "fp4-e2m1", "mxfp4", "fp8-e4m3"])
def test_a_search_never_increases_its_own_error(name: str, weighted: bool) -> None:
    fmt, w = preset(name), gaussian(16, 200)
    w[:, 5] *= 6
    importance = torch.rand(200, generator=torch.Generator().manual_seed(2)).square() if weighted else None
    before = block_error(fmt, w, code(fmt, w, 0), importance)
    after = block_error(fmt, w, code(fmt, w, 20, importance), importance)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < before.sum() * 0.999


@pytest.mark.parametrize("name", ["nvfp4", "nf4-dq"])
def test_a_search_helps_formats_whose_scales_are_coded(name: str) -> None:
    assert nmse(preset(name), gaussian(), clip=10) < 0.95 * nmse(preset(name), gaussian())


def test_a_search_does_not_depend_on_how_rows_are_chunked() -> None:
    fmt, w = preset("int3-g64"), gaussian(300, 2048)  # more than one chunk
    some = code(fmt, w[250:], 8)
    torch.testing.assert_close(code(fmt, w, 8)[250:], some, atol=0, rtol=0)


def test_importance_changes_the_choice() -> None:
    fmt, w = preset("int2-g64"), gaussian(8, 64)
    w[:, 0] = 8.0
    high, low = torch.ones(64), torch.ones(64)
    high[0], low[0] = 1e4, 1e-4
    outlier_matters, bulk_matters = code(fmt, w, 20, high), code(fmt, w, 20, low)
    assert (outlier_matters - w)[:, 0].abs().max() < (bulk_matters - w)[:, 0].abs().min()
    assert block_error(fmt, w, bulk_matters, low).sum() < block_error(fmt, w, outlier_matters, low).sum()


def test_importance_works_where_blocks_cross_rows() -> None:
    fmt = Format("flat", IntGrid(3, False), Block("flat", (48,)), Stored(torch.float32))
    w, importance = gaussian(7, 50), torch.linspace(0.1, 3, 50)
    before, after = (block_error(fmt, w, code(fmt, w, clip, importance), importance) for clip in (0, 20))
    assert (after <= before * (1 + 1e-4)).all()


def test_ternary_is_searched_without_being_asked() -> None:
    plain = dataclasses.replace(preset("ternary"), least_clip_steps=0)
    assert nmse(preset("ternary"), gaussian()) < 0.5 * nmse(plain, gaussian())
    assert nmse(preset("ternary"), gaussian()) == pytest.approx(0.19, abs=0.005)  # Lloyd-Max of 3 levels: 0.1902


# --- presets ---------------------------------------------------------------------------------------------------------


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


def test_an_integer_grid_without_a_scale_is_refused() -> None:
    fmt = Format("bare", IntGrid(4, True), Block("row"), None)
    w = gaussian(2, 8)
    with pytest.raises(FormatError, match="needs a scale"):
        fmt.encode(w, fmt.fit(w))


def test_a_table_without_a_scale_is_absolute() -> None:
    fmt = Format("bare", Table("e4m3"), Block("tensor"), None)
    w = torch.tensor([[1.0, -0.3, 500.0]])
    assert code(fmt, w).tolist() == [[1.0, -0.3125, 448.0]]
    assert fmt.nbytes((1, 3)) == 3
