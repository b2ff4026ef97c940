"""One file of nested weights is read at any width, as if it had been made for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.errors import FormatError
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import parse
from lowbit.runtime.linear import QLinear
from lowbit.study.stages import make


def _made(model: Path, line: str, out: Path) -> Path:
    make(of_directory(model), parse(line), out, torch.float32, lambda *_: None)
    return out


def test_one_file_at_every_width(llama: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    parent = _made(llama, "nested:int8-row", tmp_path / "parent")
    for bits in (8, 6, 4, 3, 2):
        own = lowbit.load(_made(llama, f"nested:int8-row,read={bits}", tmp_path / str(bits)), dtype=torch.float32)
        read = lowbit.load(parent, dtype=torch.float32, bits=bits)
        with torch.inference_mode():
            assert torch.equal(own(tokens).logits, read(tokens).logits)
    names = {m.weight.spec.node for m in read.modules() if isinstance(m, QLinear)}
    assert names == {"Nested"}


def test_a_checkpoint_without_nested_weights_says_so(llama: Path, tmp_path: Path) -> None:
    plain = _made(llama, "rtn:int4-g32", tmp_path / "plain")
    with pytest.raises(FormatError, match="holds no nested weights"):
        lowbit.load(plain, bits=4)
