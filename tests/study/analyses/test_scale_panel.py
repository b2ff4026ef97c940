"""Scale against precision in worlds where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_family import COST, family

from lowbit.study.analyses.scale import ASKED, duels, of_family
from lowbit.study.contrasts import base_of
from lowbit.study.laws import scale_or_precision


def test_four_bits_beat_more_and_two_lose() -> None:
    (panel,) = of_family(family())
    assert [c.verdict for c in panel.claims] == ["supported"] * 3
    (panel,) = of_family(family({**COST, 4: 1.5, 2: 0.021}))
    assert [c.verdict for c in panel.claims] == ["contradicted"] * 3
    equal, measured = panel.tables
    assert len(equal.table.rows) == 3 * 2 + 3 * 3
    assert all("nats" not in cell.main for row in measured.table.rows for cell in row.cells)


def test_the_larger_precision_is_read_at_the_bytes_of_the_smaller_version() -> None:
    made = family()
    found = duels(made, base_of(made), ASKED[0], "total")
    loss = {(v.model, v.label): made.loss(i).estimate for i, v in enumerate(made.versions)}
    curve = sorted((v.total, loss[v.model, v.label]) for v in made.versions if v.label == "rtn:int4-g64")
    assert len(found) == 3
    for d in found:
        assert d.measured.estimate == pytest.approx(
            loss[d.larger.model, d.larger.label] - loss[d.smaller.model, "16 bit"]
        )
        if d.smaller.total > curve[-1][0]:
            assert d.equal is None
            assert d.best("below", "total") == d.measured  # it takes fewer bytes, and is still better
            assert d.best("above", "total") is None
            continue
        read = np.interp(np.log(d.smaller.total), np.log([x for x, _ in curve]), [y for _, y in curve])
        assert d.equal is not None
        assert d.equal.estimate == pytest.approx(float(read) - loss[d.smaller.model, "16 bit"])
    assert any(d.equal is None for d in found)


def test_a_larger_model_must_beat_every_rival_within_its_bytes() -> None:
    made = family({**COST, 8: 0.0})
    rows = scale_or_precision(made.points(), made.losses)
    for m in rows:
        within = [p for p in made.points() if p.model == m.smaller.model and p.nbytes <= m.larger.nbytes]
        assert m.rivals == len(within)
        assert m.smaller.loss == pytest.approx(min(p.loss for p in within))
        assert m.verdict == "undecided" or (m.verdict == "larger") == (m.difference.estimate < 0)
