"""Fewest bits for a budget: shares that are lost, tasks that cannot be lost, and what is shown of few models."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowbit.evaluation.statistics import Interval, paired_mean
from lowbit.study.analyses.budgets import TEXT, Lost, able, mean, of_losses, of_nats
from lowbit.study.family import Form
from lowbit.study.laws import fewest

FORMS = {
    "W8": Form(8.0, 16.0, 16.0), "W4": Form(4.0, 16.0, 16.0), "W3": Form(3.0, 16.0, 16.0),
    "W8A8": Form(8.0, 8.0, 16.0), "W4A8": Form(4.0, 8.0, 16.0), "KV8": Form(16.0, 16.0, 8.0),
    "KV4": Form(16.0, 16.0, 4.0), "KV2": Form(16.0, 16.0, 2.0),
}  # fmt: skip
COST = {"W8": 0.0, "W4": 0.012, "W3": 0.09, "W8A8": 0.001, "W4A8": 0.014, "KV8": 0.0, "KV4": 0.03, "KV2": 0.6}


def interval(estimate: float, se: float = 0.002) -> Interval:
    return Interval(estimate, estimate - 2 * se, estimate + 2 * se, se, 1000, 40, "made up")


def losses(models: int = 8, noise: float = 0.002) -> list[Lost]:
    rng = np.random.default_rng(0)
    return [
        Lost(f"m{i}", form, name.lower(), TEXT, interval(COST[name] + noise * rng.normal()), "a text")
        for i in range(models)
        for name, form in FORMS.items()
    ]


def test_names_and_kinds_of_what_is_low_bit() -> None:
    assert {name: form.name for name, form in FORMS.items()} == {name: name for name in FORMS}
    assert [FORMS[name].kind for name in ("W4", "W4A8", "KV4")] == ["W", "WA", "KV"]
    assert Form(16.0, 16.0, 16.0).kind == Form(4.0, 16.0, 4.0).kind == ""


def test_the_table_gives_the_widths_of_a_known_world() -> None:
    (panel,) = of_losses(losses())
    rows = {(r.cells[0].main, r.cells[1].main): [c.main for c in r.cells[3:]] for r in panel.tables[0].table.rows}
    assert rows["weights", "all, as a sample"] == ["W4", "W4", "W3"]
    assert rows["weights and activations", "all, as a sample"] == ["W4A8", "W4A8", "W4A8"]
    assert rows["keys and values", "all, as a sample"] == ["KV8", "KV4", "KV4"]
    assert rows["keys and values", "m0"] == ["KV8", "KV4", "KV4"]
    assert [c.verdict for c in panel.claims] == ["supported", "supported"]
    worse = [x._replace(loss=interval(0.2)) if x.form.name == "KV4" else x for x in losses()]
    (panel,) = of_losses(
        [x._replace(loss=x.loss._replace(estimate=x.loss.estimate + i * 1e-4)) for i, x in enumerate(worse)]
    )
    assert [c.verdict for c in panel.claims] == ["supported", "contradicted"]
    assert of_losses([]) == []


def test_two_models_show_little_and_say_so() -> None:
    (panel,) = of_losses(losses(2, 0.02))
    assert "undecided" in {c.verdict for c in panel.claims}
    assert any("few models" in note for note in panel.notes)
    assert len({c.key for c in panel.figures}) == len(panel.figures) == 1


def test_a_width_must_not_pass_where_a_larger_one_fails() -> None:
    losses = {(8.0, "W8"): interval(0.0), (4.0, "W4"): interval(0.04), (3.0, "W3"): interval(0.01)}
    found = {r.budget: r for r in fewest("W", losses)}
    assert (found[0.02].name, found[0.02].hopeful_name) == ("W8", "W3")
    assert found[0.05].name == "W3"


def test_the_share_of_probability_that_nats_take() -> None:
    d = np.random.default_rng(1).normal(0.1, 0.2, 400)
    change = paired_mean(d, np.arange(400))
    share = of_nats(change)
    assert share.estimate == pytest.approx(1 - math.exp(-d.mean()))
    assert 1 - math.exp(-change.low) == pytest.approx(share.low)
    drawn = [1 - math.exp(-np.random.default_rng(i).choice(d, 400).mean()) for i in range(400)]
    assert share.se == pytest.approx(np.std(drawn), rel=0.15)
    two = mean([interval(0.1, 0.03), interval(0.3, 0.04)])
    assert (two.estimate, two.se) == pytest.approx((0.2, 0.025))


def test_tasks_at_chance_have_nothing_to_lose() -> None:
    from lowbit.evaluation.metrics.items import Items

    def items(score: np.ndarray, choices: int) -> Items:
        n = len(score)
        flat, words = np.zeros(n), np.array([str(i) for i in range(n)])
        columns = {name: flat for name in ("pred", "gold", "margin", "length")}
        many = np.zeros(n * choices)
        return Items.of({
            **columns, "id": words, "group": words, "cluster": np.arange(n), "doc_hash": words, "prompt_hash": words,
            "starts": np.arange(n + 1) * choices, "logprob": many, "tokens": many, "chars": many, "true": many,
            "role": many, "score": score, "stop_reason": words, "parse_ok": flat, "answer": words, "text": words,
            "written_starts": np.zeros(n + 1), "written": np.zeros(0),
        })  # fmt: skip

    rng = np.random.default_rng(2)
    assert able(items((rng.random(200) < 0.4).astype(float), 4))
    assert not able(items((rng.random(200) < 0.4).astype(float), 2))
    assert not able(items(np.zeros(50), 4))
