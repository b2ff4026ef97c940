"""Clip search: it never loses by its own measure, and it finds what brute force finds."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from coding import block_error, code, gaussian, nmse

from lowbit.errors import FormatError
from lowbit.formats.blocks import Block
from lowbit.formats.clip import Importance
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import IntGrid
from lowbit.formats.presets import preset


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


# --- output error ----------------------------------------------------------------------------------------------------


def correlated_gram(d: int, outliers: int = 0) -> torch.Tensor:
    """Inputs whose covariance has eigenvalues 1/i in a random basis, some channels 40 times as large."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    x = (torch.randn(4 * d, d, generator=generator) * torch.arange(1, d + 1).float() ** -0.5) @ basis
    x[:, torch.randperm(d, generator=generator)[:outliers]] *= 40
    return x.t() @ x


def output_error(w: torch.Tensor, got: torch.Tensor, G: torch.Tensor) -> float:
    return float((((got - w) @ G) * (got - w)).sum())


def block_output_error(fmt: Format, w: torch.Tensor, got: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    """d G_bb dᵀ of every block, one by one."""
    n = fmt.block.size[0] if fmt.block.kind == "group" else w.shape[1]
    columns = []
    for start in range(0, w.shape[1], n):
        d, g = (got - w)[:, start : start + n], G[start : start + n, start : start + n]
        columns.append(((d @ g) * d).sum(1))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(
    "name", ["int2-g64", "int3-row", "int3-g64-sym", "int2-g64-z16", "nf4-g50", "quantile4-g64", "mxfp4"]
)
def test_a_search_by_the_gram_matrix_finds_the_least_output_error_of_each_block(name: str) -> None:
    fmt, w, G = preset(name), gaussian(12, 200), correlated_gram(200, 3)
    got = block_output_error(fmt, w, code(fmt, w, 8, G), G)
    blocks = fmt.block.split(w)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    factors = [1.0, 2.0, 0.5] if name == "mxfp4" else [1 - 0.6 * i / 8 for i in range(8)]
    table = fmt.fit(w).table  # estimated once, for the whole ranges
    tried = []
    for f in factors:
        params = dataclasses.replace(fmt.fit(w, ranges=(low * f, high * f)), table=table)
        tried.append(block_output_error(fmt, w, fmt.encode(w, params).decode(), G))
    torch.testing.assert_close(got, torch.stack(tried).amin(0), rtol=2e-3, atol=1e-5)


def test_a_diagonal_gram_matrix_is_an_importance() -> None:
    fmt, w = preset("int3-g64"), gaussian(16, 150)
    importance = torch.rand(150, generator=torch.Generator().manual_seed(3))
    assert torch.equal(code(fmt, w, 10, importance.diag()), code(fmt, w, 10, importance))


def test_output_error_asks_for_blocks_along_rows_and_for_a_matrix_that_fits() -> None:
    w = gaussian(8, 64)
    flat = Format("flat", IntGrid(3, False), Block("flat", (48,)), Stored(torch.float32))
    with pytest.raises(FormatError, match="along rows"):
        flat.fit(w, torch.eye(64), 5)
    for wrong in (torch.eye(63), torch.ones(63)):
        with pytest.raises(FormatError, match="64 inputs"):
            Importance.of(wrong, Block("row"), w)  # where annotations are not checked, fit comes here too


# --- ends apart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["none", "diagonal", "gram"])
@pytest.mark.parametrize("name", ["int2-g64", "int3-row", "int2-g64-z16"])
def test_ends_searched_apart_never_lose(name: str, importance: str) -> None:
    fmt, w, G = preset(name), gaussian(24, 200), correlated_gram(200)
    given = {"none": None, "diagonal": G.diagonal(), "gram": G}[importance]
    together, apart = (code(fmt, w, 12, given, ends=ends) for ends in ("together", "apart"))
    if importance == "gram":
        before, after = (block_output_error(fmt, w, got, G) for got in (together, apart))
    else:
        before, after = (block_error(fmt, w, got, given) for got in (together, apart))
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < before.sum() * 0.999


def test_ends_are_searched_in_turn_from_the_best_common_factor() -> None:
    fmt, w = preset("int2-g64"), gaussian(6, 128)
    blocks = fmt.block.split(w)
    low, high = blocks.amin(-1), blocks.amax(-1)
    factors = [1 - 0.6 * i / 6 for i in range(6)]
    best, least = (low, high), torch.full_like(low, math.inf)

    def offer(new: tuple[torch.Tensor, torch.Tensor]) -> None:
        nonlocal best, least
        error = block_error(fmt, w, code(fmt, w, ranges=new))
        best = torch.where(error < least, new[0], best[0]), torch.where(error < least, new[1], best[1])
        least = torch.minimum(error, least)

    for f in factors:
        offer((low * f, high * f))
    for _ in range(2):
        start = best[0]
        for f in factors:
            offer((start, high * f))
        end = best[1]
        for f in factors:
            offer((low * f, end))
    got = block_error(fmt, w, code(fmt, w, 6, ends="apart"))
    torch.testing.assert_close(got, least, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int3-g64-sym", "nf4-g64"])
def test_grids_with_one_end_have_nothing_to_search_apart(name: str) -> None:
    w = gaussian(8, 128)
    assert torch.equal(code(preset(name), w, 10, ends="apart"), code(preset(name), w, 10))


@pytest.mark.parametrize("outliers", [0, 4])
def test_asymmetric_clipping_beats_symmetric_clipping_at_two_bits(outliers: int) -> None:
    """LLMC, arXiv 2405.06001: an asymmetric grid wants its ends clipped apart, not at one magnitude as AWQ does."""
    fmt, w, G = preset("int2-g64"), gaussian(64, 256), correlated_gram(256, outliers)
    blocks = fmt.block.split(w)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    largest, best, least = torch.maximum(high, -low), (low, high), torch.full_like(low, math.inf)
    for i in range(20):
        limit = largest * (1 - 0.6 * i / 20)
        clipped = torch.maximum(low, -limit), torch.minimum(high, limit)
        error = block_output_error(fmt, w, code(fmt, w, ranges=clipped), G)
        best = tuple(torch.where(error < least, new, old) for new, old in zip(clipped, best, strict=True))
        least = torch.minimum(error, least)
    symmetric = output_error(w, code(fmt, w, ranges=best), G)
    apart = output_error(w, code(fmt, w, 20, G, ends="apart"), G)
    together = output_error(w, code(fmt, w, 20, G), G)
    assert apart <= 0.95 * symmetric
    assert apart <= 0.96 * together


# --- given ranges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4-g64", "int3-row-sym", "nf4", "int4-g64-z16", "quantile4-g64", "ternary"])
def test_given_ranges_are_used_instead_of_a_search(name: str) -> None:
    fmt, w = preset(name), gaussian(6, 150)
    blocks = fmt.block.split(w)
    half = blocks.amin(-1) / 2, blocks.amax(-1) / 2
    params = fmt.fit(w, None, 20, half)
    inside = torch.maximum(torch.minimum(w, fmt.block.spread(half[1], (6, 150))), fmt.block.spread(half[0], (6, 150)))
    if name == "quantile4-g64":
        assert torch.equal(params.step, fmt.fit(inside).step)
    else:
        plain = dataclasses.replace(fmt, least_clip_steps=0)
        assert torch.equal(fmt.encode(w, params).decode(), plain.encode(w, plain.fit(inside)).decode())


def test_given_ranges_are_widened_to_zero() -> None:
    w = 10 + torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    got = code(preset("int4-g64"), w, ranges=(torch.full((4, 1), 10.0), torch.full((4, 1), 11.0)))
    assert float(got.mean()) == pytest.approx(10.5, abs=0.3)


def test_ranges_of_another_shape_or_not_finite_are_refused() -> None:
    fmt, w = preset("int4-g64"), gaussian(4, 128)
    one = torch.ones(4, 2)
    for wrong in (one[:, :1], one.t(), one[:1]):
        with pytest.raises(FormatError, match="ranges of shapes"):
            fmt.fit(w, ranges=(-wrong, wrong))
    with pytest.raises(FormatError, match="not finite"):
        fmt.fit(w, ranges=(-one, one * math.inf))
