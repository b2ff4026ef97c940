"""lowbit compress, decompress and inspect --entropy, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ran import Run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished result of ``rtn:int8-row`` whose parts are large enough to shrink; read only."""
    import torch
    from tiny import family_model

    from lowbit.models.source import of_directory
    from lowbit.pipeline.recipe import parse
    from lowbit.study.stages import make

    folder = tmp_path_factory.mktemp("large")
    family_model("llama", hidden_size=128, intermediate_size=512).save_pretrained(folder / "model")
    make(of_directory(folder / "model"), parse("rtn:int8-row"), folder / "out", torch.float32, lambda *_: None)
    return folder / "out"


def test_there_and_back(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    made = run("compress", checkpoint, "-o", "small", "--json")
    told = json.loads(made.out)
    assert made.code == 0
    stored = sum(p.stat().st_size for p in (tmp_path / "small").iterdir())
    assert told["bytes_after"] == stored < told["bytes_before"]
    assert {f["name"] for f in told["files"] if f["tensors"]} == {p.name for p in checkpoint.glob("*.safetensors")}
    again = run("decompress", "small", "-o", "back")
    assert again.code == 0
    assert all((tmp_path / "back" / p.name).read_bytes() == p.read_bytes() for p in checkpoint.iterdir())
    inspected = run("inspect", "small")
    assert inspected.code == 0
    assert "rtn:int8-row" in inspected.out


def test_entropy_of_anything(run: Run, checkpoint: Path, llama: Path) -> None:
    plain = run("inspect", llama, "--entropy")
    assert plain.code == 0
    assert "would be" in plain.out
    run("compress", checkpoint, "-o", "small")
    table = run("inspect", "small", "--entropy")
    assert "stored" in table.out.splitlines()[0]
    told = json.loads(run("inspect", "small", "--entropy", "--json").out)
    assert told["summary"]["compressed"] is True
    fields = [field for tensor in told["tensors"] for field in tensor["fields"]]
    assert fields
    assert all(0 <= field["entropy"] <= field["raw_bits"] for field in fields)


def test_errors_say_what_to_try(run: Run, checkpoint: Path) -> None:
    run("compress", checkpoint, "-o", "small")
    twice = run("compress", "small", "-o", "smaller")
    assert twice.code == 1
    assert "compressed already" in twice.err
    assert "Traceback" not in twice.err
    taken = run("compress", checkpoint, "-o", "small")
    assert taken.code == 1
    assert "exists already" in taken.err
