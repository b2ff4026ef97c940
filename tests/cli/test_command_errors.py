"""Mistakes get one message that names them and a way out, an exit code, and never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Run

from lowbit.cli.options import Dtype
from lowbit.io.native import Writer
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import parse
from lowbit.study import stages

STUDY = 'name = "s"\nmodels = ["{model}"]\nrecipes = ["rtn:int4-g32"]\n'


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("gtpq:int4-g32", "did you mean 'gptq'"),
        ("gptq:int4-g32x", "did you mean 'int4-g32'"),
        ("gptq:int4-g32,dmp=0.1", "did you mean 'damp'"),
        ("gptq:int4-g32,damp=high", "of type float"),
        ("int4-g32", "not METHOD:FORMAT"),
        ("nowhere.toml", "nowhere.toml: does not exist"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_recipe_that_means_nothing(run: Run, llama: Path, command: str, recipe: str, said: str) -> None:
    ended = run(command, llama, recipe, *(["-o", "out"] if command == "quantize" else []))
    assert ended.code == 1
    assert ended.err.startswith("lowbit: ")
    assert said in ended.err
    assert not Path("out").exists()


@pytest.mark.parametrize("args", [["inspect"], ["plan", "rtn:nf4"], ["compare", "x"], ["generate", "-p", "x"]])
def test_a_model_that_is_not_there(run: Run, args: list[str]) -> None:
    ended = run(args[0], "nowhere", *args[1:])
    assert ended.code == 1
    assert "lowbit: nowhere: does not exist" in ended.err


@pytest.mark.parametrize("args", [["inspect"], ["plan", "rtn:nf4"], ["generate", "-p", "x"]])
def test_a_folder_that_is_no_model(run: Run, args: list[str]) -> None:
    Path("empty").mkdir()
    ended = run(args[0], "empty", *args[1:])
    assert ended.code == 1
    assert "empty" in ended.err.splitlines()[0]


@pytest.mark.parametrize(
    "args",
    [
        ["plan", "m", "rtn:nf4", "--dtype", "float12"],
        ["compare", "m", "x", "-o", "html"],
        ["compare", "m", "x", "--windows", "1"],
        ["quantize", "m", "rtn:nf4"],
        ["study", "run"],
        ["explode"],
    ],
)
def test_a_command_line_that_means_nothing_exits_with_2(run: Run, args: list[str]) -> None:
    assert run(*args).code == 2


def test_text_that_is_missing_or_too_short(run: Run, llama: Path, text: Path, checkpoint: Path) -> None:
    quantize = ("quantize", llama, "gptq:int4-g32", "-o", "out", "--samples", 2, "--length", 32)
    assert "nowhere.txt: is no readable text file" in run(*quantize, "--text", "nowhere.txt").err
    Path("short.txt").write_text("too short")
    ended = run(*quantize, "--text", "short.txt")
    assert ended.code == 1
    assert "short.txt: has 9 tokens" in ended.err
    compared = run("compare", llama, checkpoint, "--text", "short.txt", "--protocol", "windows-32", "--store", "s")
    assert compared.code == 1
    assert "reference llama: FAILED: short.txt: 9 tokens give 0 windows" in compared.err
    assert "score int4: not run: it needs 'reference llama', which failed\n" in compared.err
    assert "1 failed, 2 not run because of it" in compared.err
    assert compared.out == ""


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["confidnce"], "no analysis 'confidnce'\nTry: did you mean 'confidence'?"),
        (["where,sampling"], "which this comparison does not have\nTry: a study file with a table [sampling], and"),
        (["confidence"], "answers to questions with choices, which this comparison does not have\nTry: --tasks"),
        (["where", "--tasks", "lines"], "Try: kl among --tasks"),
        (["long_context"], "Try: --tasks long"),
        (["proxy", "--tasks", "kl,lines"], "and 3 candidates or more"),
    ],
)
def test_an_analysis_that_a_comparison_cannot_hold_says_what_is_missing(
    run: Run, llama: Path, asked: list[str], said: str
) -> None:
    ended = run("compare", llama, llama, "--store", "s", "--analyses", *asked)
    assert (ended.code, ended.out) == (1, "")
    assert said in ended.err
    assert not Path("s").exists()  # nothing was run for it


@pytest.mark.parametrize("protocol", ["window-32", "windows-2", "sliding-32-64"])
def test_a_protocol_that_means_nothing(run: Run, llama: Path, checkpoint: Path, protocol: str) -> None:
    ended = run("compare", llama, checkpoint, "--protocol", protocol)
    assert ended.code == 1
    assert f"unknown protocol {protocol!r}" in ended.err


def test_windows_longer_than_the_model_reads(run: Run, llama: Path, checkpoint: Path, text: Path) -> None:
    ended = run("compare", llama, checkpoint, "--text", text, "--protocol", "windows-256", "--store", "s")
    assert ended.code == 1
    assert "the model reads at most 128" in ended.err
    asked = run("generate", checkpoint, "-p", "Bird", "-n", 500)
    assert asked.code == 1
    assert "the model reads at most 128" in asked.err
    assert "-n 124" in asked.err


def test_one_candidate_twice(run: Run, llama: Path, checkpoint: Path) -> None:
    ended = run("compare", llama, checkpoint, checkpoint)
    assert ended.code == 1
    assert "is named twice" in ended.err


def test_two_processes_on_one_output(run: Run, llama: Path, tmp_path: Path) -> None:
    with Writer(tmp_path / "out", of_directory(llama), parse("rtn:int4-g32"), None):
        ended = run("quantize", llama, "rtn:int4-g32", "-o", "out")
    assert ended.code == 1
    assert "another process is writing here" in ended.err


def test_an_altered_checkpoint(run: Run, llama: Path, tmp_path: Path) -> None:
    assert run("quantize", llama, "rtn:int4-g32", "-o", "out").code == 0
    shard = tmp_path / "out" / "lowbit-block-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for args in (["inspect", "out"], ["generate", "out", "-p", "x"]):
        ended = run(*args)
        assert ended.code == 1
        assert shard.name in ended.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("recipe = 1", "did you mean 'recipes'"),
        ("[evaluation]\nwindow = 4", "did you mean 'windows'"),
        ("[calibration]\nsample = 4", "did you mean 'samples'"),
        ("[evaluation]\nwindows = 1", "evaluation.windows"),
        ("[evaluation]\ndtype = 'float12'", "evaluation.dtype"),
        ("[evaluation]\nattribute = ['rtn:nf4']", "which the study does not make"),
        ("name", "is not TOML"),
    ],
)
def test_a_study_with_a_mistake(run: Run, llama: Path, line: str, said: str) -> None:
    Path("s.toml").write_text(STUDY.format(model=llama) + line)
    for command in ("run", "show", "report"):
        ended = run("study", command, "s.toml")
        assert ended.code == 1
        assert said in ended.err


def test_a_study_that_was_not_run_or_is_not_there(run: Run, llama: Path) -> None:
    assert "nowhere.toml: does not exist" in run("study", "run", "nowhere.toml").err
    Path("s.toml").write_text(STUDY.format(model=llama))
    ended = run("study", "show", "s.toml")
    assert ended.code == 1
    assert "no study store here" in ended.err
    assert not Path("runs").exists()


def test_an_interrupt_says_what_is_kept(run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "make", interrupted)
    ended = run("quantize", llama, "rtn:int4-g32", "-o", "out")
    assert ended.code == 130
    assert "the same command goes on" in ended.err


def test_a_defect_is_not_swallowed(run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(stages, "make", defective)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        run("quantize", llama, "rtn:int4-g32", "-o", "out")


def test_the_command_line_knows_the_dtypes_of_the_stages() -> None:
    (choices,) = (set(arg.__args__) for arg in [Dtype.__origin__])
    assert choices == set(stages.DTYPES)
    for name in stages.DTYPES:
        assert isinstance(stages.torch_dtype(name), torch.dtype)
