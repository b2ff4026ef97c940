"""One SQLite file that many processes write: journal mode, schema version, transactions, and errors with a way out."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from lowbit.errors import StorageError, StudyError

SCHEMA_VERSION = 1
_BUSY_S = 30.0  # how long a writer waits for another one
_NETWORK = ("nfs", "cifs", "smb", "9p", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "afs", "fuse.sshfs")
_SCHEMA = """
CREATE TABLE cells (
    key TEXT PRIMARY KEY, stage TEXT NOT NULL, label TEXT NOT NULL, inputs TEXT NOT NULL, params TEXT NOT NULL,
    code_version TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'todo' CHECK (status IN ('todo', 'claimed', 'done', 'failed')),
    owner TEXT, heartbeat REAL, progress TEXT, error TEXT, seconds REAL, cpu_seconds REAL, peak_bytes INTEGER,
    created REAL NOT NULL, finished REAL, output TEXT);
CREATE INDEX cells_by_status ON cells (status, created);
CREATE TABLE studies (name TEXT PRIMARY KEY, spec TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE study_cells (
    study TEXT NOT NULL REFERENCES studies (name), key TEXT NOT NULL REFERENCES cells (key),
    role TEXT NOT NULL, position INTEGER NOT NULL, PRIMARY KEY (study, position));
CREATE TABLE findings (
    key TEXT NOT NULL REFERENCES cells (key), metric TEXT NOT NULL, json TEXT NOT NULL, PRIMARY KEY (key, metric))
"""


class Database:
    """A connection to the file at ``path``, made with the schema when it is new.

    Threads of one process share it behind a lock. Write-ahead log on a local disk, journal mode DELETE on a network
    file system, where the log's shared memory does not reach the other machines. Raises `StudyError` for a file of
    another schema version or of another program, `StorageError` when the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, _BUSY_S, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(str(error), where=str(path)) from error
        self._db.row_factory = sqlite3.Row
        try:
            self._check_schema()  # first: a file that is not ours is left as it is
            self._set_journal("delete" if on_network(path) else "wal")
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Closes the connection."""
        self._db.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A transaction that sees one state of the file and writes nothing."""
        with self._transaction("BEGIN") as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start, so that it never fails half way for want of it."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            yield db

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute(begin)
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.OperationalError as error:  # locked, read-only, disk full
                fix = "free space, write permission, or a folder on a local disk."
                raise StorageError(str(error), where=str(self.path), fix=fix) from error
            except sqlite3.DatabaseError as error:  # not SQLite's file, or a broken one
                raise StudyError(f"not a usable store: {error}", where=str(self.path)) from error

    def _check_schema(self) -> None:
        with self.reading() as db:
            if db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
                return
        with self.writing() as db:  # asks again: another process may have made the tables in between
            version: int = db.execute("PRAGMA user_version").fetchone()[0]
            tables: int = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version == 0 and tables == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise StudyError(
                    f"store of schema version {version}; this lowbit knows version {SCHEMA_VERSION}",
                    where=str(self.path),
                    why="Cells of another layout would be misread.",
                    fix="another folder, or the version of lowbit that made this one.",
                )

    def _set_journal(self, mode: str) -> None:
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA synchronous = NORMAL" if mode == "wal" else "PRAGMA synchronous = FULL")
        current: str = self._db.execute("PRAGMA journal_mode").fetchone()[0]
        if current == mode:
            return
        try:
            self._db.execute(f"PRAGMA journal_mode = {mode}")
        except sqlite3.OperationalError:
            # Another process is using the file, or the file system has no shared memory: the mode it has is safe.
            current = self._db.execute("PRAGMA journal_mode").fetchone()[0]
            if current == "wal" and mode == "delete":
                raise StorageError(
                    "the journal of a store on a network file system is a write-ahead log and is in use",
                    where=str(self.path),
                    why="A log in shared memory is not seen by other machines and corrupts the file.",
                    fix="close the other process, then open the store again.",
                ) from None


def on_network(path: Path) -> bool:
    """Whether ``path`` lies on a file system that other machines share, as far as the mount table tells."""
    below = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return bool(below) and max(below, key=lambda part: len(part.mountpoint)).fstype.lower().startswith(_NETWORK)
