"""From a study's specification to the cells that compute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import StudyError
from lowbit.models.resolve import locate
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import Recipe, parse, with_calibration
from lowbit.calibration import text as texts
from lowbit.study import stages
from lowbit.study.engine import Cell
from lowbit.study.rows import Member
from lowbit.study.spec import Study


@dataclass(frozen=True)
class Entry:
    """One candidate of one model and the cells that belong to it; a candidate that exists already has no make."""

    label: str
    recipe: str
    make: Cell | None
    score: Cell
    attribute: Cell | None
    path: Path | None = None


@dataclass(frozen=True)
class Grid:
    """The cells of one model of a study, the reference first."""

    model: str
    reference: Cell
    floor: Cell
    entries: tuple[Entry, ...]

    @property
    def cells(self) -> list[Cell]:
        """All cells in the order in which results become visible: each candidate is made, then scored."""
        found = [self.reference, self.floor]
        for entry in self.entries:
            found += [cell for cell in (entry.make, entry.score) if cell is not None]
        return found + [entry.attribute for entry in self.entries if entry.attribute is not None]

    @property
    def members(self) -> list[Member]:
        return [Member(cell.key, f"{self.model}/{cell.stage.name}") for cell in self.cells]


def of_study(study: Study, say: Any = lambda _: None) -> list[Grid]:
    """One grid a model. Raises StudyError for a recipe named twice, RecipeError for one that means nothing."""
    if len(set(study.recipes)) != len(study.recipes):
        raise StudyError("a recipe is named twice", where=study.name)
    if unknown := set(study.evaluation.attribute) - set(study.recipes):
        raise StudyError(f"attribute names {sorted(unknown)}, which the study does not make", where=study.name)
    return [_model(study, name, say) for name in study.models]


def of_directories(model: str, candidates: list[str], evaluation: Mapping[str, Any], say: Any = lambda _: None) -> Grid:
    """A grid of candidates that exist already: native checkpoints or dense directories."""
    base, common = _base(model, evaluation, say)
    reference, floor = _references(model, common)
    entries = []
    for candidate in candidates:
        path = locate(candidate).resolve()
        params = {**common, "candidate": str(path), "candidate_digest": _digest_of(path)}
        label = path.name if len({Path(c).name for c in candidates}) == len(candidates) else str(path)
        score = Cell(stages.SCORE, f"score {label}", (reference.key,), params, affinity=base)
        entries.append(Entry(label, _recipe_of(path), None, score, None, path))
    return Grid(model, reference, floor, tuple(entries))


def _model(study: Study, model: str, say: Any) -> Grid:
    evaluation = study.evaluation.model_dump()
    base, common = _base(model, evaluation, say)
    reference, floor = _references(model, common)
    entries = []
    for name in study.recipes:
        recipe = parse(name)
        if not name.endswith(".toml"):
            recipe = with_calibration(recipe, **study.calibration)
        make = Cell(stages.QUANTIZE, f"make {recipe.line}", (), _make_params(model, common, recipe), affinity=base)
        score = Cell(stages.SCORE, f"score {recipe.line}", (reference.key, make.key), common, affinity=base)
        attribute = None
        if name in study.evaluation.attribute:
            few = {k: evaluation[k] for k in ("attribution_windows", "attribution_length")}
            attribute = Cell(stages.ATTRIBUTE, f"blocks of {recipe.line}", (make.key,), {**common, **few}, base)
        label = Path(name).stem if name.endswith(".toml") else recipe.line
        entries.append(Entry(label, recipe.line, make, score, attribute))
    return Grid(model, reference, floor, tuple(entries))


def _base(model: str, evaluation: Mapping[str, Any], say: Any) -> tuple[str, dict[str, Any]]:
    """The identity of a model and the parameters that all of its scored cells share."""
    root = locate(model, say).resolve()
    source = of_directory(root)
    dtype = evaluation["dtype"]
    if dtype == "auto":
        dtype = str(stages.torch_dtype("auto")).removeprefix("torch.")
    text = evaluation["text"]
    return source.digest, {
        "model": str(root), "model_digest": source.digest, "text": text,
        "text_digest": texts.read(text, "evaluation").digest, "protocol": evaluation["protocol"],
        "windows": evaluation["windows"], "batch": evaluation["batch"], "dtype": dtype,
    }  # fmt: skip


def _references(model: str, common: Mapping[str, Any]) -> tuple[Cell, Cell]:
    reference = Cell(stages.REFERENCE, f"reference {model}", (), common, affinity=common["model_digest"])
    floor = Cell(stages.FLOOR, "noise floor", (reference.key,), common, affinity=common["model_digest"])
    return reference, floor


def _make_params(model: str, common: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    params = {key: common[key] for key in ("model", "model_digest", "dtype")}
    params["recipe"] = recipe.model_dump()
    if recipe.calibrated:
        params["calibration_digest"] = texts.read(recipe.calibration.text, "calibration").digest
    return params


def _digest_of(path: Path) -> str:
    from lowbit.io import native

    return str(stages.describe(path)["digest"]) if native.is_native(path) else of_directory(path).digest


def _recipe_of(path: Path) -> str:
    from lowbit.io import native

    if not native.is_native(path):
        return "dense"
    return Recipe.model_validate(native.verify(path, contents=False)["recipe"]).line
