"""Statistics against numpy and scipy, in one pass or merged from shards in any order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.calibration.stats import AbsMax, AbsMean, Gram, Moments, Stat, Stats
from lowbit.errors import CalibrationError

KINDS: list[type[Stat]] = [Gram, AbsMax, AbsMean, Moments]


def inputs(tokens: int, n: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed inputs with a mean, as activations have them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g) * torch.linspace(0.1, 3, n) + 0.3
    return x * (1 + 10 * (torch.rand(tokens, n, generator=g) > 0.99))


def figures(stat: Stat) -> list[np.ndarray]:
    """All that a statistic says, as arrays."""
    tokens = np.array([float(stat.tokens)])
    match stat:
        case Gram():
            return [tokens, stat.sum().numpy(), stat.mean_square().numpy()]
        case Moments():
            return [tokens, stat.mean_square().numpy(), np.array([stat.std, stat.kurtosis, stat.absmax])]
        case AbsMax() | AbsMean():
            return [tokens, stat.value.numpy()]
    raise AssertionError(stat)


def same(a: Stat, b: Stat, rtol: float = 2e-5) -> None:
    for x, y in zip(figures(a), figures(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6 * float(np.abs(y).max()))


@pytest.mark.parametrize(("tokens", "n"), [(1, 3), (50, 7), (300, 200), (64, 385)])
def test_gram_is_x_transposed_x(tokens: int, n: int) -> None:
    x = inputs(tokens, n)
    gram = Gram(n)
    for chunk in x.split(37):
        gram.update(chunk)
    exact = x.double().T @ x.double()
    torch.testing.assert_close(gram.sum().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.diagonal().max()))
    assert torch.equal(gram.sum(), gram.sum().T)
    torch.testing.assert_close(gram.mean_square(), x.square().mean(0), rtol=1e-5, atol=0)


def test_moments_are_those_of_scipy() -> None:
    x = inputs(400, 50)
    moments = Moments(50)
    for chunk in x.split(64):
        moments.update(chunk)
    flat = x.double().numpy().ravel()
    assert moments.std == pytest.approx(flat.std(), rel=1e-5)
    assert moments.kurtosis == pytest.approx(scipy.stats.kurtosis(flat, fisher=False), rel=1e-4)
    assert moments.absmax == float(x.abs().max())
    torch.testing.assert_close(moments.mean_square(), x.square().mean(0), rtol=1e-5, atol=0)
    gaussian = Moments(1)
    gaussian.update(torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0)))
    assert gaussian.kurtosis == pytest.approx(3, abs=0.1)
    constant = Moments(2)
    constant.update(torch.ones(5, 2))
    assert (constant.std, constant.kurtosis) == (0, 0)


def test_absolute_values() -> None:
    x = inputs(100, 9)
    largest, mean = AbsMax(9), AbsMean(9)
    for chunk in x.split(33):
        largest.update(chunk)
        mean.update(chunk)
    assert torch.equal(largest.value, x.abs().amax(0))
    torch.testing.assert_close(mean.value, x.double().abs().mean(0).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@given(cuts=st.lists(st.integers(0, 60), min_size=2, max_size=2).map(sorted), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_merging_is_associative_and_equals_one_pass(kind: type[Stat], cuts: list[int], seed: int) -> None:
    x = inputs(60, 5, seed)
    bounds = [0, *cuts, 60]
    shards = [x[a:b] for a, b in itertools.pairwise(bounds)]

    def seen(part: torch.Tensor) -> Stat:
        stat = kind(5)
        stat.update(part)
        return stat

    whole = seen(x)
    left = seen(shards[0])  # (a + b) + c
    left.merge(seen(shards[1]))
    left.merge(seen(shards[2]))
    tail = seen(shards[1])  # a + (b + c)
    tail.merge(seen(shards[2]))
    right = seen(shards[0])
    right.merge(tail)
    same(left, whole)
    same(right, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_known_before(kind: type[Stat]) -> None:
    stat = kind(64)
    held = sum(v.numel() * v.element_size() for v in vars(stat).values() if isinstance(v, torch.Tensor))
    assert kind.nbytes(64) == held


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_change_nothing_and_half_precision_is_taken(kind: type[Stat]) -> None:
    x = inputs(40, 6)
    stat, half = kind(6), kind(6)
    stat.update(x.bfloat16().float())
    stat.update(x[:0])
    half.update(x.bfloat16())
    same(half, stat, rtol=1e-6)


def test_rescaled_statistics_are_those_of_rescaled_inputs() -> None:
    x, by = torch.randn(50, 7, generator=torch.Generator().manual_seed(3)), torch.tensor([2.0, -1, 0.5, 3, 1, 8, 0.1])
    kinds = frozenset({Gram, AbsMean, AbsMax, Moments})
    found, wanted = Stats.of("w", kinds, 7), Stats.of("w", kinds, 7)
    found.update(x)
    wanted.update(x * by)
    found[Gram].memo[0.1, True] = found[Gram].sum(), found[Gram].sum()
    found.rescale(by)
    torch.testing.assert_close(found[Gram].sum(), wanted[Gram].sum())
    torch.testing.assert_close(found[AbsMean].value, wanted[AbsMean].value)
    torch.testing.assert_close(found[AbsMax].value, wanted[AbsMax].value)
    assert not found[Gram].memo
    assert Moments not in found  # sums over all inputs do not tell


def test_new_tokens_discard_a_factorisation() -> None:
    gram = Gram(2)
    for change in (lambda: gram.update(torch.ones(1, 2)), lambda: gram.merge(Gram(2))):
        gram.memo[0.1, True] = torch.zeros(1), torch.zeros(1)
        change()
        assert not gram.memo


def test_stats_hold_what_was_asked_for_only() -> None:
    stats = Stats.of("layer", {Gram, AbsMax}, 4)
    with pytest.raises(CalibrationError, match="layer: no calibration token reached"):
        stats[Gram]
    assert Gram not in stats
    stats.update(torch.ones(2, 4))
    assert Gram in stats
    assert stats[AbsMax].value.tolist() == [1.0] * 4
    with pytest.raises(CalibrationError, match="layer: no Moments was collected"):
        stats[Moments]
