"""lowbit generate --memory and lowbit plan of a checkpoint: the same text, and what it will cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ran import Run

ASK = ("-p", "Bird", "-n", 8, "--raw", "--dtype", "float32", "--json")


def test_the_same_text_in_any_memory_and_with_drafts(run: Run, checkpoint: Path) -> None:
    plain = json.loads(run("generate", checkpoint, *ASK).out)["text"]
    for options in (("--memory", "16GiB"), ("--memory", "16GiB", "--draft", 3), ("--draft", 3)):
        assert json.loads(run("generate", checkpoint, *ASK, *options).out)["text"] == plain


def test_too_little_memory_is_refused_with_the_least(run: Run, checkpoint: Path) -> None:
    for asked in (run("generate", checkpoint, *ASK, "--memory", "2MiB"), run("plan", checkpoint, "--memory", "2MiB")):
        assert asked.code == 1
        assert "2MiB of memory cannot hold this model, the smallest is" in asked.err
        assert "Try: --memory" in asked.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--memory", "lots"), "'lots' is no size"),
        (("--memory", "16GiB", "--kernels", "dense"), "memory goes with the CPU"),
        (("--draft", 3, "--temperature", 0.5), "--draft goes with greedy text"),
        (("--draft", 3, "--kv", "int4-head"), "--draft goes with greedy text"),
    ],
)
def test_options_that_do_not_go_together(run: Run, checkpoint: Path, options: tuple[object, ...], said: str) -> None:
    asked = run("generate", checkpoint, *ASK, *options)
    assert asked.code == 1
    assert said in asked.err


def test_memory_is_of_low_bit_checkpoints(run: Run, llama: Path) -> None:
    assert "--memory is of low-bit checkpoints" in run("generate", llama, *ASK, "--memory", "1GiB").err
    assert run("plan", llama).code == 2
    assert run("plan", llama, "rtn:nf4", "--memory", "1GiB").code == 2


def test_a_plan_says_what_a_memory_will_do(run: Run, checkpoint: Path) -> None:
    planned = json.loads(run("plan", checkpoint, "--memory", "16GiB", "--disk", "0.5GB/s", "--json").out)
    assert planned["disk"] == 5e8
    assert (planned["streamed"], planned["moved"]) == ([], 0)
    assert planned["resident"] == sum(planned["blocks"])
    assert planned["seconds_per_token"] == max(planned["compute"], planned["moved"] / planned["disk"])
    assert planned["break_even"] == pytest.approx(5e8 * planned["ratio"] / (planned["ratio"] - 1))
    shown = run("plan", checkpoint, "--memory", "16GiB").out
    assert "measured on these files" in shown
    assert "2 of 2 blocks" in shown
    for line in ("memory", "resident", "streamed", "disk", "time", "compression"):
        assert f"\n  {line} " in shown
