"""Metrics of generated texts on texts whose numbers can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics import generations as gen
from lowbit.evaluation.metrics.generations import END, Texts


def texts(rows: list[list[int]], stopped: list[bool], prompt: list[int] | None = None, nll: float = 1.0) -> Texts:
    steps = max(map(len, rows))
    token = np.array([row + [END] * (steps - len(row)) for row in rows], np.int32)
    values = np.where(token == END, 0, nll).astype(np.float32)
    n = len(rows)
    return Texts(
        np.array(prompt or range(n), np.int32), np.zeros(n, np.int32), token, np.array(stopped), values, 2 * values
    )


def test_repetition_distinct_and_loops_by_hand() -> None:
    once, loop = list(range(30)), [7, 8, 9] + [1, 2] * 14
    t = texts([once, loop, [5, 5]], [False, False, True])
    grams = [tuple(loop[i : i + 4]) for i in range(len(loop) - 3)]
    assert gen.repetition(t).tolist() == pytest.approx([0, 1 - len(set(grams)) / len(grams), 0])
    assert gen.loops(t).tolist() == [0, 1, 0]
    pairs = [tuple(r[i : i + 2]) for r in (once, loop, [5, 5]) for i in range(len(r) - 1)]
    assert gen.distinct(t) == pytest.approx(len(set(pairs)) / len(pairs))
    assert gen.level("runaway", t).estimate == pytest.approx(2 / 3)
    assert gen.level("length", t).estimate == pytest.approx((30 + 31 + 2) / 3)
    assert gen.level("text_nll_ref", t).estimate == pytest.approx(2)
    nearly = texts([[*range(8), *([1, 2] * 11), 3]], [False])
    assert gen.loops(nearly).tolist() == [0]


def test_shorter_runs_are_starts_of_longer_ones() -> None:
    t = texts([[1, 2, 3, 4], [1, 2]], [True, True])
    short = t.first(3)
    assert short.length.tolist() == [3, 2]
    assert short.stopped.tolist() == [False, True]


def test_shifts_average_within_a_prompt_before_they_count_prompts() -> None:
    a = texts([[1] * 4, [1] * 4, [1] * 4], [True] * 3, [0, 0, 1])
    b = texts([[1] * 8, [1] * 6, [1] * 5], [True] * 3, [0, 0, 1])
    found = gen.shift("length", a, b)
    assert found.estimate == pytest.approx((3 + 1) / 2)  # prompt 0: mean of 4 and 2; prompt 1: 1
    assert (found.n, found.clusters) == (3, 2)
    with pytest.raises(EvidenceError, match="other prompts"):
        gen.shift("length", a, texts([[1]] * 3, [True] * 3, [0, 1, 2]))


def test_settings_join_as_one_set_with_the_clusters_of_their_prompts() -> None:
    rows = [[1, 2], [3, 4], [5, 6]]
    base, other = (texts(rows, [False] * 3, nll=nll) for nll in (1.0, 1.5))
    more = texts(rows, [False] * 3, nll=3.0)
    both, after = gen.joined([base, base]), gen.joined([other, more])
    shift = gen.shift("text_nll", both, after)
    assert (shift.n, shift.clusters, shift.estimate) == (6, 3, pytest.approx((0.5 + 2) / 2))
    assert gen.shift_by_prompt("text_nll", both, after).tolist() == pytest.approx([1.25] * 3)
    assert after.length.tolist() == [2] * 6


def test_divergence_sees_ends_as_tokens() -> None:
    a = texts([[1, 2, 3], [1, 2, 9], [1, 2]], [True, False, True])
    b = texts([[1, 2, 3], [1, 5, 9], [1, 2, 4]], [True, False, True])
    d = gen.divergence(a, b)
    assert d.position.tolist() == [3, 2, 3]
    assert d.diverged.tolist() == [False, True, True]
