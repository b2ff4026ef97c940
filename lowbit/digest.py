"""Identity of weights, text and recipes: sha256 over bytes, never over names."""

from __future__ import annotations

import functools
import hashlib
import json
import os
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
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return of_bytes(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), data.data)


@functools.lru_cache(maxsize=1024)
def _remembered(path: str, size: int, mtime_ns: int) -> str:
    memo = cache_folder() / "digests" / of_value([path, size, mtime_ns])
    if memo.exists():
        return memo.read_text(encoding="ascii")
    value = of_file(Path(path))
    memo.parent.mkdir(parents=True, exist_ok=True)
    partial = memo.with_suffix(f".{os.getpid()}")
    partial.write_text(value, encoding="ascii")
    partial.replace(memo)
    return value


def of_file_cached(path: Path) -> str:
    """Like :func:`of_file`, remembered on disk for the same path, size and time of change."""
    stat = path.stat()
    return _remembered(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


def cache_folder() -> Path:
    """Where converted models and digests are kept: ``$LOWBIT_CACHE``, else ``~/.cache/lowbit``."""
    return Path(os.environ.get("LOWBIT_CACHE") or Path.home() / ".cache" / "lowbit")
