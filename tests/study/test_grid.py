"""From a study to cells: identities follow contents, labels tell candidates apart."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import family_model, save_model

from lowbit.errors import CalibrationError, ModelError, RecipeError, StudyError
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import parse
from lowbit.study import grid, stages
from lowbit.study.spec import Study

EVALUATION = {"text": "pydoc", "protocol": "windows-32", "windows": 4, "batch": 1, "dtype": "float32"}


def study(*models: Path, recipes: list[str], calibration: dict[str, Any] | None = None, **evaluation: Any) -> Study:
    return Study.model_validate(
        {
            "name": "s", "models": list(map(str, models)), "recipes": recipes, "calibration": calibration or {},
            "evaluation": {"protocol": "windows-32", "windows": 4, **evaluation},
        }
    )  # fmt: skip


def keys(found: grid.Grid) -> dict[str, str]:
    return {cell.label: cell.key for cell in found.cells}


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    path = tmp_path / "mixed.toml"
    path.write_text(
        '[[step]]\nmethod = "gptq"\nformat = "int4-g32"\n[[override]]\nsites = "*.down_proj"\nformat = "int8-row"\n'
        "[calibration]\nsamples = 3\n"
    )
    return str(path)


def test_the_cells_of_a_model_in_the_order_of_their_work(llama: Path) -> None:
    (found,) = grid.of_study(study(llama, recipes=["rtn:nf4", "gptq:int4-g32"], attribute=["gptq:int4-g32"]))
    assert [cell.label for cell in found.cells] == [
        "reference llama", "noise floor", "make rtn:nf4", "score rtn:nf4", "make gptq:int4-g32",
        "score gptq:int4-g32", "blocks of gptq:int4-g32",
    ]  # fmt: skip
    seen: set[str] = set()
    for cell in found.cells:
        assert seen.issuperset(cell.inputs)
        seen.add(cell.key)
    assert [member.role for member in found.members][:3] == ["llama/reference", "llama/floor", "llama/quantize"]
    assert len({cell.affinity for cell in found.cells}) == 1


def test_keys_follow_what_is_computed(llama: Path, tmp_path: Path) -> None:
    recipes = ["rtn:nf4", "gptq:int4-g32"]
    before = keys(grid.of_study(study(llama, recipes=recipes))[0])
    assert keys(grid.of_study(study(llama, recipes=recipes[::-1]))[0]) == before

    def changed(**changes: Any) -> set[str]:
        after = keys(grid.of_study(study(llama, recipes=recipes, **changes))[0])
        return {label for label, key in before.items() if after[label] != key}

    scoring = {"reference llama", "noise floor", "score rtn:nf4", "score gptq:int4-g32"}
    assert changed(windows=5) == changed(batch=2) == scoring
    assert changed(calibration={"samples": 5}) >= {"make gptq:int4-g32", "score gptq:int4-g32"}
    (tmp_path / "text.txt").write_text("some text")
    assert changed(text=str(tmp_path / "text.txt")) == scoring
    assert changed(dtype="bfloat16") == set(before)


def test_a_changed_weight_changes_every_key(tmp_path: Path, tokenizer: Any) -> None:
    root = save_model(family_model("llama"), tokenizer, tmp_path / "model")
    before = keys(grid.of_study(study(root, recipes=["rtn:nf4"]))[0])
    shutil.rmtree(root)
    save_model(family_model("llama", seed=1), tokenizer, root)
    after = keys(grid.of_study(study(root, recipes=["rtn:nf4"]))[0])
    assert set(before) == set(after)
    assert not set(before.values()) & set(after.values())


def test_a_recipe_file_keeps_its_own_calibration(llama: Path, mixed: str) -> None:
    shared = {"samples": 9, "length": 24}
    (found,) = grid.of_study(study(llama, recipes=[mixed, "gptq:int4-g32"], calibration=shared))
    by_label = {entry.label: entry.make for entry in found.entries}
    assert set(by_label) == {"mixed", "gptq:int4-g32"}
    made = {label: make.params["recipe"]["calibration"] for label, make in by_label.items() if make is not None}
    assert (made["mixed"]["samples"], made["mixed"]["length"]) == (3, 24)
    assert (made["gptq:int4-g32"]["samples"], made["gptq:int4-g32"]["length"]) == (9, 24)
    assert found.entries[0].recipe == "gptq:int4-g32+1"


def test_two_models_have_cells_of_different_names(llama: Path, families: dict[str, Path]) -> None:
    grids = grid.of_study(study(llama, families["mistral"], recipes=["rtn:nf4"]))
    labels = [cell.label for one in grids for cell in one.cells]
    assert len(set(labels)) == len(labels) == 8
    assert labels[3] == "llama: score rtn:nf4"


def test_models_of_one_name_are_told_apart_by_their_paths(llama: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(llama, tmp_path / "other" / "llama")
    assert [one.model for one in grid.of_study(study(llama, twin, recipes=["rtn:nf4"]))] == [str(llama), str(twin)]


@pytest.mark.parametrize(
    ("recipes", "said"),
    [
        (["rtn:nf4", "rtn:nf4"], "'rtn:nf4' is named twice"),
        (["gptq:nf4,clip=3,damp=0.1", "gptq:nf4,damp=0.1,clip=3"], "are one recipe"),
        (["a/mixed.toml", "b/mixed.toml"], "have one label: mixed"),
        (["a/mixed.toml", "gptq:int4-g32"], "are one recipe"),
    ],
)
def test_recipes_that_are_or_look_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipes: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, fmt in (("a", "int4-g32"), ("b", "int3-g32")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mixed.toml").write_text(f'[[step]]\nmethod = "gptq"\nformat = "{fmt}"\n')
    with pytest.raises(StudyError, match=said):
        grid.of_study(study(llama, recipes=recipes))


def test_mistakes_are_found_before_any_work(llama: Path) -> None:
    with pytest.raises(StudyError, match="which the study does not make"):
        grid.of_study(study(llama, recipes=["rtn:nf4"], attribute=["rtn:nf5"]))
    with pytest.raises(StudyError, match="is named twice"):
        grid.of_study(study(llama, llama, recipes=["rtn:nf4"]))
    with pytest.raises(RecipeError, match="did you mean 'nf4'"):
        grid.of_study(study(llama, recipes=["rtn:nf5"]))
    with pytest.raises(RecipeError, match="unknown protocol"):
        grid.of_study(study(llama, recipes=["rtn:nf4"], protocol="window-3"))
    with pytest.raises(CalibrationError, match="is no readable text file"):
        grid.of_study(study(llama, recipes=["rtn:nf4"], text="nowhere.txt"))
    with pytest.raises(CalibrationError, match="is no readable text file"):
        grid.of_study(study(llama, recipes=["gptq:nf4"], calibration={"text": "nowhere.txt"}))
    with pytest.raises(ModelError, match="does not exist"):
        grid.of_study(study(llama / "nowhere", recipes=["rtn:nf4"]))


def test_candidates_that_exist_already(llama: Path, tmp_path: Path) -> None:
    source, recipe = of_directory(llama), parse("rtn:nf4")
    stages.make(source, recipe, tmp_path / "out", torch.float32, lambda *_: None)
    found = grid.of_directories(str(llama), [str(tmp_path / "out"), str(llama)], EVALUATION)
    assert [(entry.label, entry.recipe, entry.make) for entry in found.entries] == [
        ("out", "rtn:nf4", None),
        ("llama", "dense", None),
    ]
    assert found.entries[1].score.params["candidate_digest"] == source.digest
    with pytest.raises(StudyError, match="is named twice"):
        grid.of_directories(str(llama), [str(llama)] * 2, EVALUATION)
    with pytest.raises(ModelError, match="nowhere"):
        grid.of_directories(str(llama), [str(tmp_path / "nowhere")], EVALUATION)
