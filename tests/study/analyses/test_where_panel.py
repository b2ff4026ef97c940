"""Where the loss is, against the same sums in numpy and scipy on made-up tokens."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lowbit.evaluation.metrics.base import Tokens
from lowbit.report.model import BlockKL, Candidate
from lowbit.report.panel import Heat
from lowbit.study.analyses.where import FIFTHS, fifths, later_half, panel, place_of

WINDOWS, LENGTH = 24, 64


def tokens(unsure: float, late: float, seed: int = 0) -> Tokens:
    """KL and flips grow by ``unsure`` where the margin is small, and KL by ``late`` in the later half of a window."""
    rng = np.random.default_rng(seed)
    n = WINDOWS * LENGTH
    chunk, pos = np.repeat(np.arange(WINDOWS), LENGTH), np.tile(np.arange(LENGTH), WINDOWS)
    margin = rng.permutation(n) / n
    kl = rng.exponential(1.0, n) * (1 + unsure * (margin < 0.2)) * (1 + late * (pos >= LENGTH // 2))
    top1 = (rng.random(n) < 0.02 + 0.4 * unsure / 10 * (margin < 0.2)).astype(int)
    zero = np.zeros(n)
    return Tokens.of({
        "doc": chunk, "chunk": chunk, "pos": pos, "token": zero, "nll": kl, "nll_ref": zero, "kl": kl, "top1": top1,
        "top1_ref": zero, "margin_ref": margin, "top1_p": margin, "entropy_ref": 1 - margin,
    })  # fmt: skip


def candidate(label: str, blocks: tuple[BlockKL, ...] = ()) -> Candidate:
    return Candidate(label, "m", label, "d", 1, 3.0, 0.0, 0, kl_by_block=blocks)


def test_fifths_are_shares_of_the_whole() -> None:
    one = tokens(10.0, 0.0)
    found = list(fifths(one))
    kl, margin = one.kl.astype(np.float64), one.margin_ref
    rank = stats.rankdata(margin, "ordinal") - 1
    for k, fifth in enumerate(found):
        rows = rank * FIFTHS // len(kl) == k
        assert fifth.share.estimate == pytest.approx(kl[rows].sum() / kl.sum())
        assert fifth.kl.estimate == pytest.approx(kl[rows].mean())
        assert fifth.changed.estimate == pytest.approx((one.top1 != one.top1_ref)[rows].mean())
        assert (fifth.low, fifth.high) == (margin[rows].min(), margin[rows].max())
    assert sum(f.share.estimate for f in found) == pytest.approx(1)


def test_the_later_half_is_paired_by_window() -> None:
    one = tokens(0.0, 1.0)
    found = later_half(one)
    assert found is not None
    kl = one.kl.reshape(WINDOWS, LENGTH).astype(np.float64)
    oracle = stats.ttest_rel(kl[:, LENGTH // 2 :].mean(1), kl[:, : LENGTH // 2].mean(1)).confidence_interval()
    assert [found.low, found.high] == pytest.approx([oracle.low, oracle.high])


def test_verdicts_maps_and_blocks() -> None:
    blocks = (BlockKL(0, 0.3, 0.25, 0.35), BlockKL(1, 0.1, 0.05, 0.15))
    given = [(candidate("a", blocks), tokens(10.0, 1.0)), (candidate("b"), tokens(0.0, 0.0, 1))]
    places = [place for c, t in given if (place := place_of(c, t)) is not None]
    shown = panel("where-0", "Where", places, floor=0.01)
    found = {label: [c.verdict for c in shown.claims if c.claim.startswith(f"{label}:")] for label in "ab"}
    assert found == {"a": ["supported"] * 3, "b": ["undecided"] * 3}
    assert "block 0 alone costs most, 0.30 [0.25, 0.35] nat, apart from block 1" in shown.lead[-1]
    heats = {f.key: f for f in shown.figures if isinstance(f, Heat)}
    assert set(heats) == {"blocks", "map-0", "map-1"}
    one = given[0][1]
    rank = (stats.rankdata(one.margin_ref, "ordinal") - 1) * FIFTHS // len(one)
    rows = (one.pos >= 8) & (one.pos < 16) & (rank == 0)
    square = next(s for s in heats["map-0"].squares if (s.x, s.y) == ("8–15", "1 (least sure)"))
    assert square.value == pytest.approx(one.kl[rows].mean())
    assert {s.x for s in heats["map-0"].squares} == {"0–7", "8–15", "16–31", "32–63"}


def test_a_version_without_loss_has_no_place() -> None:
    same = tokens(0.0, 0.0)
    lossless = Tokens.of(same.columns() | {"kl": np.zeros(len(same))})
    assert place_of(candidate("same"), lossless) is None
