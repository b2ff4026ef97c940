"""From what a user names (families, tasks, folders, files) to tasks and their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lowbit.errors import EvidenceError, nearest
from lowbit.evaluation.tasks import answers, basic, dialogue, emergent, hub, long, schemas, trust
from lowbit.evaluation.tasks.base import Task, Value
from lowbit.evaluation.tasks.long import ask_kv, ask_prompt
from lowbit.evaluation.tasks.measures import ACCURACY, LENGTH_NORMALISED, MASS, PARSED, RUNAWAY, STEREOTYPE, TARGET_NLL
from lowbit.evaluation.tasks.readers import parsed

TASKS = {t.name: t for t in (*basic.TASKS, *emergent.TASKS, *trust.TASKS, *dialogue.TASKS, *long.TASKS)}
FAMILIES = ("basic", "emergent", "trust", "dialogue", "long")

_ASKED = "--tasks, or tasks.run in a study"
_DATA = "the folder of the tasks' files: --data FOLDER, or tasks.data in a study"
LM_EVAL = "lm-eval:"  # before the name of a task of lm-eval
_FOREIGN = Task("", "lm-eval", "", schemas.Schema("lm-eval", {}), "choice", basic.ask_choice, (ACCURACY,))

# what a file of an unknown name is taken for: the first whose fields its first record has
OWN = (
    Task("", "own", "", schemas.DIALOGUE, "dialogue", dialogue.ask_turns, dialogue.TASKS[0].measures, new_tokens=256),
    Task("", "own", "", schemas.KV, "cloze", ask_kv, (ACCURACY, TARGET_NLL)),
    replace(TASKS["humaneval"], name="", family="own", file=""),
    Task("", "own", "", schemas.MULTI_TRUE, "choice", trust.ask_several, (MASS,)),
    Task("", "own", "", schemas.CHOICE_CTX, "choice", basic.ask_contexts),
    Task("", "own", "", schemas.CHOICE, "choice", basic.ask_choice, (ACCURACY, LENGTH_NORMALISED)),
    Task("", "own", "", schemas.CLOZE, "cloze", basic.ask_cloze, (ACCURACY, TARGET_NLL)),
    Task("", "own", "", schemas.PAIR, "choice", trust.ask_pair, (STEREOTYPE,)),
    Task("", "own", "", schemas.PREFERENCE, "choice", trust.ask_preference),
    Task("", "own", "", schemas.GENERATION, "generation", ask_prompt, (ACCURACY, PARSED, RUNAWAY), answers.first_line,
         ("\n",), 64),
)  # fmt: skip


class Chosen(NamedTuple):
    """A task and where its records and examples lie; no file where they are generated."""

    task: Task
    file: Path | None
    shots: Path | None


def choose(names: Sequence[str], data: Path | None, say: Callable[[str], object] = lambda _: None) -> list[Chosen]:
    """Tasks of families, names, JSONL files and folders of them, in the order given, each once.

    ``data`` is the folder below which named tasks lie. Of a family or folder, tasks whose file is missing and files
    that hold no task are left out, and ``say`` is told. Raises EvidenceError for a name that means nothing, a named
    task without its file, and nothing left.
    """
    found: dict[str, Chosen] = {}
    for name in names:
        path = Path(name).expanduser()
        if name in FAMILIES:
            part = _of_family(name, data, say)
        elif name.startswith(LM_EVAL):
            part = [Chosen(replace(_FOREIGN, name=name), None, None)]
        elif name.startswith(hub.PREFIX):
            file = hub.fetch(name)
            part = [_of_file(file, file.parent.parent)]
        elif name in TASKS:
            part = [_named(TASKS[name], data)]
        elif path.is_dir():
            part = _of_folder(path, say)
        elif path.suffix == ".jsonl" and path.is_file():
            part = [_of_file(path, path.parent.parent)]
        else:
            raise EvidenceError(
                f"no task, family, folder or file {name!r}", where=_ASKED, fix=nearest(name, [*FAMILIES, *TASKS])
            )
        for chosen in part:
            earlier = found.setdefault(chosen.task.name, chosen)
            if earlier.file != chosen.file:
                raise EvidenceError(
                    f"two files are the task {chosen.task.name!r}", where=f"{earlier.file} and {chosen.file}",
                    fix="rename one of them",
                )  # fmt: skip
    if not found:
        raise EvidenceError("no task is left", where=_ASKED, fix=_DATA)
    return list(found.values())


def _named(task: Task, data: Path | None) -> Chosen:
    if task.make is not None:
        return Chosen(task, None, None)
    if data is None:
        raise EvidenceError("needs its data", where=task.name, why=f"its records are read from {task.file}", fix=_DATA)
    file = data / task.file
    if not file.is_file():
        raise EvidenceError("does not exist", where=str(file), fix=f"the records of {task.name} in this place")
    return Chosen(task, file, _shots(task, data))


def _shots(task: Task, data: Path) -> Path | None:
    if not task.shots:
        return None
    if not (data / task.shots_file).is_file():
        raise EvidenceError(
            "does not exist", where=str(data / task.shots_file), why=f"{task.name} shows {task.shots} of its examples",
            fix="the examples in this place",
        )  # fmt: skip
    return data / task.shots_file


def _of_family(family: str, data: Path | None, say: Callable[[str], object]) -> list[Chosen]:
    found = []
    for task in TASKS.values():
        if task.family != family:
            continue
        if task.make is None and (data is None or not (data / task.file).is_file()):
            say(f"{task.name} is left out: no {task.file} " + (f"in {data}" if data else "without a folder of data"))
            continue
        found.append(_named(task, data))
    return found


def _of_folder(folder: Path, say: Callable[[str], object]) -> list[Chosen]:
    """Every file that a task names, and others by the fields of their first record."""
    examples = {task.shots_file for task in TASKS.values()}
    found = []
    for file in sorted(folder.rglob("*.jsonl")):
        root = _root(file)
        if any(file == root / name for name in examples):
            continue
        try:
            found.append(_of_file(file, root))
        except EvidenceError as error:
            say(f"left out: {error.where}: {error.what}")
    return found


def _root(file: Path) -> Path:
    """The data folder that a file lies in, if it is one of ours: two levels up."""
    return file.parent.parent


def _of_file(file: Path, root: Path) -> Chosen:
    for task in TASKS.values():
        if task.file and file == root / task.file:
            return Chosen(task, file, _shots(task, root))
    first = next(parsed(file), None)
    if first is None:
        raise EvidenceError("has no records", where=str(file), fix="a JSON object a line")
    fitting = next((task for task in OWN if task.schema.fits(first[1])), None)
    if fitting is None:
        known = "; ".join(f"{t.schema.name}: {', '.join(t.schema.fields)}" for t in OWN)
        raise EvidenceError("the fields are those of no schema", where=f"{file.name}:{first[0]}", why=known)
    return Chosen(replace(fitting, name=file.stem), file, None)


def known(name: str, schema: str) -> Task:
    """A task as ``choose`` gave it, from its name and the name of its schema. Raises EvidenceError for neither."""
    task = TASKS.get(name)
    if task is not None and task.schema.name == schema:
        return task
    for own in (*OWN, _FOREIGN):
        if own.schema.name == schema:
            return replace(own, name=name)
    raise EvidenceError(f"no task of the schema {schema!r}", where=name, fix="plan it again")


def examples(task: Task, values: Sequence[Value]) -> list[Value]:
    """The examples that a task shows: its first ``shots``, of each subject where they have one.

    Worked examples by task (BIG-Bench Hard) are one text each, so all of them are kept.
    """
    taken: dict[str, int] = {}
    found = []
    for value in values:
        kind = value.get("subject") or value.get("task") or ""
        if taken.get(kind, 0) < task.shots:
            taken[kind] = taken.get(kind, 0) + 1
            found.append(value)
    return found
