"""Checkpoints made by the same walk as ``lowbit quantize``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit.io.native import Writer
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import parse
from lowbit.pipeline.walk import walk

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(model, recipe, tokens)``: the directory of a finished checkpoint."""

    def run(root: Path, recipe: str, tokens: torch.Tensor | None = None) -> Path:
        out = tmp_path_factory.mktemp("checkpoint") / "out"
        source, parsed = of_directory(root), parse(recipe)
        with Writer(out, source, parsed, None if tokens is None else "the tokens") as sink:
            walk(source, parsed, tokens, sink)
            sink.finish({})
        return out

    return run


@pytest.fixture(scope="session")
def checkpoint(llama: Path, make: Make) -> Path:
    """The LLaMA in int4 with groups of 32; read only."""
    return make(llama, "rtn:int4-g32")
