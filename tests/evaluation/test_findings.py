"""Findings on evidence whose truth is known: identical, noisy, slightly and clearly damaged models."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from lowbit.errors import EvidenceError, RecipeError
from lowbit.evaluation import findings as fd
from lowbit.evaluation import statistics as st
from lowbit.evaluation.findings import Finding, Margins, adjust, findings, from_json, to_json
from lowbit.evaluation.metrics.agreement import Flips
from lowbit.evaluation.metrics.base import Tokens

DELTA, KL, KEPT, ACCURACY = "delta_log_perplexity", "kl", "top1_kept", "delta_top1_accuracy"


def make(
    kl: float, delta: float, flip: float, *, gained: float = 0.5, chunks: int = 40, size: int = 100, seed: int = 0
) -> Tokens:
    """A model ``delta`` nats worse with a share ``flip`` of changed choices; the text and reference never vary."""
    text, rng, n = np.random.default_rng(99), np.random.default_rng(seed), chunks * size
    chunk = np.repeat(np.arange(chunks), size)
    token, nll_ref = text.integers(0, 50, n), text.gamma(2, 1.5, n)
    top1_ref = np.where(text.random(n) < 0.5, token, 60)
    now_wrong, now_right = np.where(top1_ref == token, 70, token), np.where(top1_ref == token, 70, 71)
    changed = rng.random(n) < flip
    shift = delta + rng.normal(0, 2 * abs(delta), n) + rng.normal(0, abs(delta) / 2, chunks)[chunk]
    return Tokens.of(
        {
            "doc": np.zeros(n),
            "chunk": chunk,
            "pos": np.tile(np.arange(size), chunks),
            "token": token,
            "nll": nll_ref + shift,
            "nll_ref": nll_ref,
            "kl": kl * rng.gamma(0.5, 2, n) * rng.gamma(20, 1 / 20, chunks)[chunk],
            "top1": np.where(changed, np.where(rng.random(n) < gained, now_wrong, now_right), top1_ref),
            "top1_ref": top1_ref,
            "margin_ref": text.random(n),
            "top1_p": rng.random(n),
            "entropy_ref": text.gamma(2, 1, n),
        }
    )


def by_metric(rows: list[Finding]) -> dict[str, Finding]:
    return {f.metric: f for f in rows}


FLOOR = make(kl=4e-4, delta=1e-4, flip=0.004, seed=50)
CLEAR = make(kl=0.02, delta=0.05, flip=0.08, gained=0.1, seed=1)


def test_a_damaged_model_is_worse_and_many_times_the_floor() -> None:
    rows = by_metric(findings(CLEAR, FLOOR))
    assert list(rows) == [DELTA, KL, KEPT, ACCURACY]
    assert [rows[m].verdict for m in (DELTA, KEPT, ACCURACY)] == ["worse"] * 3
    times = float(CLEAR.kl.mean() / FLOOR.kl.mean())
    assert rows[KL].verdict == f"{times:.0f}x floor"
    assert 40 < times < 60
    assert rows[KEPT].value == pytest.approx(100 * float(np.mean(CLEAR.top1 == CLEAR.top1_ref)))
    assert rows[ACCURACY].unit == "pp"
    assert rows[ACCURACY].value < 0
    flips = rows[ACCURACY].flips
    assert flips is not None
    assert f"lost {flips.lost} / gained {flips.gained} / other {flips.other}" in rows[ACCURACY].note
    for f in rows.values():
        assert (f.n, f.clusters, f.rule) == (4000, 40, "holm, 4 tests")
        assert f.low <= f.value <= f.high
        assert f.floor is not None
        assert "noise floor" in f.note


def test_the_sign_of_the_effect_tells_better_from_worse() -> None:
    better = make(kl=0.02, delta=-0.05, flip=0.08, gained=0.9, seed=2)
    text_choice = np.where(better.top1 != better.top1_ref, better.token, better.top1)
    rows = by_metric(findings(Tokens.of(better.columns() | {"top1": text_choice})))
    assert (rows[DELTA].verdict, rows[ACCURACY].verdict) == ("better", "better")
    assert rows[KEPT].verdict == "worse"  # keeping fewer choices is never better


@pytest.mark.parametrize("floor", [None, FLOOR], ids=["no floor", "floor"])
@pytest.mark.parametrize("chunks", [2, 40])
def test_an_identical_model_is_the_same_in_every_row_and_nothing_is_nan(floor: Tokens | None, chunks: int) -> None:
    zero = make(kl=0.0, delta=0.0, flip=0.0)
    columns = [t.columns() for t in (zero, FLOOR)]
    few, few_floor = (Tokens.of({k: v[: chunks * 100] for k, v in c.items()}) for c in columns)
    rows = findings(few, None if floor is None else few_floor)
    assert [f.verdict for f in rows] == ["same"] * 4
    assert [f.value for f in rows] == [0, 0, 100, 0]
    for f in rows:
        assert all(x is None or np.isfinite(x) for x in (f.value, f.low, f.high, f.p, f.p_adjusted, f.mde, f.effect))
        assert "identical" in f.note
        assert from_json(to_json(f)) == f


def test_no_flip_among_few_tokens_does_not_show_sameness() -> None:
    few, many = make(0.001, 0.001, 0.0, chunks=4, size=25), make(0.001, 0.001, 0.0, chunks=40, size=25)
    assert by_metric(findings(few))[ACCURACY].verdict == "unclear"  # 0 of 100: up to 3.6 % may flip
    assert by_metric(findings(many))[ACCURACY].verdict == "same"
    assert by_metric(findings(many))[ACCURACY].p_same == pytest.approx(0.99**1000)


def test_a_difference_within_the_margin_is_the_same_and_owns_up_to_being_real() -> None:
    slight = make(kl=0.001, delta=0.002, flip=0.002, seed=3)
    f = by_metric(findings(slight))[DELTA]
    assert f.verdict == "same"
    assert f.p_adjusted is not None
    assert f.p_adjusted < 0.05
    assert "within 0.01 nat (TOST p < 0.001)" in f.note
    assert "a real but smaller difference" in f.note
    assert by_metric(findings(slight, margins=Margins(log_perplexity=0.001)))[DELTA].verdict == "worse"


def test_what_cannot_be_told_is_unclear_and_says_what_could_have_been() -> None:
    noisy = make(kl=0.02, delta=0.02, flip=0.1, chunks=3, size=40, seed=4)
    f = by_metric(findings(noisy))[DELTA]
    assert f.verdict == "unclear"
    assert f.mde is not None
    assert f.mde > abs(f.value)
    assert f"would have found {f.mde:.2g} nat with 80 % power" in f.note


def test_kl_against_the_floor() -> None:
    def verdict(scale: float, seed: int = 60) -> str:
        return by_metric(findings(make(kl=scale * 4e-4, delta=1e-4, flip=0.004, seed=seed), FLOOR))[KL].verdict

    assert verdict(1.0) == "within noise"
    assert verdict(0.5) == "within noise"  # shown to be below the floor, which is no multiple of it
    assert by_metric(findings(FLOOR, FLOOR))[KL].verdict == "within noise"
    assert verdict(3.0).endswith("x floor")
    assert 2.5 < float(verdict(3.0).split("x")[0]) < 3.5
    assert verdict(1e6) == ">9999x floor"
    few = [Tokens.of({k: v[:200] for k, v in t.columns().items()}) for t in (CLEAR, FLOOR)]
    assert by_metric(findings(few[0], few[1]))[KL].verdict == "unclear"  # two windows: 50 times means nothing yet


def test_kl_without_a_floor_or_with_none_to_speak_of_has_no_multiple() -> None:
    zero = make(kl=0.0, delta=0.0, flip=0.0)
    bare, exact = by_metric(findings(CLEAR))[KL], by_metric(findings(CLEAR, zero))[KL]
    assert (bare.verdict, bare.p, bare.floor) == ("above zero", None, None)
    assert "no noise floor measured" in bare.note
    assert (exact.verdict, exact.p, exact.floor) == ("above zero", None, 0)
    assert "noise floor exactly 0" in exact.note


def test_top1_kept_is_compared_with_what_the_floor_keeps() -> None:
    unstable = make(kl=4e-4, delta=1e-4, flip=0.05, seed=51)
    candidate = Tokens.of(unstable.columns() | {"kl": unstable.kl * 2})
    assert by_metric(findings(candidate))[KEPT].verdict == "worse"
    against = by_metric(findings(candidate, unstable))[KEPT]
    assert against.effect == 0
    assert against.floor == pytest.approx(against.value)
    assert against.p == 1
    assert against.verdict == "same"


def test_single_tokens_as_clusters_take_the_exact_mcnemar_test() -> None:
    items = Tokens.of(CLEAR.columns() | {"doc": np.arange(4000), "chunk": np.arange(4000)})
    f = by_metric(findings(items))[ACCURACY]
    assert f.flips is not None
    assert (f.test, f.p) == ("exact McNemar", st.mcnemar(f.flips.lost, f.flips.gained))


def test_p_and_interval_come_from_the_clusters() -> None:
    f = by_metric(findings(CLEAR))[DELTA]
    d = CLEAR.nll.astype(np.float64) - CLEAR.nll_ref
    expected = st.paired_mean(d, CLEAR.chunk)
    assert (f.value, f.low, f.high) == expected[:3]
    assert f.p == st.p_value(expected)
    assert f.p_same == st.tost(expected, 0.01)


def test_adjust_counts_every_test_of_the_table() -> None:
    rows = findings(CLEAR, FLOOR)
    barely = replace(rows[0], p=0.02, p_same=0.9, effect=0.05)
    assert adjust({"a": [barely]})["a"][0].verdict == "worse"
    nulls = [replace(barely, p=0.5 + k / 100) for k in range(9)]
    table = adjust({"a": [barely], "b": nulls, "c": []})
    assert list(table) == ["a", "b", "c"]
    assert table["a"][0].p_adjusted == pytest.approx(0.2)
    assert table["a"][0].verdict == "unclear"
    assert table["a"][0].rule == "holm, 10 tests"
    assert len(table["b"]) == 9
    assert table["c"] == []
    again = adjust({"a": table["a"]})
    assert again["a"][0].verdict == "worse"  # adjustment starts from the raw p every time


def test_adjust_by_benjamini_hochberg_claims_at_least_as_much_and_names_itself() -> None:
    rows = findings(CLEAR, FLOOR)
    table = {"a": [replace(rows[0], p=p, p_same=0.9) for p in (0.01, 0.02, 0.03, 0.04)]}
    assert [f.verdict for f in adjust(table)["a"]] == ["worse", "unclear", "unclear", "unclear"]
    explored = adjust(table, "benjamini-hochberg")["a"]
    assert [f.verdict for f in explored] == ["worse"] * 4
    assert explored[0].rule == "benjamini-hochberg, 4 tests"


def test_tests_of_equivalence_are_adjusted_too() -> None:
    f = replace(findings(CLEAR)[0], p=0.6, p_same=0.03)
    assert adjust({"a": [f]})["a"][0].verdict == "same"
    assert adjust({"a": [f, f]})["a"][0].verdict == "unclear"


def test_rows_without_a_test_do_not_count_and_stay_without() -> None:
    rows = adjust({"a": findings(CLEAR)})["a"]
    kl_row = by_metric(rows)[KL]
    assert kl_row.p_adjusted is None
    assert kl_row.rule == "holm, 3 tests"


def test_json_round_trip_is_exact_and_plain() -> None:
    for f in [*findings(CLEAR, FLOOR), *findings(CLEAR)]:
        text = to_json(f)
        assert from_json(text) == f
        assert set(json.loads(text)) == set(asdict(f))
    flips = json.loads(to_json(findings(CLEAR)[3]))["flips"]
    assert Flips(**flips) == findings(CLEAR)[3].flips
    assert list(flips) == ["lost", "gained", "other"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metric": "kl", "colour": 1}', "null"])
def test_what_is_no_finding_is_refused(text: str) -> None:
    with pytest.raises(EvidenceError, match="not a finding"):
        from_json(text)


def test_floor_at_other_tokens_is_refused() -> None:
    with pytest.raises(EvidenceError, match="differ in 'doc'"):
        findings(CLEAR, make(kl=4e-4, delta=1e-4, flip=0.004, chunks=39))


def test_one_window_is_refused_with_the_way_out() -> None:
    with pytest.raises(EvidenceError, match="score at least two windows"):
        findings(Tokens.of({k: v[:100] for k, v in CLEAR.columns().items()}))


def test_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'holm'"):
        adjust({"a": findings(CLEAR)}, rule="hom")


def test_false_claims_stay_rare_over_many_null_tables() -> None:
    """Forty tables of noise-only candidates: a claim of difference beyond the margin should almost never appear."""
    wrong = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        columns = FLOOR.columns() | {
            "nll": FLOOR.nll_ref + rng.normal(0, 0.3, 4000) + np.repeat(rng.normal(0, 0.1, 40), 100)
        }
        rows = findings(Tokens.of(columns), FLOOR)
        wrong += any(f.verdict in ("worse", "better") or f.verdict.endswith("x floor") for f in rows)
    assert wrong <= 4
    assert fd.ALPHA == 0.05
