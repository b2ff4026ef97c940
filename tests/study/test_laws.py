"""Laws of a family: the envelope against brute force and a known world, equal bytes, and loss budgets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowbit.errors import StudyError
from lowbit.study import laws
from lowbit.study.laws import Point, Relative


def family(se: float = 0.005) -> list[Point]:
    """A known world: loss falls with parameters, and rises as bits go: 2 bits ruin, 4 cost little, 16 nothing."""
    cost = {"2": 1.5, "3": 0.20, "4": 0.03, "8": 0.001, "16": 0.0}
    return [
        Point(f"m{n}", n, bits, round(n * float(bits) / 8), 6 - 0.35 * math.log(n / 1e6) + rise, se)
        for n in (2_000_000, 4_000_000, 8_000_000, 16_000_000, 32_000_000)
        for bits, rise in cost.items()
    ]


def test_the_envelope_is_the_lowest_curve_by_brute_force() -> None:
    points = family()
    best = laws.envelope(points)
    curves = {b: sorted((p.nbytes, p.loss) for p in points if p.precision == b) for b in ("2", "3", "4", "8", "16")}
    for b in best:
        here = {
            name: float(np.interp(math.log(b.nbytes), np.log([x for x, _ in c]), [y for _, y in c]))
            for name, c in curves.items()
            if c[0][0] <= b.nbytes <= c[-1][0]
        }
        assert b.precision == min(here, key=here.__getitem__)
        assert b.loss == pytest.approx(here[b.precision])
        assert b.low < b.loss < b.high
        assert b.chance > 0.5
    middle = [b for b in best if 2e6 <= b.nbytes <= 8e6]
    assert {b.precision for b in middle} <= {"3", "4"}  # never 8 or 16 where 3 and 4 span the size


def test_doubt_about_losses_is_doubt_about_the_best() -> None:
    at = [4_000_000]
    (sure,), (vague,) = (laws.envelope(family(se), at) for se in (0.001, 0.2))
    assert sure.chance > 0.99
    assert not sure.rivals
    assert vague.chance < 0.9
    assert vague.rivals
    two = [Point("a", 1, p, 10, 1.0, 0.1) for p in "xy"] + [Point("b", 2, p, 20, 0.5, 0.1) for p in "xy"]
    assert laws.envelope(two, [15])[0].chance == pytest.approx(0.5, abs=0.03)
    with pytest.raises(StudyError, match="no two precisions"):
        laws.envelope([Point("a", 1, "x", 10, 1.0, 0.1)])


def test_at_equal_bytes_the_larger_model_wins_in_4_bits_and_loses_in_2() -> None:
    found = laws.scale_or_precision(family())
    points = {(p.model, p.precision): p for p in family()}
    for m in found:
        assert m.smaller.nbytes <= m.larger.nbytes
        rivals = [p for p in points.values() if p.model == m.smaller.model and p.nbytes <= m.larger.nbytes]
        assert m.difference.estimate == pytest.approx(m.larger.loss - min(p.loss for p in rivals))
    by_bits = {b: [m.verdict for m in found if m.larger.precision == b] for b in ("2", "4")}
    assert by_bits["4"] == ["larger"] * 4
    assert by_bits["2"] == ["smaller"] * 4
    assert {m.verdict for m in laws.scale_or_precision(family(1.0))} == {"undecided"}


def test_budgets_ask_for_what_is_shown_and_name_what_may_do() -> None:
    rng = np.random.default_rng(0)
    means = {8: 0.0, 4: 0.011, 3: 0.078, 2: 0.52}
    spread = {8: 0.004, 4: 0.004, 3: 0.06, 2: 0.2}
    rows = [Relative("W", b, f"m{i}", means[b] + spread[b] * rng.normal()) for b in means for i in range(10)]
    found = {r.budget: r for r in laws.recommend(rows)}
    assert found[0.02].bits == 4
    assert found[0.05].bits == 4
    assert found[0.10].bits in (3, 4)
    noisy = [r._replace(loss=r.loss + (0.2 if r.model == "m0" else 0) * (r.bits == 3)) for r in rows]
    assert {r.budget: r.hopeful for r in laws.recommend(noisy)}[0.10] in (3, None)
    loss = found[0.02].loss
    assert loss is not None
    assert loss.estimate == pytest.approx(np.mean([r.loss for r in rows if r.bits == 4]))
    with pytest.raises(StudyError, match="one model"):
        laws.recommend([Relative("KV", 4, "m", 0.1)])


def test_a_width_is_recommended_wrongly_at_most_at_its_level() -> None:
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(200):  # the mean loss at 4 bits is the budget itself: it is not within
        rows = [Relative("W", b, f"m{i}", m + 0.02 * rng.normal()) for b, m in ((8, 0.0), (4, 0.05)) for i in range(8)]
        wrong += laws.recommend(rows, [0.05])[0].bits == 4
    assert wrong / 200 < 0.08
