"""lowbit report: the page of a study of which little or nothing is done, by its file and by its folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.cli import main
from lowbit.study import engine, grid, spec
from lowbit.study.store import Store


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr()
        return int(end.value.code or 0), told.out, told.err

    return call


@pytest.fixture
def file(llama: Path, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The river rose and fell.\n" * 60)
    study = {"name": "tiny", "models": [str(llama)], "recipes": ["rtn:int4-g32"]}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in study.items()]
    path = tmp_path / "study.toml"
    path.write_text("".join(lines) + '[evaluation]\ntext = "text.txt"\nprotocol = "windows-32"\nwindows = 4\n')
    return path


def test_before_anything_ran_and_before_anything_is_scored(
    run: Callable[..., tuple[int, str, str]], file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    code, _, err = run("report", file, "--store", folder)
    assert code == 1
    assert "no study store here" in err
    study = spec.load(file)
    grids = grid.of_study(study)
    with Store(folder) as store:
        cells = grids[0].cells
        engine.add_cells(store, cells)
        store.put_study(study.name, study.model_dump(), grids[0].members)
        store.fail(cells[0].key, "the disk is full")
    for asked in ([file, "--store", folder], [folder]):
        (folder / "report.html").unlink(missing_ok=True)
        code, out, err = run("report", *asked)
        assert code == 0
        assert "0 of 4 cells done, 1 failed" in err
        assert Path(out.strip()) == folder / "report.html"
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert "Nothing is scored yet" in page
        assert "the disk is full" in page
    with Store(folder) as store:
        store.put_study("another", study.model_dump(), grids[0].members)
    code, _, err = run("report", folder)
    assert code == 1
    assert "holds 2 studies" in err


@pytest.mark.parametrize("args", [["--watch", "-o", "x.html"], ["--port", "1234"]])
def test_options_that_do_not_go_together(run: Callable[..., tuple[int, str, str]], file: Path, args: list[str]) -> None:
    assert run("report", file, *args)[0] == 2
