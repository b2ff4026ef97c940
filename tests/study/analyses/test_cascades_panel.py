"""The cascade token by token against brute force on made-up tokens, written into a store as a run would leave them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lowbit.evaluation.evidence import Provenance, write_tokens
from lowbit.evaluation.metrics.base import Tokens
from lowbit.report.model import Candidate, Environment, Report, ScoringProtocol
from lowbit.report.panel import Curves, Panel
from lowbit.study.analyse import analyse
from lowbit.study.engine import Cell
from lowbit.study.grid import Entry, Grid
from lowbit.study.rows import Usage
from lowbit.study.store import Store
from lowbit.study.view import Model, View
from lowbit.study.worker import Stage

WINDOWS, LENGTH = 40, 50
RNG = np.random.default_rng(0)
MARGIN = RNG.random(WINDOWS * LENGTH).astype(np.float32)
KEPT = RNG.random(WINDOWS * LENGTH) > 0.5 * (1 - MARGIN) ** 4


def tokens(kept: np.ndarray, margin: np.ndarray | None, windows: int = WINDOWS) -> Tokens:
    n = windows * LENGTH
    zero, chunk = np.zeros(n), np.repeat(np.arange(windows), LENGTH)
    columns = dict.fromkeys(("nll", "nll_ref", "kl", "top1_p", "entropy_ref", "margin_ref", "token", "top1_ref"), zero)
    columns |= {"doc": zero, "chunk": chunk, "pos": np.tile(np.arange(LENGTH), windows), "top1": ~kept[:n]}
    return Tokens.of(columns if margin is None else columns | {"margin": margin[:n]})


def view(folder: Path, scored: dict[str, Tokens]) -> View:
    """A comparison of candidates of 250 bytes with an original of 1000."""
    store, stage = Store(folder), Stage("made", "test_cascades_panel:nothing")
    entries, shown = [], []
    for label, found in scored.items():
        cell = Cell(stage, label, (), {"candidate": f"/made/{label}"})
        store.add_cell(cell.key, "made", label, [], cell.params, "")
        assert store.claim("me", key=cell.key) is not None
        store.evidence_folder(cell.key).mkdir(parents=True)
        write_tokens(store.evidence_folder(cell.key), found, Provenance(label, "", "", "", "", "", ""))
        store.finish(cell.key, "me", {}, Usage(0.0, 0.0, 0))
        entries.append(Entry(label, label, None, cell))
        shown.append(Candidate(label, "m", label, "", 250, 4.0, 0.0, 0))
    reference = Cell(stage, "original", (), {"model": "/models/m"})
    own = Candidate("original", "m", "none", "", 1000, 16.0, 0.0, 0, is_reference=True)
    protocol, environment = ScoringProtocol("", "", 0, 0, 0, 0, ""), Environment((), "")
    report = Report("m", "", "", "", own, tuple(shown), None, protocol, environment, "holm")
    return View("made", [Model(store, Grid("m", reference, reference, tuple(entries)), report)])


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> Panel:
    few = tokens(KEPT, MARGIN, windows=3)
    scored = {"low": tokens(KEPT, MARGIN), "same": tokens(KEPT | True, MARGIN), "old": tokens(KEPT, None), "few": few}
    (found,) = analyse(view(tmp_path_factory.mktemp("store"), scored), ["cascades"])
    return found


def test_the_margin_of_the_table_does_what_it_says(panel: Panel) -> None:
    (table,) = (t.table for t in panel.tables if not t.folded)
    rows = [{c.title: x.main for c, x in zip(table.columns, r.cells, strict=True)} for r in table.rows]
    assert [(r["Version"], r["Wanted"]) for r in rows[:3]] == [("low", "95"), ("low", "99"), ("low", "99.9")]
    for row in rows[:3]:
        margin, wanted = float(row["Margin"]), float(row["Wanted"])
        below = margin > MARGIN
        assert 100 * (below | KEPT).mean() == pytest.approx(wanted, abs=1)  # of all tokens; it was chosen on half
        assert float(row["Escalated"]) == pytest.approx(100 * below.mean(), abs=4)
        assert float(row["Agrees alone"]) == pytest.approx(100 * KEPT.mean(), abs=0.06)
        assert float(row["Bytes read"]) == pytest.approx(25 + float(row["Escalated"]), abs=1)
        command, _, margin = row["Command"].rpartition("=")
        assert command == "lowbit generate /made/low -p … --cascade /models/m,margin"
        assert f"{float(margin):.3g}" == row["Margin"]  # typed with more digits than shown
    assert [(r["Margin"], r["Command"]) for r in rows[3:]] == [("0", "lowbit generate /made/same -p …")] * 3
    assert panel.lead[1] == "same needs no cascade to agree with the original on 99 % of the tokens."


def test_the_curve_ends_at_the_two_models_alone(panel: Panel) -> None:
    (curve,) = (f for f in panel.figures if isinstance(f, Curves))
    mine = [m for m in curve.marks if m.series == "low"]
    assert [mine[0].x, mine[-1].x, mine[-1].value] == pytest.approx([25, 125, 100])
    assert mine[0].value == pytest.approx(100 * KEPT.mean())
    assert all(m.low <= m.value <= m.high for m in mine)
    assert [m.value for m in mine] == sorted(m.value for m in mine)


def test_evidence_that_cannot_say_is_named_with_what_to_do(panel: Panel, tmp_path: Path) -> None:
    assert panel.notes[-2] == "Left out: old, whose evidence does not hold its own margin: score it again."
    assert panel.notes[-1].startswith("Left out: few, scored on 3 clusters of text")
    (alone,) = analyse(view(tmp_path, {"old": tokens(KEPT, None)}), ["cascades"])
    assert alone.lead == (panel.notes[-2],)
    (nothing,) = analyse(View("made", []), ["cascades"])
    assert nothing.lead[0].startswith("Nothing to show")
