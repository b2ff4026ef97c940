"""Intervals must cover and tests must keep their level: simulated studies, with the naive way beside them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from lowbit.errors import EvidenceError
from lowbit.evaluation import statistics as st

STUDIES = 1000


def clustered(
    rng: np.random.Generator, sizes: np.ndarray, icc: float, mean: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Items of variance 1 whose clusters share a part ``icc`` of it."""
    label = np.repeat(np.arange(len(sizes)), sizes)
    shared = rng.normal(0, math.sqrt(icc), len(sizes))[label]
    return mean + shared + rng.normal(0, math.sqrt(1 - icc), len(label)), label


def iid(d: np.ndarray) -> st.Interval:
    """The naive interval: every item its own cluster."""
    se = d.std(ddof=1) / math.sqrt(len(d))
    half = special.stdtrit(len(d) - 1, 0.975) * se
    return st.Interval(d.mean(), d.mean() - half, d.mean() + half, se, len(d), len(d), "iid")


def covers(interval: st.Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize(("icc", "naive_at_most"), [(0.02, 0.90), (0.05, 0.80)])
def test_paired_mean_covers_on_clusters_where_the_naive_interval_does_not(icc: float, naive_at_most: float) -> None:
    rng, hits, naive = np.random.default_rng(1), 0, 0
    for _ in range(STUDIES):
        d, label = clustered(rng, np.full(40, 50), icc, mean=0.3)
        hits += covers(st.paired_mean(d, label), 0.3)
        naive += covers(iid(d), 0.3)
    assert 0.935 < hits / STUDIES < 0.965
    assert naive / STUDIES < naive_at_most


@pytest.mark.parametrize("sizes", [(60,) * 3, (60,) * 6, (20, 30, 40, 50, 60, 40, 30, 50)], ids=str)
def test_paired_mean_covers_with_few_clusters_and_needs_t_for_it(sizes: tuple[int, ...]) -> None:
    rng, hits, normal = np.random.default_rng(2), 0, 0
    for _ in range(STUDIES):
        d, label = clustered(rng, np.array(sizes), 0.05)
        i = st.paired_mean(d, label)
        hits += covers(i, 0)
        normal += abs(i.estimate) <= 1.96 * i.se
    assert 0.93 < hits / STUDIES < 0.97
    assert normal / STUDIES < 0.935


def test_paired_mean_covers_skewed_values() -> None:
    rng, hits, truth = np.random.default_rng(3), 0, math.exp(0.5)
    for _ in range(STUDIES):
        d = np.exp(rng.normal(size=4000))
        hits += covers(st.paired_mean(d, np.repeat(np.arange(40), 100)), truth)
    assert 0.93 < hits / STUDIES < 0.97


def test_paired_mean_equals_the_written_formula_and_any_labels_do() -> None:
    rng = np.random.default_rng(0)
    d, label = rng.normal(size=60), rng.integers(0, 9, 60)
    mean = d.mean()
    total = sum(float((d[label == c] - mean).sum()) ** 2 for c in np.unique(label))
    g = len(np.unique(label))
    i = st.paired_mean(d, label)
    assert i.se == pytest.approx(math.sqrt(g / (g - 1) * total) / 60)
    assert i.high - i.estimate == pytest.approx(stats.t.ppf(0.975, g - 1) * i.se)
    assert (i.n, i.clusters) == (60, g)
    assert st.paired_mean(d, label * 1000 - 7)[:6] == pytest.approx(i[:6])


def test_clusters_of_one_are_the_textbook_t_interval() -> None:
    d = np.random.default_rng(0).normal(size=25)
    low, high = stats.t.interval(0.9, 24, d.mean(), stats.sem(d))
    i = st.paired_mean(d, np.arange(25), level=0.9)
    assert (i.low, i.high) == pytest.approx((low, high))
    assert st.p_value(i) == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    assert st.p_value(i, 0.1, "less") == pytest.approx(stats.ttest_1samp(d, 0.1, alternative="less").pvalue)
    assert st.p_value(i, -0.1, "greater") == pytest.approx(stats.ttest_1samp(d, -0.1, alternative="greater").pvalue)


def test_cluster_ratio_covers_and_ignores_clusters_without_weight() -> None:
    rng, hits = np.random.default_rng(4), 0
    for _ in range(STUDIES):
        label = np.repeat(np.arange(40), 30)
        b = (rng.random(1200) < rng.beta(2, 8, 40)[label]).astype(float)
        a = b * (rng.random(1200) < 0.7)
        hits += covers(st.cluster_ratio(a, b, label), 0.7)
    assert 0.93 < hits / STUDIES < 0.97
    a, b, label = np.array([1.0, 0, 1, 0]), np.array([1.0, 1, 1, 0]), np.array([0, 0, 1, 2])
    assert st.cluster_ratio(a, b, label).clusters == 2


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_cluster_quantile_covers_where_counting_items_does_not(q: float) -> None:
    rng, hits, naive, found, errors = np.random.default_rng(5), 0, 0, [], []
    truth = math.exp(2 * stats.norm.ppf(q))
    for _ in range(STUDIES):
        z, label = clustered(rng, np.full(20, 100), 0.1)
        i = st.cluster_quantile(np.exp(2 * z), label, q)
        hits += covers(i, truth)
        naive += covers(st.cluster_quantile(np.exp(2 * z), np.arange(2000), q), truth)
        found.append(i.estimate)
        errors.append(i.se)
    assert 0.93 < hits / STUDIES < 0.97
    assert naive / STUDIES < (0.75 if q < 0.95 else 0.93)  # ones that share a cluster are rarer in the tail
    assert np.median(errors) == pytest.approx(np.std(found), rel=0.25)


def test_cluster_quantile_is_an_inverted_cdf_and_owns_up_to_an_unknown_tail() -> None:
    d, label = np.random.default_rng(6).normal(size=500), np.repeat(np.arange(20), 25)
    for q in (0.5, 0.9, 0.99):
        i = st.cluster_quantile(d, label, q)
        assert i.estimate == np.quantile(d, q, method="inverted_cdf")
        assert i.low <= i.estimate <= i.high
    assert st.cluster_quantile(np.arange(10.0), np.arange(10), 0.9).estimate == 8
    assert "largest value seen" not in st.cluster_quantile(d, label, 0.9).method
    tail = st.cluster_quantile(d, label, 0.999)
    assert "largest value seen" in tail.method
    assert tail.high == d.max()


def test_sign_flip_equals_full_enumeration() -> None:
    sums = np.random.default_rng(7).normal(0.5, 1, 9)
    totals = [abs(float(np.dot(s, sums))) for s in itertools.product([-1, 1], repeat=9)]
    assert st.sign_flip(sums, np.arange(9)) == pytest.approx(np.mean(np.array(totals) >= abs(sums.sum()) - 1e-12))


def test_sign_flip_on_single_items_is_mcnemar() -> None:
    for lost, gained in [(9, 2), (5, 5), (0, 6), (12, 4), (0, 0)]:
        d = np.array([-1.0] * lost + [1.0] * gained + [0.0] * 30)
        assert st.sign_flip(d, np.arange(len(d))) == pytest.approx(st.mcnemar(lost, gained))


def test_sign_flip_monte_carlo_agrees_with_the_exact_test() -> None:
    d = np.random.default_rng(8).normal(0.35, 1, 20)
    exact = st.sign_flip(d, np.arange(20))
    tiny = np.concatenate([d, [1e-12, -1e-12]])  # two more clusters: beyond enumeration, same answer
    assert st.sign_flip(tiny, np.arange(22)) == pytest.approx(exact, abs=0.01)
    assert st.sign_flip(tiny, np.arange(22)) == st.sign_flip(tiny, np.arange(22))


def test_five_clusters_never_reach_five_percent_by_sign_flips() -> None:
    assert st.sign_flip(np.full(50, 3.0), np.repeat(np.arange(5), 10)) == pytest.approx(2 / 32)


@pytest.mark.parametrize(("clusters", "size"), [(5, 200), (10, 100), (60, 5)])
def test_paired_test_keeps_its_level_on_heavy_tailed_clusters_where_items_do_not(clusters: int, size: int) -> None:
    rng, wrong, naive = np.random.default_rng(9), 0, 0
    label = np.repeat(np.arange(clusters), size)
    for _ in range(STUDIES):
        d = rng.standard_t(4, clusters * size) + rng.normal(0, 0.4, clusters)[label]
        wrong += st.paired_test(d, label).p < 0.05
        naive += st.p_value(iid(d)) < 0.05
    assert wrong / STUDIES < 0.065
    assert naive / STUDIES > (0.3 if size > 50 else 0.08)


def test_paired_test_keeps_its_level_for_rare_flips_where_t_does_not() -> None:
    label, wrong, by_t = np.repeat(np.arange(100), 20), 0, 0
    for signs in itertools.product([-1.0, 1.0], repeat=8):  # every way that eight flips can fall, equally likely
        d = np.zeros(2000)
        d[::240][:8] = signs
        test = st.paired_test(d, label)
        assert test.method == "sign flips of clusters"
        wrong += test.p < 0.05
        by_t += st.p_value(st.paired_mean(d, label)) < 0.05
    assert wrong / 256 == 2 / 256
    assert by_t / 256 == 18 / 256


def test_mcnemar_is_the_exact_binomial_test_and_keeps_its_level() -> None:
    for lost, gained in [(66, 41), (1, 0), (7, 7), (0, 12)]:
        assert st.mcnemar(lost, gained) == pytest.approx(stats.binomtest(lost, lost + gained, 0.5).pvalue)
    weights = stats.binom.pmf(np.arange(81), 80, 0.5)
    assert sum(w for k, w in enumerate(weights) if st.mcnemar(k, 80 - k) < 0.05) <= 0.05


def test_tost_keeps_its_level_at_the_margin_and_finds_sameness_inside() -> None:
    rng, at_margin, inside = np.random.default_rng(12), 0, 0
    for _ in range(STUDIES):
        d, label = clustered(rng, np.full(30, 30), 0.05)
        i = st.paired_mean(d, label)
        at_margin += st.tost(i._replace(estimate=i.estimate + 0.3), 0.3) < 0.05
        inside += st.tost(i, 0.3) < 0.05
    assert 0.03 < at_margin / STUDIES < 0.07
    assert inside / STUDIES > 0.95


def test_no_spread_gives_zero_or_one_never_nan() -> None:
    flat = st.paired_mean(np.zeros(12), np.repeat(np.arange(4), 3))
    assert (flat.low, flat.high, flat.se) == (0, 0, 0)
    assert st.p_value(flat) == 1
    assert st.tost(flat, 0.01) == 0
    shifted = st.paired_mean(np.ones(12), np.repeat(np.arange(4), 3))
    assert (st.p_value(shifted), st.tost(shifted, 0.5), st.tost(shifted, 1.0)) == (0, 1, 1)
    assert st.sign_flip(np.zeros(12), np.arange(12)) == 1


def test_holm_is_the_closed_bonferroni_procedure() -> None:
    rng = np.random.default_rng(13)
    for _ in range(20):
        p = rng.random(5) ** 3
        closed = [
            max(
                min(1.0, len(s) * min(p[list(s)]))
                for k in range(1, 6)
                for s in itertools.combinations(range(5), k)
                if i in s
            )
            for i in range(5)
        ]
        assert st.holm(list(p)) == pytest.approx(closed)


def test_benjamini_hochberg_agrees_with_scipy() -> None:
    p = np.random.default_rng(14).random(40) ** 2
    assert st.benjamini_hochberg(list(p)) == pytest.approx(list(stats.false_discovery_control(p)))
    assert st.benjamini_hochberg([]) == st.holm([]) == []


def test_holm_holds_the_family_and_benjamini_hochberg_the_share_of_false_claims() -> None:
    rng, any_false, raw_false, shares = np.random.default_rng(15), 0, 0, []
    for _ in range(STUDIES):
        z = rng.normal(size=20)
        z[:5] += 3.5  # five real effects
        p = 2 * stats.norm.sf(abs(z))
        any_false += min(st.holm(list(p))[5:]) < 0.05
        raw_false += p[5:].min() < 0.05
        claims = np.array(st.benjamini_hochberg(list(p))) < 0.05
        shares.append(claims[5:].sum() / max(1, claims.sum()))
    assert any_false / STUDIES < 0.06
    assert raw_false / STUDIES > 0.4
    assert 0.02 < np.mean(shares) < 0.05


def test_minimum_detectable_effect_has_its_power() -> None:
    assert st.minimum_detectable_effect(0.06, 1319) == pytest.approx(0.0189, abs=1e-4)  # GSM8K, 6 % flips
    assert st.minimum_detectable_effect(1.0, 1) == pytest.approx(2.80, abs=0.002)
    f, n, rng = 0.06, 1319, np.random.default_rng(16)
    effect = st.minimum_detectable_effect(f, n)
    lost, gained, _ = rng.multinomial(n, [(f + effect) / 2, (f - effect) / 2, 1 - f], 1500).T
    assert 0.72 < np.mean([st.mcnemar(int(a), int(b)) < 0.05 for a, b in zip(lost, gained, strict=True)]) < 0.84


@pytest.mark.parametrize("clusters", [8, 60])
def test_detectable_has_its_power_on_clusters(clusters: int) -> None:
    se = math.sqrt((0.05 + 0.95 / 20) / clusters)  # of clustered(): variance between, variance within / size
    effect = st.detectable(st.Interval(0, 0, 0, se, clusters * 20, clusters, ""))
    rng, found = np.random.default_rng(17), 0
    for _ in range(STUDIES):
        d, label = clustered(rng, np.full(clusters, 20), 0.05, effect)
        found += st.p_value(st.paired_mean(d, label)) < 0.05
    assert 0.76 < found / STUDIES < 0.85
    assert st.detectable(st.Interval(0, 0, 0, 1.0, 10**6, 10**5, "")) == pytest.approx(2.80, abs=0.002)


def test_clopper_pearson_agrees_with_scipy_and_covers_every_share() -> None:
    for k, n in [(0, 20), (3, 20), (20, 20), (66, 107)]:
        i, oracle = st.clopper_pearson(k, n), stats.binomtest(k, n).proportion_ci()
        assert (i.low, i.high) == pytest.approx((oracle.low, oracle.high))
    for p in np.linspace(0.01, 0.99, 25):
        weights = stats.binom.pmf(np.arange(21), 20, p)
        assert sum(w for k, w in enumerate(weights) if covers(st.clopper_pearson(k, 20), p)) >= 0.95


def test_beta_binomial_covers_on_average_and_is_shorter() -> None:
    rng = np.random.default_rng(18)
    p = rng.random(4000)
    hits = [covers(st.beta_binomial(int(k), 20), x) for k, x in zip(rng.binomial(20, p), p, strict=True)]
    assert 0.94 < np.mean(hits) < 0.96
    short, exact = st.beta_binomial(7, 20), st.clopper_pearson(7, 20)
    assert short.high - short.low < exact.high - exact.low


def test_what_cannot_be_estimated_is_refused_by_name() -> None:
    two = np.array([0, 1])
    with pytest.raises(EvidenceError, match=r"1 cluster\(s\) in 2 items"):
        st.paired_mean(np.ones(2), np.zeros(2, dtype=int))
    with pytest.raises(EvidenceError, match="1 of 2 values are NaN"):
        st.paired_mean(np.array([1.0, np.nan]), two)
    with pytest.raises(EvidenceError, match="no items"):
        st.sign_flip(np.zeros(0), np.zeros(0, dtype=int))
    with pytest.raises(EvidenceError, match="1 cluster"):
        st.cluster_quantile(np.ones(2), np.zeros(2, dtype=int), 0.5)
    with pytest.raises(EvidenceError, match="3 of 2"):
        st.clopper_pearson(3, 2)


def test_scaled_changes_the_unit_of_all_four_numbers() -> None:
    i = st.clopper_pearson(3, 20)
    assert i.scaled(100.0)[:4] == pytest.approx([100 * x for x in i[:4]])
    assert i.scaled(100.0)[4:] == i[4:]
