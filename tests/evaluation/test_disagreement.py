"""Disagreement: AUCs against brute force and scipy, and the ranking of uncertainties on simulated rounding."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics import disagreement as dis
from lowbit.evaluation.metrics.confidence import Answers


def pair(n: int, choices: int, noise: float = 0.15, seed: int = 0) -> tuple[Answers, Answers]:
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1, (n, choices)) * 2.5
    gold = np.zeros(n, int)
    ref, low = (special.softmax(x, 1) for x in (z, z + noise * rng.normal(size=z.shape)))
    return Answers(ref, gold, np.arange(n)), Answers(low, gold, np.arange(n))


def test_scores_are_what_they_are_called() -> None:
    p = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    assert dis.margin(p) == pytest.approx([-0.2, -1.0])
    assert dis.least_confidence(p) == pytest.approx([0.5, 0.0])
    assert dis.entropy(p) == pytest.approx([stats.entropy(row) for row in p])
    assert dis.gini(p) == pytest.approx([1 - 0.25 - 0.09 - 0.04, 0.0])


def test_auc_is_the_share_of_ordered_pairs_with_delongs_error() -> None:
    rng = np.random.default_rng(1)
    changed = rng.random(120) < 0.2
    score = np.round(rng.normal(size=120) + changed, 1)  # with ties
    found = dis.auc(score, changed, np.arange(120))
    a, b = score[changed][:, None], score[~changed][None]
    placed = (a > b) + 0.5 * (a == b)
    assert found.estimate == pytest.approx(placed.mean())
    m, n = placed.shape
    assert found.estimate == pytest.approx(stats.mannwhitneyu(score[changed], score[~changed]).statistic / (m * n))
    delong = placed.mean(1).var() / m + placed.mean(0).var() / n  # DeLong's components, each over its own count
    assert found.se**2 == pytest.approx(delong * 120 / 119)
    with pytest.raises(EvidenceError, match="some of both"):
        dis.auc(score, np.zeros(120, bool), np.arange(120))


def test_repeating_every_item_widens_nothing_but_naive_intervals() -> None:
    rng = np.random.default_rng(2)
    changed = rng.random(200) < 0.3
    score = rng.normal(size=200) + changed
    once = dis.auc(score, changed, np.arange(200))
    thrice = dis.auc(np.repeat(score, 3), np.repeat(changed, 3), np.repeat(np.arange(200), 3))
    assert (thrice.estimate, thrice.se) == pytest.approx((once.estimate, once.se))


@pytest.mark.parametrize(
    ("choices", "n", "known"),
    [(4, 20000, (0.963, 0.928, 0.822, 0.866)), (10, 20000, (0.948, 0.884, 0.766, 0.811)),
     (1000, 2000, (0.891, 0.764, 0.641, 0.685))],
)  # fmt: skip
def test_the_margin_foretells_changes_best(choices: int, n: int, known: tuple[float, ...]) -> None:
    ref, low = pair(n, choices)
    changed = dis.disagrees(ref, low)
    ranked = dis.ranking(ref, changed)
    found = {r.score: r.auc for r in ranked}
    for name, value in zip(dis.SCORES, known, strict=True):
        assert found[name].low - 0.015 < value < found[name].high + 0.015  # of other noise of the same kind
    assert ranked[0].score == "margin"
    assert all(r.beside_margin.high < 0 for r in ranked[1:])
    lowest = dis.riskiest(dis.margin(ref.p), n // 5)
    assert changed[lowest].mean() > 3 * changed.mean()  # a fifth of the items holds most of the changes
    assert (np.diff(dis.margin(ref.p)[lowest]) <= 0).all()


def test_the_rate_stays_within_its_ends() -> None:
    none = dis.rate(np.zeros(50, bool), np.arange(50))
    assert (none.estimate, none.low > 0, none.high < 0.08) == (0, False, True)
    ref, low = pair(2000, 4)
    changed = dis.disagrees(ref, low)
    assert dis.rate(changed, ref.cluster).estimate == pytest.approx((ref.p.argmax(1) != low.p.argmax(1)).mean())
