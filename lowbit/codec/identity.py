"""Identity of coded files: sha256 over what they decode to, so that it is the same as before they were compressed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from pathlib import Path

from lowbit import digest
from lowbit.codec.container import Reader, is_coded


def of_decoded(path: Path) -> str:
    """Hex sha256 of a file's bytes; of a coded file, those of the file that it decodes to, whatever it claims.

    A file is hashed, and decoded, once: the result is remembered under the stored bytes' own digest.
    """
    stored = digest.of_file_cached(path)
    if not is_coded(path):
        return stored
    memo = digest.cache_folder() / "decoded" / stored
    with contextlib.suppress(OSError, UnicodeDecodeError):
        value = memo.read_text(encoding="ascii")
        if re.fullmatch(r"[0-9a-f]{64}", value):
            return value
    value = decode_and_hash(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        memo.parent.mkdir(parents=True, exist_ok=True)
        partial = memo.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        partial.write_text(value, encoding="ascii")
        partial.replace(memo)
    return value


def decode_and_hash(path: Path) -> str:
    """Hex sha256 of what a coded file decodes to; raises CheckpointError where it is damaged."""
    hashed = hashlib.sha256()
    with Reader(path) as reader:
        for piece in reader.plain():
            hashed.update(piece.data)
    return hashed.hexdigest()
