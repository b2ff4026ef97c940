"""Every file of the folder is a method, found by its name, described, and configured by name."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

import lowbit.methods
from lowbit.calibration.stats import Stat
from lowbit.errors import RecipeError
from lowbit.methods.base import BlockTuner, Encoder, Transform, kind, method, names

FOLDER = Path(lowbit.methods.__file__).parent


def source(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def test_files_are_the_registry() -> None:
    assert set(names()) == {f.stem for f in FOLDER.glob("[!_]*.py")} - {"base"}
    assert {"rtn", "gptq"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_a_method_is_a_frozen_dataclass_with_defaults_that_says_what_it_is(name: str) -> None:
    module = importlib.import_module(f"lowbit.methods.{name}")
    made = method(name)
    assert isinstance(made, {"transform": Transform, "encoder": Encoder, "tuner": BlockTuner}[kind(name)])
    assert dataclasses.is_dataclass(made)
    assert made.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert made == method(name)
    assert all(issubclass(kind, Stat) for kind in made.needs)
    assert module.__doc__
    assert re.search(r"arXiv \d{4}\.\d{4,5}|https://", module.__doc__), "a method cites its source"
    for field in dataclasses.fields(made):
        described = f"``{field.name}" in module.__doc__ or re.search(
            rf"^    {field.name}: .*  # \S", source(name), re.M
        )
        assert described, f"{field.name} is not explained"


def test_options_reach_the_method() -> None:
    assert dataclasses.asdict(method("gptq", {"damp": 0.05, "act_order": False}))["damp"] == 0.05
    assert dataclasses.asdict(method("gptq", {"damp": 1}))["damp"] == 1
    assert method("rtn", {}) == method("rtn")


@pytest.mark.parametrize(("name", "hint"), [("gtpq", "'gptq'"), ("rnt", "'rtn'"), ("base", "one of|did you mean")])
def test_an_unknown_method_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        method(name)


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("gptq", {"dmap": 0.1}, "'damp'"),
        ("gptq", {"actorder": True}, "'act_order'"),
        ("rtn", {"klip": 3}, "'clip'"),
        ("gptq", {"block": 1.5}, "of type int"),
        ("gptq", {"block": True}, "of type int"),
        ("gptq", {"act_order": 1}, "of type bool"),
        ("gptq", {"damp": "0.1"}, "of type float"),
    ],
)  # fmt: skip
def test_an_unknown_or_misshapen_option_is_refused(name: str, options: dict[str, object], hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        method(name, options)
