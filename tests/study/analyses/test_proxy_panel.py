"""Perplexity as a proxy: which tasks are foretold, tested against Fisher's z, draws of versions, and made-up sweeps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lowbit.errors import EvidenceError
from lowbit.evaluation.correlation import mean_foretold, p_weak, proxy
from lowbit.evaluation.task_findings import TaskFinding
from lowbit.report.panel import Curves
from lowbit.study.analyses.proxy import Sweep, ceiling, of_sweep

RNG = np.random.default_rng(0)
X = np.sort(RNG.normal(size=16))
SCORES = {"cloze": -X + 0.05 * RNG.normal(size=16), "bias": X + 0.1 * RNG.normal(size=16),
          "square": X**2 - np.polyval(np.polyfit(X, X**2, 1), X), "noise": RNG.permutation(X),
          "flat": np.full(16, 25.0)}  # fmt: skip
ROOM = {"cloze": 0.95, "bias": 0.9, "square": 0.9, "noise": 0.3, "flat": 0.0}


def sweep(names: list[str]) -> Sweep:
    scores = {name: SCORES[name] for name in names}
    return Sweep(tuple(f"v{i}" for i in range(16)), X, scores, ROOM, dict.fromkeys(names, 60))


def test_tests_of_a_correlation_are_fishers() -> None:
    rows = {c.task: c for c in proxy(X, SCORES)}
    r = stats.pearsonr(X, SCORES["noise"]).statistic
    z = (math.atanh(abs(r)) - math.atanh(0.6)) * math.sqrt(13)
    assert p_weak(rows["noise"]) == pytest.approx(stats.norm.cdf(z))
    assert p_weak(rows["cloze"]) > 0.99 > 0.01 > p_weak(rows["cloze"], shown=True)
    assert p_weak(rows["bias"], shown=True) > 0.99  # strong, the wrong way
    assert p_weak(rows["flat"]) == p_weak(rows["flat"], shown=True) == 1


def test_the_mean_correlation_has_the_interval_of_versions_drawn_anew() -> None:
    names = ["cloze", "noise"]
    found = mean_foretold(X, {name: SCORES[name] for name in names})
    assert found.estimate == pytest.approx(-np.mean([stats.pearsonr(X, SCORES[name]).statistic for name in names]))
    rng, drawn = np.random.default_rng(5), []
    for _ in range(400):
        i = rng.integers(0, 16, 16)
        drawn.append(-np.mean([np.corrcoef(X[i], SCORES[name][i])[0, 1] for name in names]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.06)
    with pytest.raises(EvidenceError):
        mean_foretold(X[:3], {"cloze": X[:3]})


def test_claims_and_warnings_of_made_up_sweeps() -> None:
    panel = of_sweep(sweep(["cloze"]))
    assert [c.verdict for c in panel.claims] == ["supported", "contradicted"]
    panel = of_sweep(sweep(list(SCORES)))
    assert [c.verdict for c in panel.claims] == ["contradicted", "supported"]
    assert "Shown to be below: square" in panel.claims[1].found
    assert panel.lead[0].endswith("Perplexity foretells 1 of them: cloze.")
    assert {name for name in SCORES if name in panel.lead[1]} == {"noise", "flat"}
    told = {row.cells[0].main: row.cells[-1] for row in panel.tables[0].table.rows}
    assert {name for name, warning in told.items() if "too few to be" in warning.sub} == {"noise", "flat"}
    assert told["cloze"] == ("–", "")
    assert of_sweep(sweep(["noise"])).claims == ()  # noise speaks for nobody
    (scatter,) = panel.figures
    assert isinstance(scatter, Curves)
    assert len(scatter.marks) == 80
    assert not scatter.lines


def test_few_items_leave_little_room() -> None:
    def finding(delta: float, half: float) -> TaskFinding:
        return TaskFinding("t", "accuracy", "%", "higher", 400, 400, 50.0, 50 + delta, delta, delta - half,
                           delta + half, None, 1.0, "", 1.0, 1.0, 1.0, False)  # fmt: skip

    rng = np.random.default_rng(3)
    se, spread = 2.0, 4.0
    found = [finding(d, 1.966 * se) for d in rng.normal(0, math.hypot(se, spread), 4000).tolist()]
    assert ceiling(found) == pytest.approx(spread / math.hypot(se, spread), rel=0.03)
    assert ceiling([finding(d, 4.0) for d in rng.normal(0, 2.0, 50).tolist()]) < 0.5
    assert ceiling([finding(0.0, 1.0)] * 4) == 0
