"""Outliers of a made-up model: verdicts and intervals against scipy, maps that show every tensor, experts together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lowbit.errors import StudyError
from lowbit.report.panel import Heat
from lowbit.study.analyses.outliers import panel, panels
from lowbit.study.outliers import CACHE, Tail, What
from lowbit.study.view import View

LAYERS = 6
LINEARS = {"attn.q": 64, "mlp.experts.0.up": 64, "mlp.experts.1.up": 64, "mlp.down": 256}


def tail(what: What, layer: int, kind: str, kurtosis: float, *, peak: float = 2.0, held: float | None = None) -> Tail:
    beyond = 0.0 if held is None else 0.01
    return Tail(what, layer, kind, 1000, LINEARS.get(kind, 32), 5.0, 1.0, kurtosis, beyond, held, peak)


def model() -> list[Tail]:
    rng = np.random.default_rng(0)
    found = []
    for layer in range(LAYERS):
        for i, kind in enumerate(LINEARS):
            found.append(tail("W", layer, kind, 3.1 + 0.1 * rng.random()))
            heavy = (6 + i) * (20 if kind == "mlp.down" else 1) * np.exp(rng.normal(0, 0.1))
            found.append(tail("A", layer, kind, heavy, held=0.3))
        found.append(tail("K", layer, CACHE, 8 * np.exp(rng.normal(0, 0.1)), peak=9.0 + rng.random()))
        found.append(tail("V", layer, CACHE, 8 * np.exp(rng.normal(0, 0.5)), peak=2.0 + rng.random()))
    return found


def test_verdicts_and_intervals() -> None:
    tails = model()
    shown = panel("o-0", "Outliers", tails, 512)
    verdicts = {c.claim.partition(":")[0] + c.claim.rpartition(":")[2]: c.verdict for c in shown.claims}
    assert list(verdicts.values()) == [
        "supported",  # A over W
        "supported",  # W near Gaussian
        "supported",  # the way down
        "undecided",  # kurtosis of K over V
        "supported",  # channels of K over V
        "contradicted",  # few channels hold more than half: 30 % here
    ]
    logs = {(t.what, t.layer, t.kind): np.log(t.kurtosis) for t in tails}
    by_layer = [np.mean([logs["A", n, k] - logs["W", n, k] for k in LINEARS]) for n in range(LAYERS)]
    oracle = stats.ttest_1samp(by_layer, 0).confidence_interval()
    ends = [float(x) for x in shown.claims[0].found.partition("[")[2].partition("]")[0].split(",")]
    assert ends == pytest.approx([np.exp(oracle.low), np.exp(oracle.high)], rel=0.02)


def test_maps_and_tables_name_every_kind_once() -> None:
    tails = model()
    shown = panel("o-0", "Outliers", tails, 512)
    kurtosis, peak = (f for f in shown.figures if isinstance(f, Heat))
    assert kurtosis.log
    assert peak.log
    kinds = ["W q", "A q", "W up", "A up", "W down", "A down", "K", "V"]
    assert [row.cells[0].main for row in shown.tables[0].table.rows] == kinds
    assert len(kurtosis.squares) == len(kinds) * LAYERS
    most = max(t.kurtosis for t in tails if t.what == "A" and t.layer == 2 and "experts" in t.kind)
    assert next(s.value for s in kurtosis.squares if (s.x, s.y) == ("A up", "2")) == most
    worst = max(tails, key=lambda t: t.kurtosis)
    assert f"inputs of mlp.down, layer {worst.layer}" in shown.lead[1]


def test_one_layer_makes_no_claims() -> None:
    shown = panel("o-0", "Outliers", [t for t in model() if t.layer == 0], 512)
    assert not shown.claims
    assert shown.lead


def test_a_study_without_outliers_says_what_it_needs() -> None:
    with pytest.raises(StudyError, match=r"\[outliers\]"):
        panels(View("s", []))
