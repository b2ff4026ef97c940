"""What a store says about its cells: plain values."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Status = Literal["todo", "claimed", "done", "failed"]


class Progress(NamedTuple):
    """How far a cell is: ``done`` of ``total`` units, such as "blocks" or "tokens"."""

    done: int
    total: int
    unit: str


class Usage(NamedTuple):
    """What a cell cost: wall and processor seconds, and the largest resident memory in bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class CellRow:
    """A cell as the store knows it; times are Unix seconds."""

    key: str
    stage: str
    label: str
    inputs: tuple[str, ...]
    params: Mapping[str, Any]
    code_version: str
    status: Status
    owner: str | None
    heartbeat: float | None
    progress: Progress | None
    error: str | None
    seconds: float | None
    cpu_seconds: float | None
    peak_bytes: int | None
    created: float
    finished: float | None
    output: Mapping[str, Any] | None


class Member(NamedTuple):
    """A cell's place in a study: its key and the part it plays there, such as "reference"."""

    key: str
    role: str


class StudyCell(NamedTuple):
    """A cell of a study, with the part it plays there."""

    role: str
    cell: CellRow


class FindingRow(NamedTuple):
    """One stored finding: the cell that it is about, the metric's name, and its JSON object."""

    key: str
    metric: str
    value: Mapping[str, Any]


def cell_row(row: sqlite3.Row) -> CellRow:
    """A row of the table ``cells`` as a value."""
    values = {name: row[name] for name in row.keys() if name in CellRow.__dataclass_fields__}  # noqa: SIM118
    values["inputs"] = tuple(json.loads(row["inputs"]))
    values["params"] = json.loads(row["params"])
    values["progress"] = Progress(*json.loads(row["progress"])) if row["progress"] else None
    values["output"] = json.loads(row["output"]) if row["output"] else None
    return CellRow(**values)
