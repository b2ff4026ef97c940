"""Records from JSONL files, checked line by line. Nothing in them is ever executed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit.errors import EvidenceError
from lowbit.evaluation.tasks.base import Record
from lowbit.evaluation.tasks.schemas import CHOICE, GENERATION, PROMPTS, Schema

LARGEST = 1 << 30  # bytes of a file
LONGEST = 1 << 24  # bytes of a line


def read(path: Path, schema: Schema, limit: int | None = None) -> list[Record]:
    """The records of a file, at most ``limit`` of them; all lines that are read are checked.

    Raises EvidenceError naming file, line and schema for a record of another shape, an id that came before, a line
    that is no JSON, and a file that is empty, too large or cannot be read.
    """
    found: list[Record] = []
    seen: dict[str, int] = {}
    for number, value in parsed(path):
        where = f"{path.name}:{number}"
        schema.check(value, where)
        if value["id"] in seen:
            raise EvidenceError(
                f"the id {value['id']!r} is that of line {seen[value['id']]}", where=where,
                why="items of two models are paired by id", fix="give every record its own",
            )  # fmt: skip
        seen[value["id"]] = number
        found.append(Record(value, where))
        if len(found) == limit:
            break
    if not found:
        raise EvidenceError("has no records", where=str(path), fix="a JSON object a line")
    return found


def read_any(path: Path) -> list[dict[str, Any]]:
    """The examples of a task: records of whatever shape, each of them an object. Raises EvidenceError as ``read``."""
    found = []
    for number, value in parsed(path):
        fitting = next((s for s in (CHOICE, GENERATION, PROMPTS) if s.fits(value)), PROMPTS)
        fitting.check(value, f"{path.name}:{number}")
        found.append(value)
    return found


def parsed(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers from 1 and the JSON value of every line that is not blank. Raises EvidenceError as ``read``."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise EvidenceError(
                f"has {size:,} bytes, at most {LARGEST:,} are read", where=str(path), fix="a part of it"
            )
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    raise EvidenceError(f"a line of more than {LONGEST:,} bytes", where=f"{path.name}:{number}")
                if line.strip():
                    yield number, _value(line, f"{path.name}:{number}")
    except OSError as error:
        raise EvidenceError(f"cannot be read: {error.strerror}", where=str(path), fix="a JSONL file") from error


def _value(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"is no JSON: {error}", where=where, fix="one UTF-8 JSON object a line") from error


def _refused(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")
