"""lowbit serve as a process: from a checkpoint to answers to SIGTERM."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch

from lowbit.cli import main
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import parse
from lowbit.study.stages import make


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_two_models_side_by_side_until_a_signal(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The low-bit one with its own KV format, both under their directories' names; what runs is finished."""
    recipe = '[[step]]\nmethod = "rtn"\nformat = "int4-g32"\n[kv]\nkey = "int4-head"\nvalue = "int8-head"\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    make(of_directory(llama), parse(str(tmp_path / "recipe.toml")), tmp_path / "low", torch.float32, lambda *_: None)
    found: dict[str, Any] = {}

    def use(url: str) -> None:
        def post(path: str, body: dict[str, Any]) -> Any:
            data = json.dumps(body).encode()
            return urlopen(Request(url + path, data, {"Content-Type": "application/json"}), timeout=30)

        with urlopen(f"{url}/v1/models") as answer:
            found["models"] = json.loads(answer.read())["data"]
        body = {"model": "low", "prompt": "a", "max_tokens": 20, "ignore_eos": True, "temperature": 0, "stream": True}
        with post("/v1/completions", body) as stream:
            found["first"] = stream.readline()
            os.kill(os.getpid(), signal.SIGTERM)
            found["rest"] = stream.read().decode()

    def watch() -> None:
        while "serving at" not in (said := capsys.readouterr().err):
            ready.wait(0.05)
        use(said.split("serving at ")[1].split()[0])

    ready = threading.Event()
    client = threading.Thread(target=watch)
    client.start()
    options = ("--port", 0, "--dtype", "float32", "--grace", 60)
    assert call(monkeypatch, "serve", tmp_path / "low", "--beside", llama, *options) == 0
    client.join(20)
    low, plain = found["models"]
    assert (low["id"], low["kv"], low["chat_template"]) == ("low", "int4-head:int8-head", False)
    assert (plain["id"], plain["kv"], plain["digest"]) == ("llama", "raw", of_directory(llama).digest)
    assert low["digest"] != plain["digest"]
    assert low["memory_bytes"] < plain["memory_bytes"]
    events = found["rest"].strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_what_cannot_be_served_is_refused_before_a_model_is_loaded(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "serve", llama, "--kv", "int4-heads") == 1
    assert "did you mean 'int4-head'" in capsys.readouterr().err
    assert call(monkeypatch, "serve", llama, "--api-key-file", tmp_path / "none") == 1
    assert "the API key cannot be read" in capsys.readouterr().err
    assert call(monkeypatch, "serve", llama, "--host", "192.0.2.1") == 1
    assert "cannot listen" in capsys.readouterr().err
    assert call(monkeypatch, "serve", llama, "--beside", llama, "--port", 0) == 1
    assert "two models named 'llama'" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert call(monkeypatch, "serve", llama) == 1
    assert "lowbit[serve]" in capsys.readouterr().err
