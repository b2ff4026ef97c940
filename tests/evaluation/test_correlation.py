"""Perplexity as a proxy: correlations against scipy, intervals by simulation, and the warnings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lowbit.errors import EvidenceError
from lowbit.evaluation.correlation import proxy


def test_correlations_are_scipys_with_fishers_interval() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=16)
    y = -x + 0.3 * rng.normal(size=16)
    (found,) = proxy(x, {"cloze": y})
    oracle = stats.pearsonr(x, y)
    ends = oracle.confidence_interval(0.95)
    assert found.pearson.estimate == pytest.approx(oracle.statistic)
    assert (found.pearson.low, found.pearson.high) == pytest.approx((ends.low, ends.high))
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)


def test_weak_tasks_come_first_with_a_warning_that_says_why() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=30)
    scores = {
        "cloze": -x + 0.1 * rng.normal(size=30), "noise": rng.normal(size=30), "bias": x + 0.2 * rng.normal(size=30),
        "chance": np.full(30, 0.25),
    }  # fmt: skip
    found = {c.task: c for c in proxy(x, scores)}
    assert list(found)[:2] == ["chance", "noise"]
    assert found["cloze"].warning == ""
    assert "does not foretell" in found["noise"].warning
    assert "worse by perplexity is better here" in found["bias"].warning
    assert math.isnan(found["chance"].pearson.estimate)
    (few,) = proxy(x[:6], {"cloze": -x[:6] + 0.3 * scores["noise"][:6]})
    assert few.warning == "" or "may be below" in few.warning
    with pytest.raises(EvidenceError, match="four versions"):
        proxy(x[:3], {"cloze": x[:3]})
