"""Series expansion against its bound, its published errors, and integer arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch

from lowbit.calibration.stats import Stats
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Affine, QTensor, Raw, Sum, build
from lowbit.methods.base import Weight, method
from lowbit.methods.series import Series, prefix

NOTHING = Stats("w", {})


def gaussian(rows: int = 256, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def expand(w: torch.Tensor, name: str, **options: float) -> Sum:
    q = method("series", options)(Weight("layer", w), NOTHING, preset(name))
    assert isinstance(q, Sum)
    return q


def nmse(q: QTensor, w: torch.Tensor) -> float:
    return float((q.decode() - w).square().sum() / w.square().sum())


@pytest.mark.parametrize(
    ("bits", "published"), [(4, [3.3e-2, 1.3e-4, 5.0e-7]), (3, [0.20, 3.1e-3, 4.9e-5]), (2, [0.93, 0.11, 6.8e-3])]
)
def test_errors_are_the_published_ones_and_half_a_step_at_most(bits: int, published: list[float]) -> None:
    """A10.1, at every prefix."""
    w = gaussian()
    q = expand(w, f"int{bits}-tensor-sym", terms=3)
    for n, expected in enumerate(published, start=1):
        first = prefix(q, n)
        assert nmse(first, w) == pytest.approx(expected, rel=0.15)
        last = first.terms[-1]
        assert isinstance(last, Affine)
        assert float((first.decode() - w).abs().max()) <= 0.5 * float(last.scale.decode()[0, 0]) + 1e-6


@pytest.mark.parametrize("name", ["int2-row-sym", "int3-g64-sym", "int4-g32-sym", "int5-row-sym"])
def test_every_prefix_is_within_half_its_last_step_in_every_block(name: str) -> None:
    w = gaussian(24, 100) * torch.logspace(-6, 2, 24).view(-1, 1)
    w[3] = 0
    w[5, 1:] = 0
    q = expand(w, name, terms=3)
    for n in (1, 2, 3):
        step = preset(name).block.spread(q.terms[n - 1].scale.decode(), (24, 100))
        far = (prefix(q, n).decode() - w).abs()
        additions = 1e-7 * w.abs().amax(1, keepdim=True)  # in float32
        assert (far <= 0.5 * step + additions).all(), n
    scales = [term.scale.decode() for term in q.terms]
    levels = preset(name).grid.levels
    assert all(
        (term.codes.unpack()[3] == levels // 2).all() for term in q.terms
    )  # zeros have the same codes everywhere
    assert all(torch.equal(a, levels * b) for a, b in itertools.pairwise(scales))


def test_two_int4_terms_are_in_the_class_of_int8() -> None:
    """A10.2: within a factor of two of int8's error, at the same bits."""
    w, int8 = gaussian(), preset("int8-tensor-sym")
    q, single = expand(w, "int4-tensor-sym", terms=2), int8.encode(w, int8.fit(w))
    assert 0.5 < nmse(q, w) / nmse(single, w) < 2
    assert q.bits_per_weight == pytest.approx(single.bits_per_weight, abs=1e-3)


def test_terms_add_up_to_the_same_int32_in_any_order() -> None:
    """A10.3: integer products of the terms, in units of half the finest step, commute; scaled, they are x Wᵀ."""
    w = gaussian(16, 64)
    x = torch.randint(-127, 128, (5, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    q = expand(w, "int4-tensor-sym", terms=3)
    products = []
    for k, term in enumerate(q.terms):
        assert isinstance(term, Affine)
        twice = 2 * term.codes.unpack().int() - (16 if term.zero is None else 15)
        products.append((x @ twice.T) * 16 ** (2 - k))
    sums = [a + b + c for a, b, c in itertools.permutations(products)]
    assert all(s.dtype == torch.int32 and torch.equal(s, sums[0]) for s in sums)
    half = float(q.terms[2].scale.decode()[0, 0]) / 2
    torch.testing.assert_close(sums[0].double() * half, x.double() @ q.decode().double().T, rtol=1e-5, atol=1e-5)


def test_codes_fit_their_bits_and_bytes_are_known_before() -> None:
    for name, shape in (("int4-g64-sym", (32, 128)), ("int3-row-sym", (17, 100)), ("int2-tensor-sym", (8, 36))):
        q = expand(gaussian(*shape), name, terms=3)
        assert q.nbytes == Series(terms=3).nbytes(preset(name), shape)
        assert all(term.codes.levels == preset(name).grid.levels for term in q.terms)
        again = build(q.spec(), {part.path: part.data for part in q.parts()})
        assert torch.equal(again.decode(), q.decode())


def test_a_target_stops_when_it_is_met() -> None:
    w = gaussian()
    lengths = [len(expand(w, "int4-tensor-sym", terms=5, target=t).terms) for t in (0.5, 1e-2, 1e-5, 0.0)]
    assert lengths == [1, 2, 3, 5]
    assert len(expand(torch.zeros(4, 8), "int4-row-sym", terms=3).terms) == 1


def test_a_prefix_shares_what_is_stored() -> None:
    q = expand(gaussian(8, 32), "int4-row-sym", terms=3)
    assert [part.data.data_ptr() for part in prefix(q, 2).parts()] == [part.data.data_ptr() for part in q.parts()][:5]
    for bad in (0, 4):
        with pytest.raises(FormatError, match="of 3 terms"):
            prefix(q, bad)
    with pytest.raises(FormatError, match="of Raw"):
        prefix(Raw.of(gaussian(2, 2)), 1)


@pytest.mark.parametrize("name", ["int4-g64", "nf4", "mxfp4"])
def test_only_symmetric_integers_expand(name: str) -> None:
    with pytest.raises(FormatError, match=rf"symmetric integers .* not {name}"):
        expand(gaussian(8, 64), name)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_weight_that_is_no_number_is_refused_by_name(value: float) -> None:
    w = gaussian(4, 32)
    w[2, 3] = value
    with pytest.raises(FormatError, match="layer: a NaN or infinite weight"):
        expand(w, "int4-g32-sym")


def test_no_terms_are_refused() -> None:
    for options in ({"terms": 0}, {"target": -1.0}, {"target": float("nan")}):
        with pytest.raises(RecipeError, match="series"):
            method("series", options)
