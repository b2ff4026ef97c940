"""Divergence as survival: the curve against scipy, areas against plain means, pairing against both apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics import survival as sv
from lowbit.evaluation.metrics.survival import Divergence


def censored(n: int, seed: int = 0, last: int = 30) -> Divergence:
    rng = np.random.default_rng(seed)
    event, end = rng.geometric(0.08, n), rng.integers(5, last + 1, n)
    return Divergence(np.minimum(event, end), event <= end, np.arange(n))


def test_the_curve_is_scipys_with_greenwoods_error() -> None:
    d = censored(80)
    data = stats.CensoredData.right_censored(d.position, ~d.diverged)
    oracle = stats.ecdf(data).sf
    greenwood = oracle.confidence_interval(0.95, method="linear")
    steps = sv.curve(d)
    assert [s.position for s in steps] == sorted(set(d.position[d.diverged]))
    z = stats.norm.ppf(0.975)
    for s in steps:
        at = int(np.flatnonzero(oracle.quantiles == s.position)[0])
        assert s.share.estimate == pytest.approx(oracle.probabilities[at])
        if greenwood.low.probabilities[at] > 0 and greenwood.high.probabilities[at] < 1:
            se = (greenwood.high.probabilities[at] - greenwood.low.probabilities[at]) / (2 * z)
            assert s.share.se == pytest.approx(se * math.sqrt(80 / 79))
        assert 0 <= s.share.low <= s.share.estimate <= s.share.high <= 1


def test_log_log_intervals_are_scipys_but_for_t() -> None:
    d = censored(3000)
    oracle = stats.ecdf(stats.CensoredData.right_censored(d.position, ~d.diverged)).sf
    ends = oracle.confidence_interval(0.95, method="log-log")
    for s in sv.curve(d)[:10]:
        at = int(np.flatnonzero(oracle.quantiles == s.position)[0])
        expected = (ends.low.probabilities[at], ends.high.probabilities[at])
        assert (s.share.low, s.share.high) == pytest.approx(expected, abs=5e-4)


def test_without_censoring_the_area_is_a_mean_and_the_median_a_median() -> None:
    position = np.random.default_rng(1).geometric(0.1, 60)
    d = Divergence(position, np.ones(60, bool), np.arange(60))
    found, plain = sv.agreement_length(d, 20), np.minimum(position - 1, 20)
    low, high = stats.t.interval(0.95, 59, plain.mean(), stats.sem(plain))
    assert (found.estimate, found.low, found.high) == pytest.approx((plain.mean(), low, high))
    assert sv.median(d)[0] == np.quantile(position, 0.5, method="inverted_cdf")
    other = Divergence(position + 1, np.ones(60, bool), np.arange(60))
    shift = sv.agreement_length_shift(d, other, 100)
    assert shift.estimate == pytest.approx(1)
    assert shift.se == pytest.approx(0, abs=1e-9)  # every text agrees one token longer: no doubt at all


def test_censored_texts_count_for_as_long_as_they_were_followed() -> None:
    rng, naive, km = np.random.default_rng(2), [], []
    truth = sum(0.95**t for t in range(1, 26))
    for _ in range(60):
        event, end = rng.geometric(0.05, 300), rng.integers(1, 40, 300)
        d = Divergence(np.minimum(event, end), event <= end, np.arange(300))
        km.append(sv.agreement_length(d, 25).estimate)
        naive.append(np.minimum(d.position - d.diverged, 25).mean())
    assert np.mean(km) == pytest.approx(truth, rel=0.02)
    assert np.mean(naive) < 0.8 * truth


def test_clusters_of_copies_have_the_error_of_one_each() -> None:
    d = censored(60)
    copies = Divergence(np.repeat(d.position, 4), np.repeat(d.diverged, 4), np.repeat(d.cluster, 4))
    assert sv.agreement_length(copies, 15).se == pytest.approx(sv.agreement_length(d, 15).se)


def test_what_was_not_followed_is_not_told() -> None:
    d = Divergence(np.array([3, 5, 5]), np.array([True, False, False]), np.arange(3))
    assert sv.median(d)[0] is None
    assert sv.agreement_length(d, 5).estimate == pytest.approx(2 + 3 * 2 / 3)
    with pytest.raises(EvidenceError, match="beyond token 5"):
        sv.agreement_length(d, 6)
    with pytest.raises(EvidenceError, match="do not pair"):
        sv.agreement_length_shift(d, Divergence(d.position, d.diverged, np.array([0, 1, 9])), 5)
    with pytest.raises(EvidenceError, match="positions below 1"):
        Divergence(np.array([0]), np.array([True]), np.array([0]))
