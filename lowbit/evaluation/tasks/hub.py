"""Tasks whose rows come from data sets on the Hugging Face hub, or from folders that ``datasets`` saved.

    hub:allenai/ai2_arc/ARC-Easy#test        owner/name[/configuration]#split
    hub:me/my-arc#validation@arc_easy        a copy or set of the same columns, as that task
    hub:./saved#test@gsm8k                   a folder of ``Dataset.save_to_disk``, or of a ``DatasetDict``

What is read is kept as a JSONL file under the digest of its bytes, and from there on is a file like any other: a
result depends on the rows, not on the name, and a study that was planned needs no hub and no ``datasets``.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lowbit import digest
from lowbit.errors import EvidenceError, MissingExtra, nearest
from lowbit.evaluation.tasks.hub_sets import SETS, HubSet

PREFIX = "hub:"
_NAME = re.compile(r"hub:(?P<place>[^#@]+)#(?P<split>[^#@]*?)(@(?P<task>\w+))?")
_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<config>[^/]+))?")


class _Place(NamedTuple):
    """Where rows are: in a repository, or in a folder."""

    repo: str
    config: str | None
    folder: Path | None


def fetch(name: str) -> Path:
    """The records of ``name`` as a file below ``$LOWBIT_CACHE``, laid out like a data folder, examples beside them.

    Cost: a download where the rows are not in the cache of ``datasets`` (``HF_HUB_OFFLINE=1`` allows none), and one
    pass over them. Runs no code of a repository. Raises MissingExtra without ``datasets``, EvidenceError for a name
    that means nothing, a set, configuration or split that is not there, no network, and a row of other fields, with
    its number and the schema.
    """
    place, split, known = _parsed(name)
    rows = _kept_rows(name, place, split, known)
    shown = b""
    if known is not None and known.examples:
        shown = _kept_rows(f"{name} (examples)", place, known.examples, known, known.shots)
    root = (
        digest.cache_folder() / "hub" / digest.of_bytes(digest.of_bytes(rows).encode(), digest.of_bytes(shown).encode())
    )
    file = root / (known.file if known is not None else f"own/{_plain(place, split)}.jsonl")
    _write(file, rows)
    if known is not None and known.examples:
        _write(root / known.shots_file, shown)
    return file


def _parsed(name: str) -> tuple[_Place, str, HubSet | None]:
    match = _NAME.fullmatch(name)
    spelling = "hub:OWNER/NAME[/CONFIGURATION]#SPLIT[@TASK], or hub:./FOLDER#SPLIT[@TASK]"
    if match is None:
        raise EvidenceError("is no name of a data set", where=name, fix=spelling)
    text, split, task = match["place"], match["split"], match["task"]
    folder = Path(text).expanduser() if text.startswith(("/", "./", "../", "~")) else None
    repo = _REPO.fullmatch(text)
    if folder is not None:
        place = _Place(text, None, folder)
    elif repo is not None and split:
        place = _Place(repo["repo"], repo["config"], None)
    else:
        raise EvidenceError("is no name of a data set", where=name, fix=spelling)
    if task is not None:
        known = next((s for s in SETS if s.task == task), None)
        if known is None:
            raise EvidenceError(f"no task {task!r} is known from a hub", where=name, fix=nearest(task, _tasks()))
        return place, split, known
    same = [s for s in SETS if s.repo.lower() == place.repo.lower()]
    return place, split, next((s for s in same if (s.config or "default") == (place.config or "default")), None)


def _tasks() -> list[str]:
    return sorted({s.task for s in SETS})


def _kept_rows(name: str, place: _Place, split: str, known: HubSet | None, count: int | None = None) -> bytes:
    """Rows as the bytes of a JSONL file, each checked against the task's schema."""
    label = known.task if known is not None else _plain(place, split)
    lines = []
    for number, row in enumerate(_rows(name, place, split)):
        if number == count:
            break
        where = f"{name}: row {number}"
        record = {"id": f"{label}/{number}", **(row if known is None else _made(known, row, where))}
        if known is not None:
            known.schema.check(record, where)
        try:
            lines.append(digest.canonical(record) + "\n")
        except (TypeError, ValueError) as error:
            raise EvidenceError(f"is no JSON: {error}", where=where, fix="a set of texts and numbers") from error
    if not lines:
        raise EvidenceError("has no rows", where=name, fix="another split")
    return "".join(lines).encode()


def _made(known: HubSet, row: dict[str, Any], where: str) -> dict[str, Any]:
    missing = [column for column in known.columns if row.get(column) is None]
    has = [column for column, value in row.items() if value is not None]
    needs = f"{known.task} (schema {known.schema.name!r}) is made from: {', '.join(known.columns)}"
    if missing:
        raise EvidenceError(
            f"has no {', '.join(map(repr, missing))}, but: {', '.join(has)}", where=where, why=needs,
            fix="the set that the task comes from, or @TASK of the task that has these columns",
        )  # fmt: skip
    try:
        return known.make(row)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EvidenceError(
            f"cannot be made into a record: {type(error).__name__}: {error}", where=where, why=needs,
            fix="another split: the answers of many test splits are not public",
        ) from error  # fmt: skip


def _rows(name: str, place: _Place, split: str) -> Iterator[dict[str, Any]]:
    datasets = _package()
    with _explained(name):
        if place.folder is not None:
            found = datasets.load_from_disk(str(place.folder))
            if isinstance(found, dict):
                if split not in found:
                    raise ValueError(f"Unknown split {split!r}. Should be one of {sorted(found)}.")
                found = found[split]
        else:
            found = datasets.load_dataset(place.repo, place.config, split=split)
    yield from found


def _package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra.of("datasets", "tasks") from error
    if int(datasets.__version__.partition(".")[0]) < 4:  # earlier ones may run a repository's scripts
        raise MissingExtra(f"datasets {datasets.__version__} is too old", fix="pip install 'datasets>=4'")
    return datasets


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Errors of ``datasets`` as ours: what it raises was observed with 5.2."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise EvidenceError(
            first or type(error).__name__, where=name, why=str(error).strip().partition("\n")[2],
            fix="hub:OWNER/NAME[/CONFIGURATION]#SPLIT as the set's page spells them",
        ) from error  # fmt: skip
    except OSError as error:  # ConnectionError, timeouts
        raise EvidenceError(
            f"the hub cannot be reached, and the cache of datasets does not have it: {error}", where=name,
            fix="a network; or load it once where there is one and carry HF_HOME over (HF_HUB_OFFLINE=1 asks nobody); "
            "or Dataset.save_to_disk there and hub:./FOLDER#SPLIT@TASK here",
        ) from error  # fmt: skip


def _plain(place: _Place, split: str) -> str:
    """A name for tables: the set's last part, configuration and split."""
    last = place.repo.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "_", "-".join(part for part in (last, place.config, split) if part))


def _write(file: Path, content: bytes) -> None:
    """Atomically; a file that is there already has the same bytes, for its folder is their digest."""
    if file.exists() and digest.of_file(file) == digest.of_bytes(content):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    partial.write_bytes(content)
    os.replace(partial, file)
