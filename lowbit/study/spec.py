"""A study as data: a grid of models, recipes and measures, from a TOML file.

    name = "demo"
    models = ["smollm2"]
    recipes = ["rtn:int4-g64", "gptq:int3-g64", "recipes/mixed.toml"]
    [calibration]                # every recipe's, but for what its own file says
    samples = 32
    length = 512
    [evaluation]
    text = "pydoc"
    protocol = "windows-512"
    windows = 16
    attribute = ["gptq:int3-g64"]  # recipes whose blocks are looked at one by one

Models, recipe files and texts are looked for beside the study file first, then from the working directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowbit.errors import StudyError, nearest
from lowbit.pipeline.recipe import Calibration


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Evaluation(_Data):
    """What is scored, and how."""

    text: str = "pydoc"
    protocol: str = "windows-512"
    windows: int = Field(default=16, ge=2)
    batch: int = Field(default=1, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attribute: list[str] = []
    attribution_windows: int = Field(default=4, ge=2)
    attribution_length: int = Field(default=64, ge=8)


class Study(_Data):
    """A named grid of models and recipes."""

    name: str = Field(min_length=1, max_length=80, pattern=r"^\w[\w.-]*$")  # it names a folder
    models: list[str] = Field(min_length=1)
    recipes: list[str] = Field(min_length=1)
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()


def load(path: Path) -> Study:
    """A study from a TOML file. Raises StudyError naming field and fix."""
    try:
        value: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError("does not exist", where=str(path), fix="a study file, such as examples/demo.toml") from None
    except OSError as error:
        raise StudyError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"is not TOML: {error}", where=str(path)) from error
    try:
        study = Study.model_validate(value)
    except ValidationError as error:
        raise _explained(error, path) from error
    evaluation, calibration = study.evaluation, study.calibration
    return study.model_copy(
        update={
            "models": _beside(path, study.models),
            "recipes": _beside(path, study.recipes),
            "evaluation": evaluation.model_copy(
                update={
                    "text": _beside(path, [evaluation.text])[0],
                    "attribute": _beside(path, evaluation.attribute),
                }
            ),
            "calibration": calibration.model_copy(
                update={"text": _beside(path, [calibration.text])[0]} if "text" in calibration.model_fields_set else {}
            ),
        }
    )


def _beside(path: Path, names: Iterable[str]) -> list[str]:
    """Names of files and folders that lie beside the study file, found from there; others as they are."""
    return [str(path.parent / name) if name and (path.parent / name).exists() else name for name in names]


def _explained(error: ValidationError, path: Path) -> StudyError:
    """The first complaint, by field, with the nearest name for one that does not exist."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        return StudyError(f"{field}: {first['msg']}", where=str(path))
    tables: dict[str, type[BaseModel]] = {"calibration": Calibration, "evaluation": Evaluation}
    known = tables.get(str(first["loc"][0]), Study) if len(first["loc"]) > 1 else Study
    return StudyError(
        f"unknown field {field!r}", where=str(path), fix=nearest(str(first["loc"][-1]), known.model_fields)
    )
