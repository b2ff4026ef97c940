"""The automaton's tables: what makes a code, what it costs, and that planning finds cheap ones."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit import _native
from lowbit.codec import tables


def planned(counts: np.ndarray, lowest: int = 0) -> tuple[tables.Table, float]:
    low, shift, symbols, bits = _native.plan(counts.astype(np.uint64), lowest)
    return tables.table(low, shift, symbols.astype(np.int64)), bits


def even_spread(frequencies: np.ndarray) -> np.ndarray:
    """The textbook's spread: the k-th state of a symbol at (k + 1/2) / f."""
    at = np.concatenate([(np.arange(f) + 0.5) / f for f in frequencies])
    return np.repeat(np.arange(len(frequencies)), frequencies)[np.argsort(at, kind="stable")]


def test_each_symbols_states_read_every_state_once() -> None:
    """What makes it decodable: from the states of one symbol, the next states partition all 128."""
    table, _ = planned(np.array([3, 50, 300, 900, 310, 44, 2]))
    for s in np.unique(table.symbol):
        reached = [base + np.arange(1 << bits) for base, bits in zip(table.base, table.bits, strict=True)]
        of_symbol = np.concatenate([reached[i] for i in np.flatnonzero(table.symbol == s)])
        assert sorted(of_symbol.tolist()) == list(range(128))


def test_expected_bits_are_what_a_long_message_takes() -> None:
    rng = np.random.default_rng(0)
    p = np.array([0.02, 0.2, 0.5, 0.25, 0.03])
    table, _ = planned((p * 1e6).astype(np.int64))
    where = {(s, before): state for state, s in enumerate(table.symbol) for before in
             range(table.base[state], table.base[state] + (1 << table.bits[state]))}  # fmt: skip
    state, spent, n = 0, 0, 60_000
    for s in rng.choice(len(p), n, p=p):
        state = where[int(s), state]
        spent += int(table.bits[state])
    assert spent / n == pytest.approx(tables.expected_bits(table, p), rel=0.01)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0, 3.0])
def test_the_tuned_spread_beats_the_even_one_and_the_plan_knows_its_cost(sigma: float) -> None:
    k = np.arange(-12, 13)
    p = np.exp(-0.5 * (k / sigma) ** 2)
    p /= p.sum()
    counts = np.round(p * 1e7).astype(np.int64)
    table, bits = planned(counts)
    folded = np.zeros(int(table.symbol.max()) + 1)
    np.add.at(folded, np.clip(np.arange(len(p)) - table.low, 0, len(folded) - 1), counts / counts.sum())
    exact = tables.expected_bits(table, folded)
    frequencies = np.bincount(table.symbol)
    even = tables.expected_bits(tables.table(0, 0, even_spread(frequencies)), folded)
    assert exact < even
    outside = counts[np.clip(np.arange(len(p)) - table.low, 0, len(folded) - 1) != np.arange(len(p)) - table.low].sum()
    assert table.shift == 0
    assert counts.sum() * exact + 16 * outside <= bits * 1.0001 <= 1.0002 * (counts.sum() * exact + 34 * outside)
    assert bits < 1.012 * -(p * np.log2(p)).sum() * counts.sum()


def test_frequencies_are_the_best_ones() -> None:
    """No move of one state from a symbol to another lowers the cross entropy."""
    counts = np.array([5, 100, 1000, 4000, 1100, 90, 7]) * 100
    table, _ = planned(counts)
    f = np.bincount(table.symbol, minlength=7).astype(float)
    p = counts[table.low : table.low + len(f)] / counts.sum()
    if len(p) == 7:
        best = -(p * np.log2(f)).sum()
        for i in range(7):
            for j in range(7):
                if i != j and f[i] > 1:
                    moved = f.copy()
                    moved[i] -= 1
                    moved[j] += 1
                    assert -(p * np.log2(moved)).sum() >= best - 1e-12
    assert len(p) == 7


def test_gaps_get_no_states() -> None:
    counts = np.zeros(40, np.int64)
    counts[::8] = [10, 200, 500, 200, 10]
    table, _ = planned(counts, lowest=-20)
    assert set(np.unique(table.symbol)) == {0, 8, 16, 24, 32}
    assert (table.low, table.shift) == (-20, 0)


@pytest.mark.parametrize(("values", "lowest"), [(1, -32768), (1, 32767), (65536, -32768), (2, -1)])
def test_extreme_ranges_have_a_table(values: int, lowest: int) -> None:
    table, bits = planned(np.full(values, 1000), lowest)
    assert (table.low << table.shift) >= -32768
    assert ((table.low + int(table.symbol.max()) + 1) << table.shift) - 1 <= 32767
    assert bits <= 1000 * values * np.log2(values) * 1.0001 + 1e-6


def test_nothing_counted_has_a_table() -> None:
    table, bits = planned(np.zeros(5, np.int64))
    assert bits == 0
    assert not table.symbol.any()
