"""lowbit compare --memory: the same table from models that are read block by block, and what it does not go with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ran import Run

SHORT = ("--protocol", "windows-64", "--windows", 2)


def test_the_table_is_the_same(run: Run, llama: Path, checkpoint: Path, text: Path) -> None:
    found = {}
    for memory in ((), ("--memory", "16GiB")):
        args = (llama, checkpoint, "--text", text, *SHORT, "--store", "s", "--dtype", "float32", "--json", *memory)
        ended = run("compare", *args)
        assert ended.code == 0, ended.err
        assert "3 cells computed, 0 were there" in ended.err  # neither way takes what the other one found
        candidates = json.loads(ended.out)["reports"][0]["candidates"]
        found[memory] = {(c["label"], f["metric"]): f["value"] for c in candidates for f in c["findings"]}
    plain, blocks = found.values()
    assert blocks.keys() == plain.keys()
    for key, value in plain.items():
        assert blocks[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert plain["int4", "kl"] > 1e-4


def test_too_little_memory_is_said_with_the_least(run: Run, llama: Path, checkpoint: Path, text: Path) -> None:
    ended = run("compare", llama, checkpoint, "--text", text, *SHORT, "--store", "s", "--memory", "1MiB")
    assert ended.code == 1
    assert "1MiB of memory cannot hold a block of this model and its windows, the smallest is" in ended.err
    assert "Try: --memory" in ended.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--memory", "lots"), "'lots' is no size"),
        (("--memory", "1GiB", "--protocol", "windows-64/chunk-8"), "a protocol in chunks needs whole models in memory"),
        (("--memory", "1GiB", "--tasks", "needle"), "--memory goes with tokens alone"),
    ],
)
def test_what_it_does_not_go_with(run: Run, llama: Path, checkpoint: Path, options: tuple[str, ...], said: str) -> None:
    ended = run("compare", llama, checkpoint, "--store", "s", *options)
    assert ended.code == 1
    assert said in ended.err
