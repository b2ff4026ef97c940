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
    [tasks]
    run = ["hellaswag", "trust", "./questions.jsonl"]
    data = "$LOWBIT_DATA"          # the folder below which named tasks have their files
    limit = 200
    [calibrations]                 # in place of one calibration, each of these
    texts = ["pydoc", "self", "random", "$LOWBIT_DATA/lm/gutenberg_valid.txt"]
    seeds = [0, 1, 2]
    [sampling]
    temperatures = [0.0, 0.8]
    top_k = [0, 50]
    [outliers]

``analyses = ["confidence", "laws"]`` at the top names what the report says beyond its tables (study/analyses).

Models, recipe files, texts and the files of tasks are looked for beside the study file first, then from the working
directory.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lowbit.errors import StudyError, nearest
from lowbit.evaluation.tasks import hub
from lowbit.evaluation.tasks.registry import FAMILIES, LM_EVAL, TASKS
from lowbit.pipeline.recipe import Calibration
from lowbit.study.analyses import ANALYSES


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


class Tasks(_Data):
    """Which tasks every model and candidate is asked, and how; the fields are the options of ``lowbit compare``.

    ``run`` holds families, names of tasks, lm-eval:NAME, and JSONL files or folders of them, which are written with a
    slash or as ``*.jsonl``. ``allow_code`` runs programs that the models write, each in a closed process.
    """

    run: list[str] = Field(min_length=1)
    data: str | None = None
    limit: int | None = Field(default=None, ge=2)
    shots: int | None = Field(default=None, ge=0)
    lengths: list[Annotated[int, Field(ge=1)]] = []
    batch: int = Field(default=32, ge=1)
    drop_long: bool = False
    allow_code: bool = False
    floor: bool = True

    @field_validator("run")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        known = [*FAMILIES, *TASKS]
        for name in names:
            if not (name in known or name.startswith((LM_EVAL, hub.PREFIX)) or _is_place(name)):
                message = f"no task or family {name!r}, and no file or folder (with a slash, or *.jsonl)"
                raise PydanticCustomError(
                    "unknown_task", "{message}", {"message": message, "fix": nearest(name, known)}
                )
        return names


class Calibrations(_Data):
    """Every recipe that is calibrated is made once with each text and seed, in place of ``calibration``'s own."""

    texts: list[str] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)


class Sampling(_Data):
    """What every model and candidate writes: each temperature with each top-k (0: all), ``seeds`` texts a prompt.

    Prompts are pieces of ``prompt`` tokens, drawn from all over the text of ``evaluation``. Lengths below
    ``max_new_tokens`` are read off the same texts.
    """

    temperatures: list[Annotated[float, Field(ge=0)]] = Field(default=[0.0, 0.5, 0.8, 1.0], min_length=1)
    top_k: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    seeds: int = Field(default=2, ge=1)
    max_new_tokens: int = Field(default=48, ge=2)
    lengths: list[Annotated[int, Field(ge=2)]] = []
    prompts: int = Field(default=12, ge=2)
    prompt: int = Field(default=24, ge=1)

    @model_validator(mode="after")
    def _shorter(self) -> Sampling:
        if beyond := [n for n in self.lengths if n >= self.max_new_tokens]:
            message = f"lengths {beyond} are not below max_new_tokens = {self.max_new_tokens}"
            raise PydanticCustomError("length", "{message}", {"message": message, "fix": "a larger max_new_tokens"})
        return self


class Outliers(_Data):
    """Outlier statistics of every linear's weights and inputs and of keys and values, on tokens of ``evaluation``."""

    windows: int = Field(default=4, ge=1)
    length: int = Field(default=128, ge=8)


class Study(_Data):
    """A named grid of models and recipes."""

    name: str = Field(min_length=1, max_length=80, pattern=r"^\w[\w.-]*$")  # it names a folder
    models: list[str] = Field(min_length=1)
    recipes: list[str] = Field(min_length=1)
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    tasks: Tasks | None = None
    calibrations: Calibrations | None = None
    sampling: Sampling | None = None
    outliers: Outliers | None = None
    analyses: list[str] = []

    @field_validator("analyses")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in ANALYSES:
                message = f"no analysis {name!r}"
                raise PydanticCustomError(
                    "unknown_analysis", "{message}", {"message": message, "fix": nearest(name, ANALYSES)}
                )
        return names


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
            "tasks": None if study.tasks is None else _placed(path, study.tasks),
            "calibrations": None
            if study.calibrations is None
            else study.calibrations.model_copy(update={"texts": _beside(path, study.calibrations.texts)}),
        }
    )


def _placed(path: Path, tasks: Tasks) -> Tasks:
    """The tasks with their files found. Raises StudyError for files and folders that are not there or not readable."""
    run = [_beside(path, [name])[0] if _is_place(name) else name for name in tasks.run]
    for name in run:
        if _is_place(name) and not os.access(name, os.R_OK):
            raise StudyError(
                f"tasks.run: {name!r} cannot be read", where=str(path), fix="a JSONL file or a folder of them"
            )
    if tasks.data is None:
        if wanting := next((name for name in run if _needs_data(name)), None):
            raise StudyError(
                f"tasks.data: {wanting} is read from files, and the study does not say where", where=str(path),
                fix='data = "FOLDER" in the table [tasks]',
            )  # fmt: skip
        return tasks.model_copy(update={"run": run})
    folder = _beside(path, [os.path.expanduser(tasks.data)])[0]
    if not (Path(folder).is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        unset = "set the environment variable, or " if "$" in folder else ""
        raise StudyError(
            f"tasks.data: {folder!r} is no folder that can be read", where=str(path),
            fix=f"{unset}name the folder below which the tasks have their files",
        )  # fmt: skip
    return tasks.model_copy(update={"run": run, "data": folder})


def _needs_data(name: str) -> bool:
    """Whether nothing of a task or family is generated."""
    mine = [task for task in TASKS.values() if name in (task.name, task.family)]
    return bool(mine) and all(task.make is None for task in mine)


def _is_place(name: str) -> bool:
    return not name.startswith((LM_EVAL, hub.PREFIX)) and ("/" in name or name.endswith(".jsonl"))


def _beside(path: Path, names: Iterable[str]) -> list[str]:
    """Names of files and folders that lie beside the study file, found from there; others as they are.

    Environment variables (``$LOWBIT_DATA``) are put in.
    """
    spelled = [os.path.expandvars(name) for name in names]
    return [str(path.parent / name) if name and (path.parent / name).exists() else name for name in spelled]


def _explained(error: ValidationError, path: Path) -> StudyError:
    """The first complaint, by field, with the nearest name for one that does not exist."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        return StudyError(f"{field}: {first['msg']}", where=str(path), fix=str(first.get("ctx", {}).get("fix", "")))
    tables: dict[str, type[BaseModel]] = {
        "calibration": Calibration, "calibrations": Calibrations, "evaluation": Evaluation, "tasks": Tasks,
        "sampling": Sampling, "outliers": Outliers,
    }  # fmt: skip
    known = tables.get(str(first["loc"][0]), Study) if len(first["loc"]) > 1 else Study
    return StudyError(
        f"unknown field {field!r}", where=str(path), fix=nearest(str(first["loc"][-1]), known.model_fields)
    )
