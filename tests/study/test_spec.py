"""A study file: what it says, where its files lie, and what it says wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.errors import StudyError
from lowbit.study import spec

LEAST = 'name = "s"\nmodels = ["m"]\nrecipes = ["rtn:nf4"]\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "s.toml"
    path.write_text(text)
    return path


def test_the_least_that_a_study_says(tmp_path: Path) -> None:
    study = spec.load(written(tmp_path, LEAST))
    assert (study.name, study.models, study.recipes) == ("s", ["m"], ["rtn:nf4"])
    assert study.evaluation == spec.Evaluation()
    assert study.calibration.model_fields_set == set()  # what is not said is each recipe's own


def test_files_beside_the_study_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    for name in ("mixed.toml", "own.txt", "calm.txt"):
        (home / name).write_text("")
    path = written(
        home,
        'name = "s"\nmodels = ["model", "smollm2"]\nrecipes = ["mixed.toml", "rtn:nf4", "other.toml"]\n'
        '[calibration]\ntext = "calm.txt"\nsamples = 7\n'
        '[evaluation]\ntext = "own.txt"\nattribute = ["mixed.toml"]\n',
    )
    monkeypatch.chdir(tmp_path)
    study = spec.load(path)
    assert study.models == [str(home / "model"), "smollm2"]
    assert study.recipes == [str(home / "mixed.toml"), "rtn:nf4", "other.toml"]
    assert study.evaluation.text == str(home / "own.txt")
    assert study.evaluation.attribute == [str(home / "mixed.toml")]
    assert study.calibration.model_dump(exclude_unset=True) == {"text": str(home / "calm.txt"), "samples": 7}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "name: Field required"),
        (LEAST + "recipe = []", "unknown field 'recipe'\nTry: did you mean 'recipes'?"),
        (LEAST + "[evaluation]\nwindow = 8", "unknown field 'evaluation.window'\nTry: did you mean 'windows'?"),
        (LEAST + "[calibration]\nsampels = 8", "unknown field 'calibration.sampels'\nTry: did you mean 'samples'?"),
        (LEAST + "[calibration]\nsamples = '8'", "calibration.samples: Input should be a valid integer"),
        (LEAST + "[evaluation]\nbatch = 0", "evaluation.batch: Input should be greater than or equal to 1"),
        (LEAST + "[evaluation]\ndtype = 'int8'", "evaluation.dtype: Input should be 'auto', 'float32'"),
        (LEAST.replace('"s"', '"../s"'), "name: String should match pattern"),
        (LEAST.replace('["m"]', "[]"), "models: List should have at least 1 item"),
        (LEAST.replace('["m"]', "[1]"), "models.0: Input should be a valid string"),
        ("name = ", "is not TOML"),
    ],
)
def test_a_mistake_is_named_by_field_and_file(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(StudyError) as error:
        spec.load(path)
    assert f"{path}: {said}" in str(error.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="does not exist"):
        spec.load(tmp_path / "nowhere.toml")
    with pytest.raises(StudyError, match="cannot be read"):
        spec.load(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StudyError, match="is not TOML"):
        spec.load(tmp_path / "binary.toml")
