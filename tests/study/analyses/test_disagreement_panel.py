"""The panel of disagreement on answers that are made up: counts, rankings, inputs and cascades by brute force."""

from __future__ import annotations

import re

import numpy as np
import pytest
from answered_study import BYTES, noisy, original, study
from scipy import special

from lowbit.report.panel import Curves, Panel
from lowbit.study.analyses import cascades, disagreement
from lowbit.study.analyses.answered import answered
from lowbit.study.view import View

N = 1500
LOGITS, GOLD = original(N)
NOISY = noisy(LOGITS, 0.3)
CHANGED = {k: LOGITS[k].argmax(1) != NOISY[k].argmax(1) for k in LOGITS}


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    return study(tmp_path_factory.mktemp("store"), LOGITS, GOLD, {"noisy": NOISY, "same": LOGITS})


@pytest.fixture(scope="module")
def panel(view: View) -> Panel:
    (found,) = disagreement.panels(view)
    return found


def rows(panel: Panel, title: str) -> list[dict[str, tuple[str, str]]]:
    (table,) = (t.table for t in panel.tables if t.title == title)
    return [{c.title: (x.main, x.sub) for c, x in zip(table.columns, r.cells, strict=True)} for r in table.rows]


def margins(logits: dict[int, np.ndarray]) -> np.ndarray:
    found = []
    for z in logits.values():
        p = np.sort(special.softmax(z, 1), 1)
        found.append(p[:, -1] - p[:, -2])
    return np.concatenate(found)


def test_changes_are_counted_by_what_they_did(panel: Panel) -> None:
    floor, noisy_row, same = rows(panel, "Changed answers")
    assert floor["Changed"] == ("0", f"0 of {2 * N}")
    changed = np.concatenate(list(CHANGED.values()))
    lost = sum(int(((LOGITS[k].argmax(1) == GOLD[k]) & CHANGED[k]).sum()) for k in LOGITS)
    gained = sum(int(((NOISY[k].argmax(1) == GOLD[k]) & CHANGED[k]).sum()) for k in LOGITS)
    counts = [noisy_row[kind][0] for kind in ("Lost", "Gained", "Other")]
    assert counts == [str(lost), str(gained), str(int(changed.sum()) - lost - gained)]
    assert float(noisy_row["Changed"][0]) == pytest.approx(100 * changed.mean(), abs=0.06)
    order = np.argsort(margins(LOGITS), kind="stable")[: 2 * N // 5]
    held = 100 * changed[order].sum() / changed.sum()
    assert float(noisy_row["Of them in the least sure fifth"][0]) == pytest.approx(held, abs=0.6)
    assert (same["Lost"][0], same["Of them in the least sure fifth"][0]) == ("0", "–")
    by_task = {(r["Task"][0], r["Version"][0]): r for r in rows(panel, "Changed answers task by task")}
    assert float(by_task["copa", "noisy"]["Changed"][0]) == pytest.approx(100 * CHANGED[2].mean(), abs=0.06)


def test_the_margin_foretells_changes_and_a_model_that_changes_nothing_has_no_claims(panel: Panel) -> None:
    (ranked,) = rows(panel, "What foretells a changed answer")
    assert ranked["Questions"] == (str(N), f"{int(CHANGED[4].sum())} changed")  # two choices rank alike: left out
    assert ranked["Shown to differ"][0] == "margin above least confidence, entropy, gini"
    verdicts = {c.claim.partition(": ")[2]: c.verdict for c in panel.claims}
    assert all(c.claim.startswith("noisy: ") for c in panel.claims)
    assert verdicts["the margin foretells changed answers best of four uncertainties"] == "supported"
    assert verdicts["changed answers have closer first and second probabilities"] == "supported"
    assert verdicts["the least sure fifth changes 3 times as often as all, or more"] == "supported"
    assert verdicts["the original on the 10 % that are least sure undoes 40 % of the changes or more"] == "supported"


def test_the_inputs_to_look_at_are_changed_ones_with_their_texts(panel: Panel) -> None:
    found = rows(panel, "Changed questions that the original was least sure of")
    assert len(found) == 8
    assert {r["Version"][0] for r in found} == {"noisy"}
    shown = [float(r["Margin of the original"][0]) for r in found]
    changed = np.concatenate(list(CHANGED.values()))
    assert shown == pytest.approx(np.sort(margins(LOGITS)[changed])[:8], abs=6e-4)
    for r in found:
        name, number = r["Task"][1].split("/")
        k, i = {"arc_easy": 4, "copa": 2}[name], int(number)
        assert r["Question"][0] == f"Question {i} of {name}"
        assert r["Original"][0] == f"answer {LOGITS[k][i].argmax()}"
        assert r["Candidate"] == (
            f"answer {NOISY[k][i].argmax()}", "right" if NOISY[k][i].argmax() == GOLD[k][i] else "wrong"
        )  # fmt: skip


def test_the_cascade_does_what_its_threshold_does(panel: Panel, view: View) -> None:
    first, second = rows(panel, "A cascade that agrees on 99 %")
    margin = float(first["Margin"][0])
    below = margins(NOISY) < margin
    agreed = below | ~np.concatenate(list(CHANGED.values()))
    assert agreed.mean() == pytest.approx(0.99, abs=0.01)  # of all questions; it was chosen on half of them
    escalated, cost = float(first["Escalated"][0]), float(first["Bytes read"][0])
    assert escalated == pytest.approx(100 * below.mean(), abs=4)
    assert cost == pytest.approx(100 * BYTES["other"] / BYTES["original"] + escalated, abs=1)
    assert re.fullmatch(r"lowbit generate \S+/checkpoints/[0-9a-f]{64} -p … --cascade /models/m,margin=\S+",
                        first["Command"][0])  # fmt: skip
    assert (float(second["Margin"][0]), float(second["Escalated"][0])) == (0, 0)
    assert any(
        line == "same needs no cascade to agree with the original on 99 % of the questions." for line in panel.lead
    )
    curve = next(f for f in panel.figures if isinstance(f, Curves) and f.key == "cascade")
    ends = [m for m in curve.marks if m.series == "noisy"]
    assert [ends[0].x, ends[-1].x, ends[-1].value] == pytest.approx([25, 125, 100])
    route = cascades.routes(view.models[0], answered(view.models[0]).versions)[0]
    assert route.choices[cascades.WANTED].chosen.outcome.estimate >= cascades.WANTED
