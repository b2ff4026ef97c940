"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.errors import StorageError


@contextmanager
def whole(final: Path) -> Iterator[Path]:
    """A temporary sibling of ``final`` to write in; when the block ends well it is synced to disk and takes the name.

    An error or a kill inside leaves no ``final``; what a killed writer left behind goes with the next one. A folder
    that bears the name already is replaced. Raises `StorageError` when the disk refuses.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(f".{final.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        _publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, final: Path) -> None:
    try:
        for folder, _, files in os.walk(temporary):
            for file in files:
                _sync(Path(folder, file))
            _sync(Path(folder))
        if final.exists():
            # A rename does not replace a full folder. The old one takes a temporary name, which the next writer sweeps.
            os.rename(final, old := final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}")
            os.rename(temporary, final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, final)
        _sync(final.parent)
    except OSError as error:
        raise StorageError(str(error), where=str(final), fix="free space or write permission.") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
