"""Identity of weights, text and recipes: sha256 over bytes, never over names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHUNK = 1 << 22


def of_bytes(*chunks: bytes | bytearray | memoryview) -> str:
    """Hex sha256 of the concatenated chunks."""
    h = hashlib.sha256()
    for chunk in chunks:
        h.update(chunk)
    return h.hexdigest()


def of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes; reads it once in 4 MiB chunks."""
    h = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            h.update(chunk)
    return h.hexdigest()


def canonical(value: Any) -> str:
    """One spelling of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def of_value(value: Mapping[str, Any] | list[Any] | str | int | float | None) -> str:
    """Hex sha256 of a JSON value in its canonical spelling."""
    return of_bytes(canonical(value).encode())


def short(digest: str) -> str:
    """The first twelve hex digits, for people."""
    return digest[:12]


def of_tensor(tensor: Any) -> str:
    """Hex sha256 of a torch tensor: dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    uint8 = flat[:0].byte().dtype  # without importing torch: reports use this module
    return of_bytes(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), flat.view(uint8).numpy().data)


_SETTLED_NS = 2_000_000_000  # a file changed this recently may change again within one tick of its clock


def of_file_cached(path: Path) -> str:
    """Like :func:`of_file`, remembered on disk for the same path, inode, size and times of change.

    The status-change time is part of the key, so a file altered and given its old date is read again. A cache that
    cannot be written costs time, nothing else.
    """
    stat = path.stat()
    key = [str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    memo = cache_folder() / "digests" / of_value(key)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        value = memo.read_text(encoding="ascii")
        if re.fullmatch(r"[0-9a-f]{64}", value):
            return value
    value = of_file(path)
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            partial = memo.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            partial.write_text(value, encoding="ascii")
            partial.replace(memo)
    return value


def cache_folder() -> Path:
    """Where converted models and digests are kept: ``$LOWBIT_CACHE``, else ``~/.cache/lowbit``."""
    return Path(os.environ.get("LOWBIT_CACHE") or Path.home() / ".cache" / "lowbit")
