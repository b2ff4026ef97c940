"""Metrics of hand-made evidence, against loops over its rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics import agreement, kl, perplexity
from lowbit.evaluation.metrics.base import Tokens, quantile_group
from lowbit.evaluation.statistics import paired_mean


def make(chunks: int = 40, size: int = 50, flip: float = 0.1, seed: int = 0, docs: int | None = None) -> Tokens:
    """Evidence with ``flip`` of the choices changed, more where the reference is unsure, KL growing with position."""
    rng = np.random.default_rng(seed)
    n = chunks * size
    chunk = np.repeat(np.arange(chunks), size)
    pos = np.tile(np.arange(size), chunks)
    margin = rng.beta(1, 1.5, n)
    token = rng.integers(0, 50, n)
    top1_ref = np.where(rng.random(n) < 0.2 + 0.7 * margin, token, rng.integers(50, 90, n))
    changed = rng.random(n) < 2 * flip * (1 - margin)
    top1 = np.where(changed, np.where(rng.random(n) < 0.3, token, rng.integers(100, 120, n)), top1_ref)
    nll_ref = rng.gamma(2, 1.5, n)
    return Tokens.of(
        {
            "doc": np.zeros(n) if docs is None else chunk * docs // chunks,
            "chunk": chunk,
            "pos": pos,
            "token": token,
            "nll": nll_ref + rng.normal(flip, flip, n),
            "nll_ref": nll_ref,
            "kl": flip * rng.gamma(0.5, 1, n) * (1 + pos / size),
            "top1": top1,
            "top1_ref": top1_ref,
            "margin_ref": margin,
            "top1_p": rng.random(n),
            "entropy_ref": rng.gamma(2, 1, n),
        }
    )


def changed(tokens: Tokens, **columns: np.ndarray) -> Tokens:
    return Tokens.of(tokens.columns() | columns)


TOKENS = make()


def test_perplexity_is_the_exponential_of_the_mean_and_its_delta_is_paired() -> None:
    level, ref, delta = (
        perplexity.log_perplexity(TOKENS),
        perplexity.log_perplexity_ref(TOKENS),
        perplexity.delta(TOKENS),
    )
    assert level.estimate == pytest.approx(float(TOKENS.nll.astype(np.float64).mean()))
    assert delta.estimate == pytest.approx(level.estimate - ref.estimate)
    assert delta.se < level.se / 5  # what pairing is for
    assert delta.clusters == 40


def test_kl_mean_and_quantiles() -> None:
    mean = kl.mean(TOKENS)
    assert mean.estimate == pytest.approx(float(TOKENS.kl.astype(np.float64).mean()))
    assert mean.low < mean.estimate < mean.high
    got = kl.quantiles(TOKENS)
    assert [i.estimate for i in got] == pytest.approx(np.quantile(TOKENS.kl, kl.QUANTILES, method="inverted_cdf"))
    assert [round(i.estimate, 4) for i in kl.quantiles(TOKENS, (0.25,))] == [round(float(np.sort(TOKENS.kl)[499]), 4)]


def test_kl_interval_is_cut_at_zero_and_exact_zero_stays() -> None:
    spike = np.zeros(len(TOKENS))
    spike[3] = 1.0
    i = kl.mean(changed(TOKENS, kl=spike))
    assert i.low == 0
    assert i.estimate == pytest.approx(1 / 2000)
    assert kl.mean(changed(TOKENS, kl=0 * spike))[:4] == (0, 0, 0, 0)
    below = kl.mean(changed(TOKENS, kl=spike * 0 - 1e-9))  # rounding can put a KL just below 0
    assert below.low == below.estimate < 0


def test_kl_by_position_partitions_the_tokens() -> None:
    buckets = kl.by_position(TOKENS, (0, 10, 25))
    assert [(b.low, b.high) for b in buckets] == [(0, 9), (10, 24), (25, 49)]
    for b in buckets:
        inside = (TOKENS.pos >= b.low) & (TOKENS.pos <= b.high)
        assert b.interval.estimate == pytest.approx(float(TOKENS.kl[inside].astype(np.float64).mean()))
        assert b.interval.n == inside.sum()
    assert buckets[0].interval.high < buckets[2].interval.low  # the evidence was made to grow
    assert sum(b.interval.n for b in kl.by_position(TOKENS)) == len(TOKENS)


def test_positions_that_one_window_reaches_form_no_bucket() -> None:
    pos = np.where((TOKENS.chunk > 0) & (TOKENS.pos >= 25), 0, TOKENS.pos)
    assert len(kl.by_position(changed(TOKENS, pos=pos), (0, 10, 25))) == 2


def test_kl_by_confidence_has_equal_groups_in_order() -> None:
    buckets = kl.by_confidence(TOKENS)
    assert [b.interval.n for b in buckets] == [400] * 5
    assert all(a.high <= b.low for a, b in itertools.pairwise(buckets))
    assert kl.by_confidence(TOKENS, "entropy", bins=4)[0].low == pytest.approx(float(TOKENS.entropy_ref.min()))
    lowest = TOKENS.margin_ref <= np.float32(buckets[0].high)
    assert buckets[0].interval.estimate == pytest.approx(float(TOKENS.kl[lowest].astype(np.float64).mean()))


def test_quantile_groups_stay_equal_under_ties() -> None:
    assert list(quantile_group(np.zeros(7), 3)) == [0, 0, 0, 1, 1, 2, 2]
    assert list(quantile_group(np.array([3.0, 1.0, 2.0]), 3)) == [2, 0, 1]


def test_flips_are_counted_as_a_loop_counts_them() -> None:
    counts, expected = agreement.flips(TOKENS), {"lost": 0, "gained": 0, "other": 0}
    for now, before, target in zip(TOKENS.top1, TOKENS.top1_ref, TOKENS.token, strict=True):
        if now != before:
            expected["lost" if before == target else "gained" if now == target else "other"] += 1
    assert counts._asdict() == expected
    assert min(counts) > 0
    n = len(TOKENS)
    assert agreement.top1_kept(TOKENS).estimate == pytest.approx(1 - sum(counts) / n)
    assert agreement.delta_accuracy(TOKENS).estimate == pytest.approx((counts.gained - counts.lost) / n)
    assert agreement.top1_accuracy(TOKENS).estimate == pytest.approx(float(np.mean(TOKENS.top1 == TOKENS.token)))


def test_flip_rows_list_every_flip_with_the_most_surprising_first() -> None:
    rows, counts = agreement.flip_rows(TOKENS), agreement.flips(TOKENS)
    assert len(rows) == sum(counts)
    assert sum(r.kind == "lost" for r in rows) == counts.lost
    assert sum(r.kind == "gained" for r in rows) == counts.gained
    margins = [r.margin_ref for r in rows]
    assert margins == sorted(margins, reverse=True)
    assert agreement.flip_rows(TOKENS, 3) == rows[:3]
    r = rows[0]
    assert (TOKENS.top1[r.row], TOKENS.top1_ref[r.row], TOKENS.token[r.row]) == (r.top1, r.top1_ref, r.token)
    assert (TOKENS.doc[r.row], TOKENS.chunk[r.row], TOKENS.pos[r.row]) == (r.doc, r.chunk, r.pos)


def test_flips_live_where_the_reference_is_unsure() -> None:
    i = agreement.flips_in_lowest_margin(TOKENS)
    low = TOKENS.margin_ref <= np.sort(TOKENS.margin_ref)[399]
    flipped = TOKENS.top1 != TOKENS.top1_ref
    assert i is not None
    assert i.estimate == pytest.approx(float((low & flipped).sum() / flipped.sum()))
    assert i.low > 0.2  # a fifth of the tokens, more than a fifth of the flips
    assert agreement.flips_in_lowest_margin(changed(TOKENS, top1=TOKENS.top1_ref)) is None


def test_no_flip_among_n_tokens_still_leaves_an_interval() -> None:
    same = changed(TOKENS, top1=TOKENS.top1_ref)
    kept, delta = agreement.top1_kept(same), agreement.delta_accuracy(same)
    limit = 1 - 0.025 ** (1 / 2000)
    assert kept[:3] == pytest.approx((1, 1 - limit, 1))
    assert delta[:3] == pytest.approx((0, -limit, limit))
    assert kept.clusters == delta.clusters == 40
    assert agreement.flip_rows(same) == []


def test_clusters_are_the_coarser_of_document_and_window_with_thirty_of_them() -> None:
    assert len(np.unique(make(docs=None).cluster)) == 40  # one document: windows
    assert len(np.unique(make(docs=20).cluster)) == 40  # too few documents: windows
    assert len(np.unique(make(chunks=80, docs=40).cluster)) == 40  # documents of two windows: documents
    packed = changed(TOKENS, doc=np.arange(2000) // 10)  # five documents in a window: windows
    assert np.array_equal(packed.cluster, TOKENS.chunk)
    few = changed(make(chunks=10), doc=np.arange(500) // 10)
    assert len(np.unique(few.cluster)) == 50  # ten windows of five documents each: documents


def test_intervals_use_the_clusters() -> None:
    assert kl.mean(TOKENS)[:4] == paired_mean(TOKENS.kl.astype(np.float64), TOKENS.chunk)[:4]


def test_evidence_that_means_nothing_is_refused_by_column() -> None:
    columns = TOKENS.columns()
    with pytest.raises(EvidenceError, match=r"tokens\.nll: 2 of 2000 values are NaN"):
        changed(TOKENS, nll=np.where(np.arange(2000) < 2, np.nan, 1.0))
    with pytest.raises(EvidenceError, match="no column kl, top1"):
        Tokens.of({k: v for k, v in columns.items() if k not in ("kl", "top1")})
    with pytest.raises(EvidenceError, match=r"tokens\.pos: values of shape \(3,\) beside 2000"):
        changed(TOKENS, pos=np.arange(3))
    with pytest.raises(EvidenceError, match="beside 0 tokens"):
        Tokens.of({k: v[:0] for k, v in columns.items()})


def test_only_the_same_positions_may_be_paired() -> None:
    TOKENS.require_same_positions(make(seed=0, flip=0.1))
    with pytest.raises(EvidenceError, match="'token'"):
        TOKENS.require_same_positions(changed(TOKENS, token=TOKENS.token[::-1]))
    with pytest.raises(EvidenceError, match=r"'doc' \(2000 and 1950 tokens\)"):
        TOKENS.require_same_positions(make(chunks=39))


def test_identical_means_bit_for_bit() -> None:
    same = changed(TOKENS, nll=TOKENS.nll_ref, kl=np.zeros(2000), top1=TOKENS.top1_ref)
    assert same.identical
    assert not changed(same, kl=np.eye(1, 2000)[0]).identical
    assert not changed(same, nll=np.nextafter(TOKENS.nll_ref, np.float32(9))).identical


def test_of_casts_and_ignores_further_columns() -> None:
    again = Tokens.of({k: list(v) for k, v in TOKENS.columns().items()} | {"note": ["x"] * 2000})
    assert again.doc.dtype == np.int32
    assert again.kl.dtype == np.float32
    assert all(np.array_equal(a, b) for a, b in zip(again.columns().values(), TOKENS.columns().values(), strict=True))
