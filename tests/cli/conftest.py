"""The command line in this process: what it printed and how it ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ran import Ran, Run

from lowbit.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """``run("plan", model, ...)`` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        code = end.value.code
        return Ran(code if isinstance(code, int) else 0, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough text for a dozen short windows of bytes."""
    path = tmp_path_factory.mktemp("text") / "birds.txt"
    path.write_text("".join(f"Bird number {i} sang {i * i % 97} songs before the sun rose.\n" for i in range(60)))
    return path


@pytest.fixture(scope="session")
def checkpoint(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished result of ``rtn:int4-g32``; read only."""
    import torch

    from lowbit.models.source import of_directory
    from lowbit.pipeline.recipe import parse
    from lowbit.study.stages import make

    out = tmp_path_factory.mktemp("made") / "int4"
    make(of_directory(llama), parse("rtn:int4-g32"), out, torch.float32, lambda *_: None)
    return out
