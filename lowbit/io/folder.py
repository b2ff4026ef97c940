"""A directory that appears whole under its name or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lowbit.errors import StorageError
from lowbit.io.storage import NOTHING_LEFT, storage


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary directory beside ``out`` that becomes ``out`` when the body has filled it, and is gone otherwise.

    Its files are synced before it is renamed. Raises StorageError when ``out`` holds anything.
    """
    require_free(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    with storage(out, NOTHING_LEFT):
        partial.parent.mkdir(parents=True, exist_ok=True)
        for left in partial.parent.glob(f".{glob.escape(out.name)}.partial-*"):
            if left == partial or not _alive(left.name.rpartition("-")[2]):
                shutil.rmtree(left, ignore_errors=True)  # a process was killed here
        partial.mkdir()
    try:
        yield partial
        with storage(out, NOTHING_LEFT):
            for path in (*partial.rglob("*"), partial):
                _sync(path)
            require_free(out)
            partial.replace(out)
            _sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(out: Path) -> None:
    """Raises StorageError unless nothing is there, or an empty directory. A link to nothing is something."""
    if out.is_symlink() and not out.exists():
        raise StorageError("is a link to nothing", where=str(out), why="nothing is overwritten", fix="another -o")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise StorageError(what, where=str(out), why="nothing is overwritten", fix="another -o")


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
