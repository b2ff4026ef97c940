"""Confidence and calibration: against brute force, and on simulated models whose calibration is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields

import numpy as np
import pytest
from scipy import special, stats

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics import calibration as cal
from lowbit.evaluation.metrics import confidence as con
from lowbit.evaluation.metrics.confidence import Answers
from lowbit.evaluation.metrics.items import Items


def answers(n: int, sharpness: float = 1.0, seed: int = 0, choices: int = 4) -> Answers:
    """Right answers drawn from softmax(z); the model says softmax(sharpness z)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, choices))
    gold = (special.softmax(z, 1).cumsum(1) > rng.random((n, 1))).argmax(1)
    return Answers(special.softmax(sharpness * z, 1), gold, np.arange(n))


def items(logprob: list[list[float]], gold: list[int], cluster: list[int]) -> Items:
    counts = [len(row) for row in logprob]
    n, m = len(gold), sum(counts)
    starts = np.concatenate([[0], np.cumsum(counts)])
    true = np.zeros(m, bool)
    true[starts[:-1] + gold] = True
    empty = np.full(n, "")
    other = {f.name: np.full(n, "0") for f in fields(Items)}
    return Items.of(other | {
        "id": np.arange(n).astype(str), "group": empty, "cluster": cluster, "doc_hash": empty, "prompt_hash": empty,
        "starts": starts, "logprob": np.concatenate(logprob), "tokens": np.ones(m), "chars": np.ones(m), "true": true,
        "role": np.zeros(m), "pred": [int(np.argmax(row)) for row in logprob], "gold": gold, "score": np.zeros(n),
        "margin": np.zeros(n), "length": np.zeros(n), "stop_reason": empty, "parse_ok": np.ones(n, bool),
        "text": empty, "written_starts": np.zeros(n + 1), "written": [],
    })  # fmt: skip


def test_answers_of_items_are_the_softmax_over_each_items_own_choices() -> None:
    rows, gold = [[-1.0, -2.0], [-3.0, -1.0, -1.5], [-0.1, -4.0]], [1, 1, 0]
    a = Answers.of(items(rows, gold, [0, 1, 1]))
    for i, (row, g) in enumerate(zip(rows, gold, strict=True)):
        expected = special.softmax(row)
        assert a.p[i, : len(row)] == pytest.approx(expected, rel=1e-5)
        assert not a.p[i, len(row) :].any()
        assert a.nll[i] == pytest.approx(-math.log(expected[g]), rel=1e-5)
    assert a.correct.tolist() == [0, 1, 1]
    one_hot = np.eye(3)[gold]
    assert a.brier == pytest.approx(((a.p - one_hot) ** 2).sum(1))
    assert a.entropy == pytest.approx([stats.entropy(p, base=2) for p in a.p])
    with pytest.raises(EvidenceError, match="without choices"):
        Answers.of(items([[-1.0], [-2.0]], [0, 0], [0, 1]))


@pytest.mark.parametrize("kind", ["mass", "width"])
def test_ece_is_the_weighted_gap_of_its_bins_by_brute_force(kind: cal.Bins) -> None:
    a = answers(500, 1.7)
    edges = np.quantile(a.confidence, np.arange(1, 10) / 10) if kind == "mass" else np.arange(1, 10) / 10
    low, high = np.concatenate([[-1], edges]), np.concatenate([edges, [2]])
    total = 0.0
    for lo, hi in zip(low, high, strict=True):
        inside = (a.confidence >= lo) & (a.confidence < hi)
        if inside.any():
            total += inside.mean() * abs(a.correct[inside].mean() - a.confidence[inside].mean())
    assert cal.calibration_error(a, 10, kind, debias=False) == pytest.approx(total)
    assert cal.calibration_error(a, 10, kind) < total


def test_a_calibrated_model_has_no_error_and_a_sharpened_one_the_slope_of_its_temperature() -> None:
    calibrated = answers(100_000)
    assert cal.calibration_error(calibrated, debias=False) < 0.01
    assert abs(cal.squared_error(calibrated).estimate) < 1e-4
    line = cal.calibration_line(answers(20_000, choices=2))
    assert line.slope.low < 1 < line.slope.high
    assert line.intercept.low < 0 < line.intercept.high
    sharpened = cal.calibration_line(answers(20_000, 2.0, choices=2)).slope  # temperature 0.5
    assert sharpened.low < 0.5 < sharpened.high
    assert sharpened.high - sharpened.low < 0.05


def test_debiasing_takes_the_noise_off_the_squared_error() -> None:
    found = [cal.squared_error(answers(300, seed=s)).estimate for s in range(100)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 10
    raw = [cal.calibration_error(answers(300, seed=s), debias=False) for s in range(20)]
    assert np.mean(raw) > 0.05  # what a calibrated model seems to have with 20 items a bin


def test_the_line_maximises_the_likelihood() -> None:
    a = answers(400, 1.5)
    x = special.logit(a.confidence)

    def loss(slope: float, intercept: float) -> float:
        return float(-np.log(special.expit((2 * a.correct - 1) * (intercept + slope * x))).sum())

    found = cal.calibration_line(a)
    slope, intercept = found.slope.estimate, found.intercept.estimate
    best = loss(slope, intercept)
    assert all(
        best <= loss(slope + ds, intercept + di) + 1e-9 for ds, di in [(1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)]
    )
    right = Answers(np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]), np.array([0, 0, 0]), np.arange(3))
    with pytest.raises(EvidenceError, match="separated"):
        cal.calibration_line(right)


def test_shifts_pair_and_vanish_between_a_model_and_itself() -> None:
    a, b = answers(300), answers(300, 1.6)
    for name in con.PER_ITEM:
        same = con.shift(name, a, a)
        assert (same.estimate, same.se) == (0, 0)
    # the same answers, only surer: nothing but confidence moves
    assert con.shift("accuracy", a, b).se == 0
    assert con.shift("confidence", a, b).low > 0
    assert con.shift("entropy", a, b).high < 0
    line = cal.calibration_line_shift(a, b)
    assert line.slope.high < 0
    apart = math.hypot(cal.calibration_line(a).slope.se, cal.calibration_line(b).slope.se)
    assert line.slope.se < 0.5 * apart  # pairing takes the noise that both share away
    assert cal.squared_error_shift(a, b).estimate == pytest.approx(
        cal.squared_error(b).estimate - cal.squared_error(a).estimate, abs=1e-3
    )
    with pytest.raises(EvidenceError, match="do not pair"):
        con.shift("brier", a, answers(300, seed=1))


def test_shift_by_confidence_groups_by_the_reference() -> None:
    a = answers(400, 3.0)
    rng = np.random.default_rng(1)
    noisy = special.softmax(np.log(a.p) + rng.normal(0, 0.5, a.p.shape), 1)
    buckets = con.shift_by_confidence(a, Answers(noisy, a.gold, a.cluster), 4, absolute=True)
    order = np.argsort(a.confidence, kind="stable")
    size = np.abs(noisy[np.arange(400), a.gold] - a.p_true)[order]
    assert [b.interval.estimate for b in buckets] == pytest.approx(
        [size[i : i + 100].mean() for i in (0, 100, 200, 300)]
    )
    assert all(x.high <= y.low for x, y in itertools.pairwise(buckets))
    assert buckets[0].interval.estimate > 1.5 * buckets[-1].interval.estimate  # the surest move least


def test_reliability_follows_the_diagonal_of_a_calibrated_model() -> None:
    bins = cal.reliability(answers(4000, seed=3), 10)
    assert sum(b.accuracy.n for b in bins) == 4000
    assert sum(b.accuracy.low <= b.confidence <= b.accuracy.high for b in bins) >= 8
    assert all(0 <= b.accuracy.low <= b.accuracy.estimate <= b.accuracy.high <= 1 for b in bins)
