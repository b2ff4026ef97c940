"""From a study's specification to the cells that compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lowbit.calibration import text as texts
from lowbit.calibration.cards import LIGHT
from lowbit.calibration.synthetic import identity
from lowbit.errors import RecipeError, StudyError
from lowbit.evaluation import protocol
from lowbit.evaluation.tasks import registry
from lowbit.evaluation.tasks.registry import Chosen
from lowbit.models.resolve import locate
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import Recipe, parse, with_calibration
from lowbit.pipeline.shared import shareable
from lowbit.study import outliers, sampling, stages, tasks
from lowbit.study.engine import Cell
from lowbit.study.outliers import OutlierGrid
from lowbit.study.rows import Member
from lowbit.study.sampling import SampleGrid
from lowbit.study.spec import Study, Tasks
from lowbit.study.tasks import TaskGrid

Say = Callable[[str], None]


@runtime_checkable
class Planned(Protocol):
    """Cells that a run computes, and the parts they play in their study."""

    @property
    def cells(self) -> list[Cell]:
        """In the order in which they are best computed."""

    @property
    def members(self) -> list[Member]:
        """Each cell's key and part."""


@dataclass(frozen=True)
class Entry:
    """One candidate of one model and the cells that belong to it; a candidate that exists already has no make."""

    label: str
    recipe: str
    make: Cell | None
    score: Cell
    attribute: Cell | None = None


@dataclass(frozen=True)
class Grid:
    """The cells of one model of a study, the reference first; ``model`` is its short name.

    ``tasks``, ``texts`` and ``outliers`` are what else the study asks of the same model and candidates, ``cards`` the
    statistics that several of them are made from.
    """

    model: str
    reference: Cell
    floor: Cell
    entries: tuple[Entry, ...]
    tasks: TaskGrid | None = None
    texts: SampleGrid | None = None
    outliers: OutlierGrid | None = None
    cards: tuple[Cell, ...] = ()

    @property
    def more(self) -> list[Planned]:
        """What is measured beside tokens."""
        return [extra for extra in (self.tasks, self.texts, self.outliers) if extra is not None]

    @property
    def cells(self) -> list[Cell]:
        """All cells in the order in which results become visible: each candidate is made, then scored; tasks last."""
        found = [self.reference, self.floor, *self.cards]
        for entry in self.entries:
            found += [cell for cell in (entry.make, entry.score) if cell is not None]
        found += [entry.attribute for entry in self.entries if entry.attribute is not None]
        return found + [cell for extra in self.more for cell in extra.cells]

    @property
    def members(self) -> list[Member]:
        return [Member(cell.key, f"{self.model}/{cell.stage.name}") for cell in self.cells]


def of_study(study: Study, say: Say = lambda _: None) -> list[Grid]:
    """One grid a model; runs nothing, but a model's bytes are read once for their digest.

    Raises StudyError for models or recipes that are the same or look the same, and what their readers raise.
    """
    if unknown := set(study.evaluation.attribute) - set(study.recipes):
        raise StudyError(
            f"attribute names {', '.join(sorted(unknown))}, which the study does not make", where=study.name,
            fix=f"some of: {', '.join(study.recipes)}",
        )  # fmt: skip
    recipes = _recipes(study)
    models = short_names(study.models, study.name)
    chosen = _chosen(study, say)
    return [_model(study, recipes, name, label, chosen, say) for name, label in models.items()]


def of_directories(model: str, candidates: list[str], evaluation: Mapping[str, Any], say: Say = lambda _: None) -> Grid:
    """A grid of candidates that exist already: native checkpoints or dense directories.

    ``evaluation`` holds text, protocol, windows, batch and dtype; with ``memory``, in bytes, models are scored block by
    block. Raises StudyError for one that is named twice, RecipeError for a memory with a protocol in chunks.
    """
    names = short_names(candidates, "compare")
    common = _common(model, evaluation, say)
    if (memory := evaluation.get("memory")) is not None:
        if protocol.parse(evaluation["protocol"]).chunk is not None:
            raise RecipeError(
                "a protocol in chunks needs whole models in memory", where=evaluation["protocol"],
                why="a cache goes through all blocks before the next chunk begins", fix="windows-512, or no --memory",
            )  # fmt: skip
        common["memory"] = memory
    reference, floor = _references(_short(model), common, "")
    entries = []
    for candidate, label in names.items():
        path = locate(candidate, say).resolve()
        described = stages.describe(path)
        params = {**common, "candidate": str(path), "candidate_digest": described["digest"]}
        score = Cell(stages.SCORE, f"score {label}", (reference.key,), params, common["model_digest"])
        entries.append(Entry(label, described["recipe"], None, score))
    return Grid(_short(model), reference, floor, tuple(entries))


def _chosen(study: Study, say: Say) -> list[Chosen]:
    """The tasks of a study and their files."""
    if study.tasks is None:
        return []
    return registry.choose(study.tasks.run, None if study.tasks.data is None else Path(study.tasks.data), say)


def _model(
    study: Study, recipes: Mapping[str, tuple[str, Recipe]], model: str, label: str, chosen: Sequence[Chosen], say: Say
) -> Grid:
    evaluation = study.evaluation.model_dump()
    common = _common(model, evaluation, say)
    affinity = common["model_digest"]
    prefix = f"{label}: " if len(study.models) > 1 else ""
    reference, floor = _references(label, common, prefix)
    entries, cards = [], dict[str, Cell]()
    for called, (name, recipe) in recipes.items():
        card = _card(common, recipe, prefix)
        inputs = () if card is None else (cards.setdefault(card.key, card).key,)
        make = Cell(stages.QUANTIZE, f"{prefix}make {called}", inputs, _make_params(common, recipe), affinity)
        score = Cell(stages.SCORE, f"{prefix}score {called}", (reference.key, make.key), common, affinity)
        attribute = None
        if name in study.evaluation.attribute:
            few = {k: evaluation[k] for k in ("attribution_windows", "attribution_length")}
            params = {key: common[key] for key in ("model", "model_digest", "dtype", "text", "text_digest")} | few
            attribute = Cell(stages.ATTRIBUTE, f"{prefix}blocks of {called}", (make.key,), params, affinity)
        entries.append(Entry(called, recipe.line, make, score, attribute))
    made = {entry.label: entry.make for entry in entries if entry.make is not None}
    asked = texts_of = found = None
    if study.tasks is not None:
        asked = tasks.of_made(model, label, made, chosen, _settings(study.tasks, common["dtype"]), prefix)
    if study.sampling is not None:
        texts_of = sampling.of_made(label, common, made, study.sampling, prefix)
    if study.outliers is not None:
        found = outliers.of_model(label, common, study.outliers, prefix)
    return Grid(label, reference, floor, tuple(entries), asked, texts_of, found, tuple(cards.values()))


def _settings(t: Tasks, dtype: str) -> tasks.Settings:
    data = None if t.data is None else Path(t.data)
    return tasks.Settings(t.limit, t.shots, tuple(t.lengths), t.batch, dtype, t.drop_long, t.allow_code, t.floor, data)


def _recipes(study: Study) -> dict[str, tuple[str, Recipe]]:
    """The recipes by what tables call them, each behind the name that the study gives it.

    The study's calibration holds where a recipe's file says nothing.
    With ``calibrations`` a recipe that is calibrated stands once for each of its texts and seeds.
    """
    found: dict[str, tuple[str, Recipe]] = {}
    for name in study.recipes:
        recipe = parse(name)
        own = recipe.calibration.model_fields_set
        shared = study.calibration.model_dump(exclude_unset=True, exclude=own)
        for label, one in _calibrated(name, with_calibration(recipe, **shared), study):
            for other, (earlier, recipe_of) in found.items():
                if recipe_of.digest == one.digest or other == label:
                    same = "are one recipe" if recipe_of.digest == one.digest else "have one label"
                    raise StudyError(
                        f"{earlier!r} and {name!r} {same}: {label}" if earlier != name
                        else f"the recipe {name!r} is named twice", where=study.name,
                        why="the table tells candidates apart by label", fix="leave one out, or rename its file",
                    )  # fmt: skip
            found[label] = name, one
    return found


def _calibrated(name: str, recipe: Recipe, study: Study) -> Iterator[tuple[str, Recipe]]:
    """The recipe, or one for each calibration that the study asks for; with their labels."""
    label = _label(name, recipe)
    if study.calibrations is None or not recipe.calibrated:
        yield label, recipe
        return
    called = short_names(study.calibrations.texts, study.name)
    for text, seed in product(study.calibrations.texts, study.calibrations.seeds):
        yield f"{label} ({called[text]}, seed {seed})", with_calibration(recipe, text=text, seed=seed)


def _label(name: str, recipe: Recipe) -> str:
    """What a table calls a recipe: its file's name, or its line with the options in one order."""
    return Path(name).stem if name.endswith(".toml") else recipe.line


def short_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Names as typed, with what a table calls them: the last part of a path, all of it where that is ambiguous."""
    names = list(names)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise StudyError(f"{twice!r} is named twice", where=where, fix="name it once")
    short = [_short(name) for name in names]
    return {name: last if short.count(last) == 1 else name for name, last in zip(names, short, strict=True)}


def _short(name: str) -> str:
    return Path(name).expanduser().resolve().name if Path(name).expanduser().exists() else Path(name).name


def _common(model: str, evaluation: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The parameters that all scored cells of a model share; digests beside names, so that no key rests on a name."""
    protocol.parse(evaluation["protocol"])
    root = locate(model, say).resolve()
    text, dtype = evaluation["text"], str(stages.torch_dtype(evaluation["dtype"])).removeprefix("torch.")
    return {
        "model": str(root), "model_digest": of_directory(root).digest, "text": _absolute(text),
        "text_digest": texts.read(text, "evaluation").digest, "protocol": evaluation["protocol"],
        "windows": evaluation["windows"], "batch": evaluation["batch"], "dtype": dtype,
    }  # fmt: skip


def _absolute(text: str) -> str:
    return text if text == texts.DEFAULT else str(Path(text).expanduser().resolve())


def _references(label: str, common: Mapping[str, Any], prefix: str) -> tuple[Cell, Cell]:
    affinity = common["model_digest"]
    reference = Cell(stages.REFERENCE, f"reference {label}", (), common, affinity)
    return reference, Cell(stages.FLOOR, f"{prefix}noise floor", (reference.key,), common, affinity)


def _make_params(common: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    params = {key: common[key] for key in ("model", "model_digest", "dtype")}
    params["recipe"] = recipe.model_dump()
    if recipe.calibrated:
        params["calibration_digest"] = identity(recipe.calibration.text, common["model_digest"])
    return params


def _card(common: Mapping[str, Any], recipe: Recipe, prefix: str) -> Cell | None:
    """The statistics of the original that a recipe can be made from, as other recipes can; None where it runs its own.

    Light statistics come together, Gram matrices alone or with them, so that no key depends on the other recipes.
    """
    if not (needed := shareable(recipe)):
        return None
    light, heavy = needed.intersection(LIGHT), sorted(kind.__name__ for kind in needed.difference(LIGHT))
    c = recipe.calibration
    params = {key: common[key] for key in ("model", "model_digest", "dtype")} | {
        "calibration": c.model_dump(), "calibration_digest": identity(c.text, common["model_digest"]),
        "kinds": heavy + [kind.__name__ for kind in LIGHT if light],
    }  # fmt: skip
    held = " and ".join(heavy + ["light"] * bool(light))
    label = f"{prefix}card of {_short(c.text)}, {c.samples} x {c.length}, seed {c.seed}: {held}"
    return Cell(stages.CARD, label, (), params, common["model_digest"])
