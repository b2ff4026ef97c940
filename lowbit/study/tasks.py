"""Cells of tasks: a model's answers to one task, the reference first.

task    model, records, tokenizer  ->  items.parquet; a candidate's reads the reference's

A candidate exists already (``of_directories``), or is the checkpoint of another cell (``of_made``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lowbit import digest
from lowbit.errors import ModelError, StudyError
from lowbit.evaluation import lmeval_items
from lowbit.evaluation.answering import Asked, answer, ask
from lowbit.evaluation.metrics.items import Items, ItemsProvenance, read_items, write_items
from lowbit.evaluation.scorer import Scorer
from lowbit.evaluation.tasks import long, readers, registry
from lowbit.evaluation.tasks.registry import Chosen
from lowbit.evaluation.tokens import Reader, require_same
from lowbit.io import native
from lowbit.models.resolve import locate
from lowbit.models.source import Source, of_directory
from lowbit.runtime import facade
from lowbit.study import stages
from lowbit.study.engine import Cell
from lowbit.study.rows import Member
from lowbit.study.worker import Stage, StageContext

TASK = Stage("task", "lowbit.study.tasks:task", stages.REFERENCE.code)
CHUNK = 64  # tokens at a time through a cache that is rounded, as in windows-N/chunk-64


@dataclass(frozen=True)
class Settings:
    """How tasks are put to models."""

    limit: int | None = None
    shots: int | None = None
    lengths: tuple[int, ...] = ()
    batch: int = 32
    dtype: str = "auto"
    drop_long: bool = False
    allow_code: bool = False
    floor: bool = True
    data: Path | None = None
    """The folder of lm-eval's task files, where such tasks are asked."""


@dataclass(frozen=True)
class Version:
    """A candidate, what its manifest says of it (nothing where a cell makes it), and its cells by task."""

    label: str
    described: Mapping[str, Any]
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class TaskGrid:
    """The cells of one model, its candidates and some tasks."""

    model: str
    described: Mapping[str, Any]
    tasks: tuple[Chosen, ...]
    reference: Mapping[str, Cell]
    floor: Mapping[str, Cell]
    versions: tuple[Version, ...]

    @property
    def cells(self) -> list[Cell]:
        """The reference's first, then its noise floor's (the model is loaded), then candidate by candidate."""
        found = [*self.reference.values(), *self.floor.values()]
        return found + [cell for version in self.versions for cell in version.cells.values()]

    @property
    def members(self) -> list[Member]:
        return [Member(cell.key, f"{self.model}/task") for cell in self.cells]


def of_directories(
    model: str, candidates: Mapping[str, str], tasks: Sequence[Chosen], settings: Settings,
    say: Callable[[str], None] = lambda _: None,
) -> TaskGrid:  # fmt: skip
    """The cells of candidates that exist; ``candidates`` maps what was typed to labels. Runs nothing.

    Raises EvidenceError for a candidate whose tokenizer is not the reference's, naming the first difference.
    """
    root = locate(model, say).resolve()
    source = of_directory(root)
    plan = _plan(source, root, root.name, tasks, settings, "")
    versions = []
    for candidate, label in candidates.items():
        path = locate(candidate, say).resolve()
        described = stages.describe(path)
        _require_same_tokenizer(source.tokenizer, path)
        theirs = {"path": str(path), "digest": described["digest"]}
        versions.append(Version(label, described, plan.answers(label, (), theirs, described["digest"])))
    return plan.grid(root.name, source, tasks, versions)


def of_made(
    model: str, label: str, made: Mapping[str, Cell], tasks: Sequence[Chosen], settings: Settings, prefix: str = ""
) -> TaskGrid:
    """The cells of candidates that a study makes; ``made`` maps their labels to the cells whose checkpoints they are.

    ``label`` is what tables call the model, ``prefix`` stands before the label of every cell. Runs nothing.
    """
    root = locate(model).resolve()
    source = of_directory(root)
    plan = _plan(source, root, label, tasks, settings, prefix)
    versions = [Version(name, {}, plan.answers(name, (cell.key,), {}, cell.key)) for name, cell in made.items()]
    return plan.grid(label, source, tasks, versions)


class _Plan(NamedTuple):
    """What all models have in common (``shared``), what each task adds to it, and the reference's cells by task."""

    prefix: str
    shared: Mapping[str, Any]
    params: Mapping[str, Mapping[str, Any]]
    reference: Mapping[str, Cell]
    floor: Mapping[str, Cell]

    def answers(self, label: str, inputs: tuple[str, ...], own: Mapping[str, Any], affinity: str) -> dict[str, Cell]:
        """A candidate's cells by task; ``inputs`` come behind the reference's."""
        return {
            name: Cell(TASK, f"{self.prefix}{name}: {label}", (self.reference[name].key, *inputs),
                       {**self.shared, **own, **spec}, affinity)
            for name, spec in self.params.items()
        }  # fmt: skip

    def grid(self, model: str, source: Source, tasks: Sequence[Chosen], versions: Sequence[Version]) -> TaskGrid:
        described = stages.describe_dense(source)
        return TaskGrid(model, described, tuple(tasks), self.reference, self.floor, tuple(versions))


def _plan(source: Source, root: Path, label: str, tasks: Sequence[Chosen], settings: Settings, prefix: str) -> _Plan:
    shared = {
        "dtype": str(stages.torch_dtype(settings.dtype)).removeprefix("torch."), "limit": settings.limit,
        "shots": settings.shots, "lengths": list(settings.lengths), "batch": settings.batch,
        "drop_long": settings.drop_long, "allow_code": settings.allow_code, "tokenizer_of": str(root),
    }  # fmt: skip
    own = shared | {"path": str(root), "digest": source.digest}
    params = {t.task.name: _spec(t, settings.data) for t in tasks}
    reference = {
        name: Cell(TASK, f"{prefix}{name}: {label}", (), own | spec, source.digest) for name, spec in params.items()
    }
    floor = {} if not settings.floor else {
        name: Cell(TASK, f"{prefix}{name}: noise floor", (reference[name].key,),
                   own | spec | {"batch": settings.batch + 1}, source.digest)
        for name, spec in params.items()
    }  # fmt: skip
    return _Plan(prefix, shared, params, reference, floor)


def task(context: StageContext) -> Mapping[str, Any]:
    """One model's answers to one task, as ``items.parquet``."""
    params = context.params
    tokenizer = of_directory(Path(params["tokenizer_of"])).tokenizer
    path = Path(params["path"]) if "path" in params else context.input_checkpoint(1)
    weights: str = params["digest"] if "digest" in params else stages.describe(path)["digest"]
    model, kv = _loaded(str(path), weights, params["dtype"])
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    reader = Reader(tokenizer)
    scorer = Scorer(model, weights, batch=params["batch"], kv=kv, chunk=None if kv is None else CHUNK)
    base: Items | None = None
    reference = scorer.identity
    if context.inputs:
        base, provenance = read_items(context.input_folder(0))
        reference = provenance.reference
    if params["task"].startswith(registry.LM_EVAL):
        include = None if params["data"] is None else Path(params["data"])
        name = params["task"].removeprefix(registry.LM_EVAL)
        found = lmeval_items.answers(scorer, reader, name, include, params["limit"], params["allow_code"])
        return _kept(context, found.items, found.digest, reader, scorer.identity, reference, 0)
    asked = _asked(params, reader, longest)
    if "only" in params:  # places of the questions that are asked, of those that fit
        asked = asked.only(params["only"])
    done = 0
    total = sum(max(1, len(question.turns)) for question in asked.questions)

    def count(items: int) -> None:
        nonlocal done
        done += items
        context.report(done, total, "items")

    items = answer(scorer, reader, asked, reference=base, allow_code=params["allow_code"], on_items=count)
    return _kept(context, items, asked.digest, reader, scorer.identity, reference, len(asked.too_long))


def _kept(
    context: StageContext, items: Items, asked: str, reader: Reader, identity: str, reference: str, too_long: int
) -> dict[str, Any]:
    """Write the evidence; what the cell says of it."""
    params = context.params
    provenance = ItemsProvenance(identity, reference, params["task"], asked, reader.identity, params["dtype"])
    write_items(context.folder, items, provenance)
    return {
        "items": len(items), "too_long": too_long, "identity": identity, "score": float(items.score.mean()),
        "cut": int((items.stop_reason == "length").sum()),
    }  # fmt: skip


def _spec(chosen: Chosen, data: Path | None) -> dict[str, Any]:
    """A task as parameters: its name and schema, its files and their digests."""
    found: dict[str, Any] = {"task": chosen.task.name, "schema": chosen.task.schema.name}
    if chosen.task.family == "lm-eval":
        held = {} if data is None else {
            str(file.relative_to(data)): digest.of_file(file)
            for file in sorted(data.rglob("*")) if file.suffix in (".yaml", ".py", ".jsonl", ".json")
        }  # fmt: skip
        return found | {"data": None if data is None else str(data.resolve()), "held": digest.of_value(held)}
    for name, path in (("file", chosen.file), ("shots_file", chosen.shots)):
        found[name] = None if path is None else str(path.resolve())
        found[f"{name}_digest"] = None if path is None else digest.of_file(path)
    return found


def _asked(params: Mapping[str, Any], reader: Reader, longest: int | None) -> Asked:
    """The task as it was planned, with its records read and its prompts made."""
    chosen = registry.known(params["task"], params["schema"])
    shots: list[Mapping[str, Any]] = []
    for name in ("file", "shots_file"):
        if params[name] is not None and digest.of_file(Path(params[name])) != params[f"{name}_digest"]:
            raise StudyError("changed after this cell was planned", where=params[name], fix="run it again")
    if chosen.make is not None:
        lengths = params["lengths"] or [n for n in long.LENGTHS if longest is None or n <= longest]
        records = list(islice(chosen.make(reader.tokenizer, lengths), params["limit"]))
    else:
        records = readers.read(Path(params["file"]), chosen.schema, params["limit"])
    if params["shots_file"] is not None:
        count = chosen.shots if params["shots"] is None else min(params["shots"], chosen.shots)
        chosen = replace(chosen, shots=count)
        shots = registry.examples(chosen, readers.read_any(Path(params["shots_file"])))
    return ask(chosen, records, shots, reader, longest, drop_long=params["drop_long"])


@lru_cache(maxsize=1)
def _loaded(path: str, expected: str, dtype: str) -> tuple[Any, Any]:
    """A model and its cache's format; the cells of a worker mostly share it."""
    root = Path(path)
    if stages.describe(root)["digest"] != expected:
        raise StudyError("changed after this cell was planned", where=path, fix="run it again")
    if native.is_native(root):
        model = facade.load(root, dtype=stages.torch_dtype(dtype), kernels="dense")
        return model, facade.cache_format(model)
    return stages.dense_model(root, dtype), None


def _require_same_tokenizer(reference: Any, path: Path) -> None:
    """A candidate without a tokenizer of its own is read with the reference's."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return
    try:
        own = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer cannot be read: {error}", where=str(path)) from error
    require_same(reference, own)
