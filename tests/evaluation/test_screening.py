"""Screening: unbiased and covering two-stage estimates, fewer items where changes are rare, honest winners."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.errors import EvidenceError
from lowbit.evaluation import screening
from lowbit.evaluation.screening import Measure


def task(seed: int, n: int = 4000, rare: float = 0.3, drop: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Margins, and changes of -1, 0 or 1 that happen where the margin is small."""
    rng = np.random.default_rng(seed)
    margin = rng.random(n)
    flips = rng.random(n) < rare * (1 - margin) ** 6
    return margin, np.where(flips, np.where(rng.random(n) < drop, -1.0, 1.0), 0.0)


def of(d: np.ndarray) -> Measure:
    return lambda rows: d[rows]


def test_two_stages_cover_and_need_fewer_items_than_a_random_draw() -> None:
    margin, d = task(0)
    found = [screening.screen(of(d), margin, 400, seed=s) for s in range(120)]
    estimates = np.array([s.interval.estimate for s in found])
    covered = np.mean([s.interval.low <= d.mean() <= s.interval.high for s in found])
    assert 0.92 < covered < 0.98
    assert abs(estimates.mean() - d.mean()) < 3 * estimates.std() / np.sqrt(120)
    random_draw = d.var() / 400 * (1 - 400 / 4000)
    assert random_draw / estimates.var() > 1.5
    stratum = np.argsort(np.argsort(margin)) // 800
    per = np.bincount(stratum[found[0].items], minlength=5)
    assert (per.sum(), len(set(found[0].items.tolist()))) == (400, 400)
    assert per[0] > 2 * per[4] > 0  # where changes are


def test_asking_for_all_items_is_the_plain_mean_without_error() -> None:
    margin, d = task(1, n=200)
    found = screening.screen(of(d), margin, 200)
    assert found.interval.estimate == pytest.approx(d.mean())
    assert found.interval.se == 0


def test_the_winner_of_a_race_is_not_flattered_where_its_screening_is() -> None:
    """Six versions, none better than the reference: the best on few items looks better, the confirmed one not."""
    screened, covered = [], 0
    for seed in range(25):
        margin = task(seed, 2000)[0]
        rng = np.random.default_rng(1000 + seed)
        changed = rng.random((6, 2000)) < 0.3 * (1 - margin) ** 6
        d = {f"v{i}": np.where(row, rng.choice([-1.0, 1.0], 2000), 0.0) for i, row in enumerate(changed)}
        raced = screening.race([(name, of(values)) for name, values in d.items()], margin, 100, 300, seed=seed)
        top = max(raced, key=lambda r: r.screened.estimate)
        screened.append(top.screened.estimate - d[top.name].mean())
        first = raced[0].confirmed
        assert first is not None
        covered += first.low <= d[raced[0].name].mean() <= first.high
    assert np.mean(screened) > 3 * np.std(screened) / 5
    assert covered >= 22


def test_screening_rules_out_what_is_clearly_behind_and_confirms_on_other_items() -> None:
    margin, d = task(3)
    asked: dict[str, list[int]] = {"good": [], "bad": []}

    def watching(name: str, values: np.ndarray) -> Measure:
        def measure(rows: np.ndarray) -> np.ndarray:
            asked[name] += rows.tolist()
            return values[rows]

        return measure

    bad = np.where(margin < 0.4, -1.0, 0.0)
    raced = screening.race([("bad", watching("bad", bad)), ("good", watching("good", d))], margin, 200, 500)
    assert [r.name for r in raced] == ["good", "bad"]
    assert raced[1].confirmed is None
    assert (len(asked["good"]), len(asked["bad"])) == (700, 200)
    assert len(set(asked["good"])) == 700
    with pytest.raises(EvidenceError, match="a budget of 20"):
        screening.screen(of(d), margin, 20)


def test_equals_are_seldom_ruled_out() -> None:
    """Ten versions that are equally good: the one that looks best does so by chance, and shows nobody behind."""
    wrong = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        margin, share = rng.random(1000), 0.1
        d = rng.permuted(np.tile(np.where(np.arange(1000) < share * 1000, -1.0, 0.0), (10, 1)), axis=1)
        raced = screening.race([(f"v{i}", of(row)) for i, row in enumerate(d)], margin, 200, 300, seed=seed)
        wrong += any(r.confirmed is None for r in raced)
    assert wrong <= 7  # 5 % of 60 are 3; with chance 1 % more than 7


def test_half_of_every_stratum_is_left_to_confirm_on() -> None:
    """Changes in one stratum alone draw all of the budget to it; the others' means must not come from nothing."""
    rng = np.random.default_rng(0)
    margin = np.sort(rng.random(260))
    d = np.where(np.arange(260) < 52, rng.choice([-1.0, 0.0, 1.0], 260), 0.0)
    raced = screening.race([("a", of(d)), ("b", of(-d))], margin, 100, 1000)
    for one in raced:
        assert one.confirmed is not None
        assert np.isfinite(one.confirmed.estimate)
        assert one.confirmed.low <= (d.mean() if one.name == "a" else -d.mean()) <= one.confirmed.high
    with pytest.raises(EvidenceError, match="a budget of 60"):
        screening.screen(of(d), margin, 60, free=margin > margin[60])  # nothing of the first stratum
