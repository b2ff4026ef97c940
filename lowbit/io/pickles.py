"""Checkpoints that cannot be read without running what is in them: recognised by their bytes, refused by name."""

from __future__ import annotations

import zipfile
from pathlib import Path

from lowbit.errors import ModelError

_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PLAIN = (".safetensors", ".gguf", ".json")
_CONVERT = (
    "where you trust its author, and nothing else is at stake: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, safe_serialization=True)"
)


def refuse_pickles(path: Path) -> None:
    """Raises ModelError for a pickled file, whatever its name, and for a directory with no other weights."""
    if path.is_file():
        if path.suffix in _SUFFIXES or (path.suffix not in _PLAIN and _is_pickle(path)):
            raise _refused(path)
    elif path.is_dir() and not any(path.glob("*.safetensors")):
        for found in sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES):
            raise _refused(found)


def _refused(path: Path) -> ModelError:
    return ModelError("is a pickle", where=str(path), why="reading it would run the code in it", fix=_CONVERT)


def _is_pickle(path: Path) -> bool:
    """Pickles of protocol 2 and later begin with 0x80 and the protocol; torch puts one into a zip archive."""
    with path.open("rb") as file:
        head = file.read(4)
    if head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5:
        return True
    if head != b"PK\x03\x04" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(".pkl") for name in archive.namelist())
