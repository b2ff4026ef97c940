"""The panel of confidence on answers that are made up: known shifts, known miscalibration, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from answered_study import noisy, original, study
from scipy import special

from lowbit.errors import StudyError
from lowbit.report.panel import Curves, Panel
from lowbit.study.analyses import confidence, moved
from lowbit.study.analyses.answered import answered, contrast
from lowbit.study.view import View

N = 400
LOGITS, GOLD = original(N)
SHARP = {k: 2 * z for k, z in LOGITS.items()}
"""A temperature of 0.5: the same choices, too sure of them."""
WORSE = {k: z - 1.5 * (np.arange(z.shape[1]) == GOLD[k][:, None]) for k, z in LOGITS.items()}
"""The right choice is less likely by e^1.5 everywhere: log-odds move alike, whatever the confidence."""


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    candidates = {"same": LOGITS, "sharp": SHARP, "worse at 3": WORSE, "noisy": noisy(LOGITS, 0.3)}
    return study(tmp_path_factory.mktemp("store"), LOGITS, GOLD, candidates)


@pytest.fixture(scope="module")
def panel(view: View) -> Panel:
    (found,) = confidence.panels(view)
    return found


def row(panel: Panel, title: str, *names: str) -> dict[str, tuple[str, str]]:
    (table,) = (t.table for t in panel.tables if t.title == title)
    (found,) = (r for r in table.rows if tuple(c.main for c in r.cells[: len(names)]) == names)
    return {c.title: (cell.main, cell.sub) for c, cell in zip(table.columns, found.cells, strict=True)}


def verdicts(panel: Panel, label: str) -> dict[str, str]:
    return {c.claim.removeprefix(f"{label}: "): c.verdict for c in panel.claims if c.claim.startswith(f"{label}: ")}


def test_shifts_are_means_over_the_questions_of_all_tasks(panel: Panel) -> None:
    def p_true(logits: dict[int, np.ndarray]) -> np.ndarray:
        return np.concatenate([special.softmax(z, 1)[np.arange(N), GOLD[k]] for k, z in logits.items()])

    expected = 100 * (p_true(WORSE) - p_true(LOGITS))
    found = row(panel, "Confidence beside the original", "worse at 3")
    assert found["Questions"] == (str(2 * N), "2 tasks")
    assert float(found["p(true)"][0].replace("−", "-")) == pytest.approx(expected.mean(), abs=0.06)
    assert found["Shown to differ"][0].startswith("accuracy lower, p(true) lower")
    alone = row(panel, "Confidence task by task", "copa", "worse at 3")
    assert float(alone["p(true)"][0].replace("−", "-")) == pytest.approx(expected[N:].mean(), abs=0.06)


def test_what_is_not_there_is_not_shown(panel: Panel) -> None:
    assert row(panel, "Confidence beside the original", "same")["Shown to differ"][0] == "nothing"
    assert set(verdicts(panel, "same").values()) == {"undecided"}
    assert "same: nothing is shown to differ" in " ".join(panel.lead)


def test_a_sharpened_model_is_surer_less_calibrated_and_no_less_right(panel: Panel) -> None:
    shown = row(panel, "Confidence beside the original", "sharp")["Shown to differ"][0]
    assert "confidence higher" in shown
    assert "entropy lower" in shown
    assert "accuracy" not in shown
    found = verdicts(panel, "sharp")
    assert found["calibration becomes worse"] == "supported"
    assert found["answers become less certain, entropy over the choices rises"] == "contradicted"
    calibrated = row(panel, "Calibration", "sharp")
    reference = row(panel, "Calibration", "m (original)")
    assert calibrated["Shown to differ"][0].startswith("squared gap higher, slope lower")
    slopes = [float(r["Slope"][0].replace("−", "-")) for r in (reference, calibrated)]
    assert slopes[0] == pytest.approx(1, abs=0.25)
    assert slopes[1] == pytest.approx(slopes[0] / 2, rel=0.1)
    ece = [float(r["ECE, equal mass"][0].replace("−", "-")) for r in (reference, calibrated)]
    assert abs(ece[0]) < 4
    assert ece[1] > ece[0] + 4


def test_the_softmax_moves_the_unsure_more_where_log_odds_move_alike(panel: Panel, view: View) -> None:
    found = verdicts(panel, "worse at 3")
    assert found["the right answer becomes less probable"] == "supported"
    assert found["probabilities move more where the original was unsure"] == "supported"
    assert found["and not by the softmax's slope alone: log-odds too"] != "supported"
    assert "by 1.5 times or more" in found
    assert "by 1.5 times or more" not in verdicts(panel, "noisy")
    version = next(v for v in answered(view.models[0]).versions if v.label == "worse at 3")
    part = version.pooled()
    assert part is not None
    thirds = moved.thirds_of(part)
    assert thirds is not None
    assert [g.log_odds.estimate for g in thirds.groups] == pytest.approx([1.5] * 3, rel=1e-3)
    assert len(np.unique(part.reference.cluster)) == N  # pairs of questions, of two tasks


def test_a_contrast_has_the_error_of_two_independent_means() -> None:
    rng = np.random.default_rng(3)
    value, inside = rng.normal(size=300), np.arange(300) < 100
    found = contrast(value, inside, ~inside, np.arange(300), weight=2.0)
    a, b = value[inside], value[~inside]
    assert found.estimate == pytest.approx(a.mean() - 2 * b.mean())
    assert found.se**2 == pytest.approx((a.var() / 100 + 4 * b.var() / 200) * 300 / 299)


def test_curves_and_what_was_left_out(panel: Panel) -> None:
    curves = {f.key: f for f in panel.figures if isinstance(f, Curves)}
    assert curves["reliability"].diagonal
    own = [m for m in curves["reliability"].marks if m.series == "m (original)"]
    assert len(own) == 10
    assert sum(m.low <= m.x <= m.high for m in own) >= 8
    assert {m.series for m in curves["shift"].marks} == {"same", "sharp", "worse at 3", "noisy"}
    assert "Left out: truthfulqa_mc2: its questions do not have one right choice each." in panel.notes


def test_a_study_without_choices_is_told_what_it_lacks(view: View, tmp_path: Path) -> None:
    model = view.models[0]
    bare = View("bare", [replace(model, grid=replace(model.grid, tasks=None))])
    with pytest.raises(StudyError, match=r"'confidence' reads the answers.*\n.*\[tasks\]"):
        confidence.panels(bare)
