"""Tasks in a study: what its file says of them, their cells, and what its table and JSON show of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit import digest
from lowbit.cli.run import run_grids
from lowbit.cli.tables import show_reports
from lowbit.errors import StudyError
from lowbit.evaluation.metrics.items import read_items
from lowbit.evaluation.tasks import registry
from lowbit.study import assemble, grid, spec, task_table, tasks
from lowbit.study.store import Store

RECIPES = ["rtn:int4-g32", "rtn:int2-g32"]


def choice(i: int) -> dict[str, Any]:
    """Choices of one length that mean nothing: a random model is near the edge on many, and rounding turns some."""
    words = [digest.of_value([i, k])[:6] for k in range(3)]
    return {"id": f"c/{i}", "context": f"Is {i} odd?", "choices": words, "answer": i % 3}


@pytest.fixture(scope="module")
def file(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two recipes, a named task, and one of its own beside it."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "data" / "basic").mkdir(parents=True)
    for name in ("data/basic/copa.jsonl", "own.jsonl"):
        (folder / name).write_text("".join(json.dumps(choice(i)) + "\n" for i in range(24)))
    (folder / "text.txt").write_text("".join(f"In year {i} the river fell by {i * i % 89} feet.\n" for i in range(40)))
    (folder / "study.toml").write_text(
        f'name = "asked"\nmodels = [{json.dumps(str(llama))}]\nrecipes = {json.dumps(RECIPES)}\n'
        '[evaluation]\ntext = "text.txt"\nprotocol = "windows-32"\nwindows = 4\ndtype = "float32"\n'
        '[tasks]\nrun = ["copa", "own.jsonl"]\ndata = "$OWN_DATA"\nlimit = 20\n'
    )
    return folder / "study.toml"


@pytest.fixture(scope="module")
def done(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[grid.Grid, Path]:
    """The grid of the study and the store that holds all of it; read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWN_DATA", str(file.parent / "data"))
        study = spec.load(file)
        (planned,) = grid.of_study(study)
        folder = tmp_path_factory.mktemp("store")
        assert run_grids(folder, study.name, study.model_dump(), [planned], 1) == 0
        assert [one.cells for one in grid.of_study(study)] == [planned.cells]  # nothing is left when it runs again
    return planned, folder


def test_tasks_are_cells_of_the_study(done: tuple[grid.Grid, Path]) -> None:
    planned, folder = done
    assert planned.tasks is not None
    assert len(planned.cells) == 2 + 2 * 2 + 2 * (2 + 2)  # tokens; then two tasks of reference, floor, candidates
    assert len({cell.label for cell in planned.cells}) == len(planned.cells)
    assert {member.role for member in planned.members} >= {"llama/task", "llama/score"}
    made = {entry.label: entry.make for entry in planned.entries}
    for version in planned.tasks.versions:
        make = made[version.label]
        assert make is not None
        for name, cell in version.cells.items():
            assert cell.inputs == (planned.tasks.reference[name].key, make.key)
            with Store(folder) as store:
                assert (store.cell(cell.key).output or {})["items"] == 20


def test_answers_are_those_of_a_comparison_of_the_same_checkpoints(
    done: tuple[grid.Grid, Path], llama: Path, file: Path, tmp_path: Path
) -> None:
    planned, folder = done
    assert planned.tasks is not None
    make = planned.entries[1].make
    assert make is not None
    with Store(folder) as store:
        checkpoint = store.checkpoint_folder(make.key)
        inside = task_table.table(store, planned.tasks).rows[RECIPES[1]]
    chosen = registry.choose(["copa"], file.parent / "data")
    settings = tasks.Settings(limit=20, dtype="float32")
    apart = tasks.of_directories(str(llama), {str(checkpoint): "it"}, chosen, settings)
    assert run_grids(tmp_path, "apart", {}, [apart], 1) == 0
    with Store(tmp_path) as store:
        outside = task_table.table(store, apart).rows["it"]
    fields = ("measure", "n", "reference", "candidate", "delta", "low", "high", "flips", "p", "floor")
    assert [[getattr(f, x) for x in fields] for f in inside if f.task == "copa"] == [
        [getattr(f, x) for x in fields] for f in outside
    ]


def test_the_table_and_the_json_show_them(done: tuple[grid.Grid, Path], capsys: pytest.CaptureFixture[str]) -> None:
    planned, folder = done
    show_reports(folder, "asked", [planned], "plain")
    table = capsys.readouterr().out
    assert table.index("KL") < table.index("\nTask ") < table.index("\nown ") < table.index("holm, 8 tests")
    show_reports(folder, "asked", [planned], "json")
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    found = {(f["task"], f["measure"]) for c in report["candidates"] for f in c["task_findings"]}
    assert found == {(t, m) for t in ("copa", "own") for m in ("accuracy", "accuracy per character")}


def test_lost_items_are_those_that_only_the_reference_got_right(done: tuple[grid.Grid, Path]) -> None:
    planned, folder = done
    assert planned.tasks is not None
    with Store(folder) as store:
        report = assemble.report(store, "asked", planned)
        lost = task_table.lost(store, planned.tasks, 1000)
        for version in planned.tasks.versions:
            expected = {}
            for name, cell in version.cells.items():
                before, _ = read_items(store.evidence_folder(planned.tasks.reference[name].key))
                after, _ = read_items(store.evidence_folder(cell.key))
                for i in np.flatnonzero((before.pred == before.gold) & (after.pred != after.gold)):
                    number = int(str(before.id[i])[2:])
                    words = choice(number)["choices"]
                    expected[name, number] = f" {words[before.gold[i]]}", f" {words[after.pred[i]]}"
            mine = lost[version.label]
            found = {(x.task, int(x.id[2:])): (x.reference_answer, x.candidate_answer) for x in mine}
            assert found == expected
            assert all(f"Is {x.id[2:]} odd?" in x.prompt or x.task == "copa" for x in mine)
            margins = [x.margin_ref for x in mine]
            assert margins == sorted(margins, reverse=True)
    assert any(lost.values())
    assert {c.label: c.lost_items for c in report.candidates} == {k: v[:20] for k, v in lost.items()}


LEAST = 'name = "s"\nmodels = ["m"]\nrecipes = ["rtn:nf4"]\n[tasks]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run = []", "tasks.run: List should have at least 1 item"),
        ('run = ["helaswag"]', "tasks.run: no task or family 'helaswag'[^\n]*\nTry: did you mean 'hellaswag'"),
        ('run = ["lines"]\nlimits = 3', "unknown field 'tasks.limits'\nTry: did you mean 'limit'"),
        ('run = ["lines"]\nlengths = [0]', "tasks.lengths.0: Input should be greater than or equal to 1"),
        ('run = ["trust"]', "tasks.data: trust is read from files, and the study does not say where"),
        ('run = ["copa"]\ndata = "nowhere"', "tasks.data: 'nowhere' is no folder that can be read"),
        (
            'run = ["copa"]\ndata = "$NOT_SET_HERE"',
            r"tasks.data: '\$NOT_SET_HERE' is no folder[^\n]*\nTry: set the env",
        ),
        ('run = ["gone.jsonl"]', "tasks.run: 'gone.jsonl' cannot be read"),
    ],
)
def test_mistakes_are_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(LEAST + text)
    with pytest.raises(StudyError, match=f"s.toml: {said}"):
        spec.load(path)


def test_generated_tasks_need_no_folder_and_files_are_found_beside_the_study(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(LEAST + 'run = ["long", "lm-eval:piqa", "own/"]\n')
    (tmp_path / "own").mkdir()
    (tmp_path / "long").mkdir()  # a family stays one beside a folder of its name
    found = spec.load(path).tasks
    assert found is not None
    assert found.run == ["long", "lm-eval:piqa", str(tmp_path / "own")]
