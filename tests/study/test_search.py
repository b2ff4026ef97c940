"""A search over recipes against brute force: every version asked everything, and the choice among those."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lowbit import digest
from lowbit.cli import main
from lowbit.cli.advise_search import asked
from lowbit.cli.run import running
from lowbit.errors import EvidenceError, RecipeError
from lowbit.evaluation.metrics.items import read_items
from lowbit.models.source import of_directory
from lowbit.study import advise_tasks, devices, grid, search
from lowbit.study.advise import Constraint
from lowbit.study.engine import Cell

RECIPES = "rtn:int8-row-sym;rtn:int3-g32;rtn:int2-g32"
ITEMS = 150


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that a random model is near the edge on, so that rounding turns some; and one of passages."""
    folder = tmp_path_factory.mktemp("data")

    def choice(i: int) -> dict[str, object]:
        words = [digest.of_value([i, k])[:5] for k in range(2)]
        return {"id": f"c/{i}", "context": f"{i}?", "choices": words, "answer": i % 2}

    (folder / "own.jsonl").write_text("".join(json.dumps(choice(i)) + "\n" for i in range(ITEMS)))
    return folder


def test_a_search_ends_where_asking_everything_would(llama: Path, data: Path, tmp_path: Path) -> None:
    study = asked(str(llama), RECIPES, [str(data / "own.jsonl")], None, None)
    source, (planned,) = of_directory(llama), grid.of_study(study)
    assert planned.tasks is not None
    most = {e.label: search._planned(source, e, 0, None)[0].nbytes for e in planned.entries}
    constraint = Constraint(memory=max(most.values()) - 1)  # int8 does not fit
    questions: list[int] = []
    with running(tmp_path, "advise", {}, 1) as run:

        def watched(cells: Sequence[Cell]) -> None:
            questions.extend(len(c.params["only"]) for c in cells if "only" in c.params)
            run(cells)

        def go(few: int, many: int) -> search.Found:
            return search.search(run.store, source, planned, constraint, few, many, watched)

        with pytest.raises(EvidenceError, match="too few to screen on 60"):
            go(60, ITEMS)
        found = go(50, ITEMS)
        done = sum(s.done for s in run.summaries)
        assert go(50, ITEMS).advice == found.advice
        assert sum(s.done for s in run.summaries) == done  # all of it is kept
        # brute force: full answers of the same checkpoints, in cells of their own
        full = [
            version.cells["own"] for version in planned.tasks.versions if version.label in {r.name for r in found.raced}
        ]
        run(full)
        base = read_items(run.store.evidence_folder(planned.tasks.reference["own"].key))[0]
        change = {
            r.name: float((read_items(run.store.evidence_folder(cell.key))[0].score - base.score).mean())
            for r, cell in zip(sorted(found.raced, key=lambda r: [*most].index(r.name)), full, strict=True)
        }
    assert (len(found.raced), found.items) == (2, ITEMS)
    assert any(change.values())
    for one in found.raced:
        assert one.confirmed is not None
        assert (one.screened.n, one.confirmed.n) == (50, ITEMS - len(_asked_before(found)))
        for told in (one.screened, one.confirmed):
            assert told.low <= change[one.name] <= told.high
    why = {r.option.label: r.why for r in found.advice.ruled_out}
    assert "too many; not made" in why["rtn:int8-row-sym"]
    assert found.advice.choice is not None
    options = {o.label: o for o in found.advice.front} | {r.option.label: r.option for r in found.advice.ruled_out}
    assert options["rtn:int3-g32"].loss.estimate == pytest.approx(
        -next(r.confirmed.estimate for r in found.raced if r.name == "rtn:int3-g32" and r.confirmed) / base.score.mean()
    )


def _asked_before(found: search.Found) -> set[int]:
    """How many items screening used: those that are left are all asked to confirm."""
    confirmed = found.raced[0].confirmed
    assert confirmed is not None
    return set(range(found.items - confirmed.n))


def test_stored_answers_give_the_share_of_the_score_that_is_lost(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowbit", *args])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    own, store = str(data / "own.jsonl"), str(tmp_path / "store")
    assert run("quantize", str(llama), "rtn:int2-g32", "-o", str(tmp_path / "two"))[0] == 0
    common = ("--tasks", own, "--store", store, "--limit", "60")
    code, out, _ = run("compare", str(llama), str(tmp_path / "two"), *common, "--json")
    (finding,) = [f for f in json.loads(out)["candidates"][0]["findings"] if f["measure"] == "accuracy"]
    code, out, _ = run("advise", str(llama), "--tasks", "own", "--store", store, "--device", "this", "--json")
    found = json.loads(out)
    options = {r["option"]["label"]: r["option"] for r in found["ruled_out"]} | {"taken": found["choice"]}
    assert (code, found["choice"]["label"], found["study"]) == (0, "original", "compare-tasks")
    assert options["two"]["loss"]["estimate"] == pytest.approx(-finding["delta"] / finding["reference"])
    assert options["two"]["rate"] > options["taken"]["rate"] > 0  # predicted from bytes and what was measured here
    code, _, err = run("advise", str(llama), "--tasks", "copa", "--store", store)
    assert (code, "was not asked copa" in err) == (1, True)
    code, _, err = run("advise", str(llama), "--search", "--store", store)
    assert (code, "--tasks" in err) == (1, True)
    code, _, err = run("advise", str(llama), "--device", "h20", "--store", store)
    assert (code, "h200" in err) == (1, True)


def test_the_loss_is_a_ratio_with_its_own_error() -> None:
    """Delta method against a bootstrap of clusters."""
    rng = np.random.default_rng(0)
    before = (rng.random(900) < 0.6).astype(np.float64)
    after = np.where(rng.random(900) < 0.1, 1 - before, before)
    pair = [((_items(before), _ASKED), (_items(after), _ASKED))]
    found = advise_tasks.lost(pair)
    rows = rng.integers(0, 900, (2000, 900))
    shares = 1 - after[rows].mean(1) / before[rows].mean(1)
    assert found.estimate == pytest.approx(1 - after.mean() / before.mean())
    assert found.se == pytest.approx(shares.std(), rel=0.1)
    with pytest.raises(EvidenceError, match="nothing right"):
        advise_tasks.lost([((_items(0 * before), _ASKED), (_items(after), _ASKED))])


def test_devices_have_the_makers_figures_and_unified_ones_give_three_quarters() -> None:
    assert devices.named("h200").bandwidth == 4.8e12
    assert devices.named("m2-ultra").usable == 144e9
    with pytest.raises(RecipeError, match="no device 'rtx-409'") as error:
        devices.named("rtx-409")
    assert "rtx-4090" in str(error.value)
    here = devices.this()
    assert here.memory > 1e8
    assert here.bandwidth is not None
    assert 1e8 < here.bandwidth < 1e13


def _items(score: np.ndarray) -> advise_tasks.Items:
    n = len(score)
    blank = np.full(n, "")
    zero, starts = np.zeros(n), np.zeros(n + 1)
    return advise_tasks.Items.of(
        {"id": [str(i) for i in range(n)], "group": blank, "cluster": np.arange(n), "doc_hash": blank,
         "prompt_hash": blank, "starts": starts, "logprob": [], "tokens": [], "chars": [], "true": [], "role": [],
         "pred": zero - 1, "gold": zero - 1, "score": score, "margin": zero, "length": zero, "stop_reason": blank,
         "parse_ok": zero == 0, "answer": blank, "text": blank, "written_starts": starts, "written": []}
    )  # fmt: skip


_ASKED = advise_tasks.ItemsProvenance("m", "m", "t", "d", "k", "float32")
