"""Matryoshka parents: what slicing costs (MatQuant's checks), and what the search over widths buys."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibration.stats import Moments, Stats
from lowbit.errors import CalibrationError, FormatError, RecipeError
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Nested, QTensor
from lowbit.methods.base import Weight, method
from lowbit.methods.nested import MatQuant, at_bits

NOTHING = Stats("layer.in", {})


def gaussian(rows: int = 32, columns: int = 4096) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def encode(w: torch.Tensor, name: str = "int8-row", stats: Stats = NOTHING, **options: object) -> Nested:
    q = method("nested", options)(Weight("layer", w), stats, preset(name))
    assert isinstance(q, Nested)
    return q


def nmse(values: torch.Tensor, w: torch.Tensor, weights: torch.Tensor | float = 1.0) -> float:
    return float(((values - w).square() * weights).sum() / (w.square() * weights).sum())


def direct(w: torch.Tensor, name: str, clip: int = 0) -> float:
    fmt = preset(name)
    return nmse(fmt.encode(w, fmt.fit(w, clip_steps=clip)).decode(), w)


def test_read_at_eight_bits_it_is_round_to_nearest() -> None:
    w = gaussian(8, 200)
    for name in ("int8-row", "int8-g64", "int8-row-sym"):
        fmt = preset(name)
        assert torch.equal(encode(w, name).decode(), fmt.encode(w, fmt.fit(w)).decode())


def test_rounding_slices_beat_truncated_ones() -> None:
    """A8.2: at 4 bits, .0174 against .0622 of the square."""
    w = gaussian()
    q = encode(w, read=4)
    truncated = q.parent.values((q.parent.codes.unpack() >> 4 << 4).float())
    assert nmse(q.decode(), w) == pytest.approx(0.0174, rel=0.03)
    assert nmse(truncated, w) == pytest.approx(0.0622, rel=0.03)
    assert nmse(truncated, w) > 3 * nmse(q.decode(), w)


def test_a_two_bit_slice_clips_and_so_beats_min_max_but_not_a_searched_range() -> None:
    """A8.3: .278 of the square, because the grid ends at 192/255 of the range."""
    w = gaussian()
    sliced = nmse(encode(w, read=2).decode(), w)
    assert sliced == pytest.approx(0.278, rel=0.03)
    assert direct(w, "int2-row", clip=20) < sliced < direct(w, "int2-row")


def test_the_search_lowers_its_own_objective_and_no_other() -> None:
    w = gaussian(16, 512)
    plain, searched = encode(w), encode(w, clip=20)
    errors = {b: (nmse(at_bits(plain, b).decode(), w), nmse(at_bits(searched, b).decode(), w)) for b in (8, 4, 2)}
    assert sum(f * errors[b][1] for b, f in ((8, 0.1), (4, 0.1), (2, 1))) < sum(
        f * errors[b][0] for b, f in ((8, 0.1), (4, 0.1), (2, 1))
    )
    assert errors[2][1] < 0.8 * errors[2][0]
    assert errors[2][1] < 1.1 * direct(w, "int2-row", clip=20)  # no worse than a 2-bit model of its own
    assert errors[8][1] > errors[8][0]  # which the parent pays for
    eight = encode(w, clip=20, lambda4=0.0, lambda2=0.0)
    assert torch.equal(eight.decode(), plain.decode())  # 8 bits alone want the whole range


@pytest.mark.parametrize("extra", [False, True])
def test_the_search_is_brute_force_over_ranges(extra: bool) -> None:
    """Against every range tried one by one through the parent itself, with a ragged last group."""
    w, fmt = gaussian(4, 100), preset("int8-g64")
    q = encode(w, "int8-g64", clip=5, lambda8=0.0, lambda4=1.0, lambda2=0.5, extra=extra)
    low = torch.stack([w[:, :64].amin(1), w[:, 64:].amin(1)], 1)
    high = torch.stack([w[:, :64].amax(1), w[:, 64:].amax(1)], 1)
    tried = []
    for i in range(5):
        factor = 1 - 0.12 * i
        params = fmt.fit(w, ranges=(low * factor, high * factor))
        parent = Nested((4, 100), fmt.encode(w, params), 8, extra)
        far = at_bits(parent, 4).decode().sub(w).square() + 0.5 * at_bits(parent, 2).decode().sub(w).square()
        tried.append(torch.stack([far[:, :64].sum(1), far[:, 64:].sum(1)], 1))
    best = torch.stack(tried).amin(0)
    far = at_bits(q, 4).decode().sub(w).square() + 0.5 * at_bits(q, 2).decode().sub(w).square()
    torch.testing.assert_close(torch.stack([far[:, :64].sum(1), far[:, 64:].sum(1)], 1), best, rtol=1e-4, atol=1e-5)


def test_weights_of_columns_are_those_of_their_inputs() -> None:
    w = gaussian(16, 200)
    stats = Stats.of("layer.in", {Moments}, 200)
    stats.update(torch.randn(300, 200, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 200))
    seen = stats[Moments].mean_square()
    assert MatQuant(clip=20, weighted=True).needs == {Moments}
    plain, weighted = encode(w, clip=20, read=2), encode(w, stats=stats, clip=20, weighted=True, read=2)
    assert nmse(weighted.decode(), w, seen) < nmse(plain.decode(), w, seen)
    with pytest.raises(CalibrationError, match=r"layer\.in"):
        encode(w, clip=20, weighted=True)


def test_ranges_found_before_are_kept() -> None:
    w, fmt = gaussian(4, 64), preset("int8-row")
    ranges = (w.amin(1, keepdim=True) * 0.5, w.amax(1, keepdim=True) * 0.5)
    q = method("nested", {"clip": 20})(Weight("layer", w, ranges), NOTHING, fmt)
    assert torch.equal(q.decode(), fmt.encode(w, fmt.fit(w, ranges=ranges)).decode())


def test_another_width_shares_the_parent() -> None:
    q = encode(gaussian(4, 64), read=2)
    assert (q.bits, at_bits(q, 6).bits) == (2, 6)
    assert at_bits(q, 6).inner is q.inner
    errors = [nmse(at_bits(q, b).decode(), gaussian(4, 64)) for b in (8, 6, 4, 3, 2)]
    assert errors == sorted(errors)
    with pytest.raises(FormatError, match="9 of 8 bits"):
        at_bits(q, 9)
    other: QTensor = q.inner
    with pytest.raises(FormatError, match="Affine has one width"):
        at_bits(other, 4)


@pytest.mark.parametrize("name", ["int4-row", "nf4", "fp8-e4m3"])
def test_a_parent_has_eight_bit_integers(name: str) -> None:
    with pytest.raises(FormatError, match=f"8-bit integers, not {name}"):
        encode(gaussian(4, 64), name)


@pytest.mark.parametrize(
    "options",
    [{"read": 1}, {"read": 9}, {"clip": -1}, {"lambda2": -1.0}, {"weighted": True},
     {"lambda8": 0.0, "lambda4": 0.0, "lambda2": 0.0}],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="nested"):
        method("nested", options)
