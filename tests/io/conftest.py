"""A finished native checkpoint, and copies of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from whole_runs import quantize


@pytest.fixture(scope="session")
def finished(llama: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed result; read only."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert not quantize(llama, out, tokens)
    return out


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    """A copy of the result that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def int4(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of ``rtn:int4-g32``, which many layouts can hold; read only."""
    out = tmp_path_factory.mktemp("int4") / "q"
    quantize(llama, out, None, "rtn:int4-g32")
    return out
