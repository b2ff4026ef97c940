"""A study as data: a grid of models, recipes and measures, from a TOML file.

    name = "demo"
    models = ["smollm2"]
    recipes = ["rtn:int4-g64", "gptq:int3-g64", "recipes/mixed.toml"]
    [calibration]                # every recipe's, unless its own file says otherwise
    samples = 32
    length = 512
    [evaluation]
    text = "pydoc"
    protocol = "windows-512"
    windows = 16
    attribute = ["gptq:int3-g64"]  # recipes whose blocks are looked at one by one
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowbit.errors import StudyError, nearest


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Evaluation(_Data):
    """What is scored, and how."""

    text: str = "pydoc"
    protocol: str = "windows-512"
    windows: int = Field(default=16, ge=2)
    batch: int = Field(default=1, ge=1)
    dtype: str = "auto"
    attribute: list[str] = []
    attribution_windows: int = Field(default=4, ge=2)
    attribution_length: int = Field(default=64, ge=8)


class Study(_Data):
    """A named grid of models and recipes."""

    name: str = Field(min_length=1, max_length=80, pattern=r"^[\w.-]+$")
    models: list[str] = Field(min_length=1)
    recipes: list[str] = Field(min_length=1)
    calibration: dict[str, str | int | None] = {}
    evaluation: Evaluation = Evaluation()


def load(path: Path) -> Study:
    """A study from a TOML file; recipe files are looked for beside it. Raises StudyError naming field and fix."""
    try:
        value: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError("does not exist", where=str(path), fix="a study file, such as examples/demo.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise StudyError(f"is not TOML: {error}", where=str(path)) from error
    try:
        study = Study.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        known = {*Study.model_fields, *Evaluation.model_fields}
        fix = nearest(str(first["loc"][-1]), known) if first["type"] == "extra_forbidden" else ""
        field = ".".join(map(str, first["loc"]))
        raise StudyError(f"{field}: {first['msg']}", where=str(path), fix=fix) from error
    beside = [str(path.parent / r) if r.endswith(".toml") and (path.parent / r).exists() else r for r in study.recipes]
    return study.model_copy(update={"recipes": beside})
