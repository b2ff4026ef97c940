"""Durable files: every one appears whole under its name or not at all, and one process at a time owns a directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import save_file

from lowbit.arrays import Tensor
from lowbit.errors import StorageError

LOCK = ".lowbit-lock"
KEPT = "finished blocks are kept"
NOTHING_LEFT = "what was begun is removed"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with its metadata, the same bytes at every call; raises OSError or SafetensorError."""
    with partial_file(path) as partial:
        save_file(dict(tensors), partial, metadata=dict(metadata))
        _sort_metadata(partial)


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    """A JSON file for people and programs; raises OSError, leaving no partial file. See :func:`partial_file`."""
    with partial_file(path, shared=shared) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in a header, in place: safetensors writes its entries in an order that varies."""
    with path.open("r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size  # the same entries in another order
        f.seek(8)
        f.write(text)


@contextlib.contextmanager
def partial_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary name that becomes ``path``, durably, when the body has written it.

    In a directory that this process does not own (``shared``) the name is its own, and what others are writing is left
    alone; what they had begun when they were killed is removed.
    """
    with contextlib.ExitStack() as held:
        partial = held.enter_context(_own_name(path)) if shared else path.with_name(path.name + ".partial")
        try:
            yield partial
            with partial.open("rb") as f:
                os.fsync(f.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)  # the room it took may be what is missing
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _own_name(path: Path) -> Iterator[Path]:
    """An empty file beside ``path``, locked while it is written: one that nobody has locked was left by a kill."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        if left.name[len(path.name) + 1 : -len(".partial")].isdigit():
            # Somebody's who is still writing, or who has just finished, or another user's: none of ours to remove.
            with contextlib.suppress(BlockingIOError, FileNotFoundError, PermissionError), left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield partial


@contextlib.contextmanager
def storage(out: Path, left: str = KEPT) -> Iterator[None]:
    """Disk trouble in the body as one StorageError that names ``out``, and what is ``left`` of the work."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        raise StorageError(
            "the disk is full" if full else f"cannot be written: {error}", where=str(out),
            why=left, fix="make room, then the same command again" if full else "",
        ) from error  # fmt: skip


class Lock:
    """Ownership of a directory by this process, until ``release`` or its end; raises StorageError when it is taken."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._file = self._acquire()

    def release(self) -> None:
        """Let another process write here."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)  # before the lock goes: what is unlinked is surely ours
            self._file.close()

    def _acquire(self) -> TextIO:
        while True:
            file = self._path.open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last owner may have removed the file between our open and our lock; such a lock guards nothing.
                if os.fstat(file.fileno()).st_ino == self._path.stat().st_ino:
                    return file
            except FileNotFoundError:
                pass
            except BlockingIOError:
                file.close()
                raise StorageError(
                    "another process is writing here", where=str(self._path.parent), fix="wait for it, or another -o"
                ) from None
            file.close()
