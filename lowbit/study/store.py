"""The memory of a study: cells, leases and findings in SQLite; evidence in folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil

from lowbit.errors import StudyError
from lowbit.study.database import Database
from lowbit.study.folders import whole
from lowbit.study.keys import spelled
from lowbit.study.rows import CellRow, FindingRow, Member, Progress, Status, StudyCell, Usage, cell_row

LEASE_S = 60.0  # a claim without a heartbeat for this long is anybody's
_KEY = re.compile(r"[0-9a-f]{64}")
# Free, or held by an owner that stopped beating; all inputs done.
_CLAIM = """
UPDATE cells SET status = 'claimed', owner = :owner, heartbeat = :now, progress = NULL, error = NULL
WHERE key = (
    SELECT key FROM cells AS c
    WHERE (status = 'todo' OR (status = 'claimed' AND heartbeat < :now - :lease)) AND (:key IS NULL OR key = :key)
    AND NOT EXISTS (
        SELECT 1 FROM json_each(c.inputs) AS i LEFT JOIN cells AS d ON d.key = i.value WHERE d.status IS NOT 'done')
    ORDER BY created, rowid LIMIT 1)
RETURNING *
"""


class Store:
    """A folder with ``lowbit.sqlite``, ``evidence/<key>/`` and ``checkpoints/<key>/``.

    Many processes may hold it open; each method is one transaction. Machines that share one need clocks that agree
    to well within a lease. Raises `StudyError` for a store of another version and `StorageError` when the disk says no.
    """

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self.root = Path(root).absolute()
        path = self.root / "lowbit.sqlite"
        if not create and not path.exists():
            raise StudyError("no study store here", where=str(self.root), fix="the folder that a study was run into.")
        self._data = Database(path)

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:  # a store crosses processes as its folder
        return Store, (self.root,)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the database; evidence stays readable as files."""
        self._data.close()

    # -- cells ---------------------------------------------------------------------------------------------------------

    def add_cell(
        self, key: str, stage: str, label: str, inputs: Sequence[str], params: Mapping[str, Any], code_version: str
    ) -> None:
        """Makes a cell known; one that is known already stays as it is."""
        with self._data.writing() as db:
            db.execute(
                "INSERT OR IGNORE INTO cells (key, stage, label, inputs, params, code_version, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    _checked(key),
                    stage,
                    label,
                    json.dumps(list(inputs)),
                    spelled(params, where=label),
                    code_version,
                    time.time(),
                ),
            )

    def cell(self, key: str) -> CellRow:
        """One cell. Raises `StudyError` when the store has never heard of it."""
        rows = self.lookup([key])
        if not rows:
            raise StudyError("unknown cell", where=f"{self.root}, key {key}")
        return rows[key]

    def lookup(self, keys: Iterable[str]) -> dict[str, CellRow]:
        """Those of ``keys`` that the store knows, in one query."""
        with self._data.reading() as db:
            wanted = json.dumps(list(keys))
            rows = db.execute("SELECT * FROM cells WHERE key IN (SELECT value FROM json_each(?))", (wanted,)).fetchall()
        return {row["key"]: cell_row(row) for row in rows}

    def claim(self, owner: str, lease_s: float = LEASE_S, key: str | None = None) -> CellRow | None:
        """Takes one ready cell, or the one with ``key``, for ``owner``; None when there is none to be had.

        Ready: not done, not failed, all inputs done, and nobody else holds it with a heartbeat younger than
        ``lease_s`` seconds. No two owners ever get the same cell within a lease.
        """
        with self._data.writing() as db:
            asked = {"owner": owner, "now": time.time(), "lease": lease_s, "key": key}
            rows = db.execute(_CLAIM, asked).fetchall()
        return cell_row(rows[0]) if rows else None

    def heartbeat(self, key: str, owner: str, progress: Progress | None = None) -> bool:
        """Renews a lease, and records progress where given. False when the cell is not ``owner``'s any more."""
        told = None if progress is None else json.dumps(progress)
        return self._change(
            "heartbeat = :now, progress = coalesce(:told, progress)", key, owner=owner, now=time.time(), told=told
        )

    def finish(self, key: str, owner: str, output: Mapping[str, Any], usage: Usage) -> None:
        """Marks a cell done, with its ``output`` (a JSON object).

        Raises `StudyError` when another owner took the cell over in the meantime: that owner's result counts.
        """
        done = (
            "status = 'done', output = :output, finished = :now, seconds = :s, cpu_seconds = :cpu, peak_bytes = :peak"
        )
        text = spelled(output, where=f"output of cell {key[:12]}")
        seconds, cpu, peak = usage
        if not self._change(done, key, owner=owner, output=text, now=time.time(), s=seconds, cpu=cpu, peak=peak):
            raise lease_lost(key)

    def fail(self, key: str, error: str, owner: str | None = None) -> bool:
        """Marks a cell failed with the text a person will read; with ``owner``, only while that owner holds it."""
        return self._change(
            "status = 'failed', error = :error, finished = :now", key, owner=owner, error=error, now=time.time()
        )

    def release(self, key: str, owner: str) -> bool:
        """Gives a claimed cell back, as if it had never been taken."""
        return self._change("status = 'todo', owner = NULL, heartbeat = NULL", key, owner=owner)

    def release_stale(self, lease_s: float = LEASE_S) -> list[str]:
        """Frees the cells whose owners died: silent for ``lease_s`` seconds, or a process of this host that is gone.

        Returns their keys. A process number that was given to a new process looks alive; the lease still ends.
        """
        with self._data.writing() as db:
            claimed = db.execute("SELECT key, owner, heartbeat FROM cells WHERE status = 'claimed'").fetchall()
            stale = [key for key, owner, beat in claimed if beat < time.time() - lease_s or _is_dead(owner)]
            free = "UPDATE cells SET status = 'todo', owner = NULL, heartbeat = NULL WHERE key = ?"
            db.executemany(free, [(key,) for key in stale])
        return stale

    def reopen(self, key: str, seen: Status) -> None:
        """Lets a cell run again that was ``seen`` failed, or done with its evidence lost; not if it moved on since."""
        with self._data.writing() as db:
            again = "UPDATE cells SET status = 'todo', progress = NULL WHERE key = ? AND status = ?"
            db.execute(again + " AND status IN ('done', 'failed')", (key, seen))

    def _change(self, change: str, key: str, *, owner: str | None, **values: object) -> bool:
        """Applies ``change`` to an unfinished cell; with ``owner``, only to one that this owner holds."""
        held = "status = 'claimed' AND owner = :owner" if owner else "status IN ('todo', 'claimed')"
        with self._data.writing() as db:
            sql = f"UPDATE cells SET {change} WHERE key = :key AND {held}"
            return db.execute(sql, {"key": key, "owner": owner, **values}).rowcount == 1

    # -- studies and findings ------------------------------------------------------------------------------------------

    def put_study(self, name: str, spec: Mapping[str, Any], members: Sequence[Member]) -> None:
        """Names a list of cells; a study of this name gets the new list. The cells must be known (`add_cell`)."""
        missing = {member.key for member in members} - set(self.lookup(member.key for member in members))
        if missing:
            raise StudyError(f"{len(missing)} unknown cells, such as {min(missing)}", where=f"study {name!r}")
        with self._data.writing() as db:
            db.execute(
                "INSERT INTO studies VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET spec = excluded.spec",
                (name, spelled(spec, where=f"study {name!r}"), time.time()),
            )
            db.execute("DELETE FROM study_cells WHERE study = ?", (name,))
            rows = [(name, member.key, member.role, i) for i, member in enumerate(members)]
            db.executemany("INSERT INTO study_cells VALUES (?, ?, ?, ?)", rows)

    def studies(self) -> dict[str, Mapping[str, Any]]:
        """Every study's name and specification, oldest first."""
        with self._data.reading() as db:
            return {
                row["name"]: json.loads(row["spec"]) for row in db.execute("SELECT * FROM studies ORDER BY created")
            }

    def cells(self, study: str) -> list[StudyCell]:
        """The cells of a study in its own order. Raises `StudyError` for a study that is not here."""
        if study not in self.studies():
            raise StudyError(f"no study {study!r}", where=str(self.root), fix=f"one of: {', '.join(self.studies())}")
        with self._data.reading() as db:
            rows = db.execute(
                "SELECT role, cells.* FROM study_cells JOIN cells USING (key) WHERE study = ? ORDER BY position",
                (study,),
            ).fetchall()
        return [StudyCell(row["role"], cell_row(row)) for row in rows]

    def superseded(self, study: str, keys: Iterable[str]) -> int:
        """How many done cells a study was last run with that are none of ``keys``, those of its cells now.

        They count no more: the study's file changed since, or the source of this program. 0 for an unknown study.
        """
        with self._data.reading() as db:
            sql = (
                "SELECT count(DISTINCT key) FROM study_cells JOIN cells USING (key) WHERE study = ? AND status = 'done'"
                " AND key NOT IN (SELECT value FROM json_each(?))"
            )
            found: int = db.execute(sql, (study, json.dumps(list(keys)))).fetchone()[0]
        return found

    def put_findings(self, key: str, findings: Mapping[str, Mapping[str, Any]]) -> None:
        """Stores findings about a known cell, metric -> JSON object; an earlier one of the same metric is replaced."""
        self.cell(key)
        rows = [(key, metric, spelled(value, where=f"finding {metric!r}")) for metric, value in findings.items()]
        with self._data.writing() as db:
            db.executemany("INSERT OR REPLACE INTO findings VALUES (?, ?, ?)", rows)

    def findings(self, keys: Iterable[str] | None = None, metric: str | None = None) -> list[FindingRow]:
        """The findings about ``keys`` (None: all) of one metric (None: all), by cell and metric."""
        wanted = None if keys is None else json.dumps(list(keys))
        with self._data.reading() as db:
            rows = db.execute(
                "SELECT key, metric, json FROM findings WHERE (:keys IS NULL OR key IN (SELECT value FROM"
                " json_each(:keys))) AND (:metric IS NULL OR metric = :metric) ORDER BY key, metric",
                {"keys": wanted, "metric": metric},
            ).fetchall()
        return [FindingRow(row["key"], row["metric"], json.loads(row["json"])) for row in rows]

    # -- folders -------------------------------------------------------------------------------------------------------

    def evidence(self, key: str) -> AbstractContextManager[Path]:
        """A folder to write a cell's evidence in; it becomes ``evidence/<key>`` when the block ends well."""
        return whole(self.evidence_folder(key))

    def evidence_folder(self, key: str) -> Path:
        """Where the evidence of a done cell lies."""
        return self.root / "evidence" / _checked(key)

    def checkpoint_folder(self, key: str) -> Path:
        """A folder that outlives a killed run, for work that goes on where it stopped; made when it is not there."""
        folder = self.root / "checkpoints" / _checked(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def lease_lost(key: str) -> StudyError:
    """The error of a worker whose cell went to another owner."""
    return StudyError(
        "another worker took this cell over",
        where=f"cell {key[:12]}",
        why="Its owner sent no heartbeat for a whole lease, so its result no longer counts.",
        fix="a longer lease, if this worker was only slow.",
    )


def new_owner() -> str:
    """A name for a claimant, unique in the world: host, process, and a random part."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def _is_dead(owner: str) -> bool:
    """Whether an owner of this host is known to have ended; of other hosts nothing is known."""
    match owner.rsplit(":", 2):
        case [host, pid, _] if host == socket.gethostname() and pid.isdigit():
            try:
                return bool(psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE)  # ended, and nobody looked yet
            except psutil.NoSuchProcess:
                return True
    return False


def _checked(key: str) -> str:
    """Keys name folders, so a key from a foreign store must not be a path."""
    if not _KEY.fullmatch(key):
        raise StudyError(f"not a cell key: {key!r}", fix="64 hexadecimal digits, as cell_key() makes them.")
    return key
