"""Loss by length: the growth is the mean of each cluster's own difference, and verdicts follow it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lowbit.study.analyses.long_context import Found, growth, panel

LENGTHS, DEPTHS, SEEDS = (256, 1024), (0.0, 0.5, 1.0), 10


def found(label: str, slope: float, seed: int = 0) -> Found:
    """Items whose answers lose ``slope`` nat for each doubling of the length, with noise that a cluster shares."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.3, SEEDS)
    rows = [(n, d, s) for s in range(SEEDS) for n in LENGTHS for d in DEPTHS]
    length, depth, cluster = (np.array(column) for column in zip(*rows, strict=True))
    nll = slope * np.log2(length / 256) + shared[cluster] + rng.normal(0, 0.1, len(rows))
    before = (rng.random(len(rows)) < 0.9).astype(np.float64)
    return Found(label, length, depth.astype(np.float64), cluster, before, before * (nll < 0.8), nll)


def test_growth_is_a_paired_difference_of_each_cluster() -> None:
    one = found("kv", 0.5)
    grown = growth(one)
    assert grown is not None
    each = [
        one.nll[(one.cluster == c) & one.at(1024)].mean() - one.nll[(one.cluster == c) & one.at(256)].mean()
        for c in range(SEEDS)
    ]
    oracle = stats.ttest_1samp(each, 0).confidence_interval()
    assert [grown.estimate, grown.low, grown.high] == pytest.approx([np.mean(each), oracle.low, oracle.high])


def test_one_length_has_no_growth() -> None:
    one = found("kv", 0.5)
    short = one.at(256)
    assert growth(Found("kv", *(column[short] for column in one[1:]))) is None


def test_claims_and_maps_follow_the_items() -> None:
    shown = panel("long-0", "Long contexts", [found("kv2", 0.5), found("kv8", 0.0)])
    assert [(c.claim.split(":")[0], c.verdict) for c in shown.claims] == [("kv2", "supported"), ("kv8", "undecided")]
    assert [len(t.table.rows) for t in shown.tables] == [4]
    heat = next(f for f in shown.figures if f.key == "map-0")
    assert {(s.x, s.y) for s in heat.squares} == {(f"{n}", f"{d:g}") for n in LENGTHS for d in DEPTHS}  # type: ignore[union-attr]
    assert "kv2: at 1024 tokens" in shown.lead[0]
