"""From files to a record of the catalogue: every byte is read once, to know what they are."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import lowbit
from lowbit import digest
from lowbit.errors import StudyError
from lowbit.io import native
from lowbit.io.export import PROVENANCE
from lowbit.io.opening import open_low_bit
from lowbit.models.resolve import locate, open_model
from lowbit.models.source import of_directory
from lowbit.models.store import Files, read_json
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.walk import prepared
from lowbit.study import stages
from lowbit.study.catalog import Artefact


def artefact(name: str, base: str | None = None, called: str | None = None) -> Artefact:
    """The record of a model directory, a native checkpoint, or another ecosystem's files.

    ``base`` names the model that it was made from, which is checked: checkpoints know its digest. ``called``: a name
    for people; by default that of the directory. Raises StudyError for another base, ModelError and CheckpointError.
    """
    path = Path(name).expanduser()
    path = path if path.suffix == ".gguf" else locate(name)
    record = _native(path) if native.is_native(path) else _other(path)
    if base is not None:
        record["parents"] = (_checked(path, record, base),)
    label = called or (path.stem if path.is_file() else path.resolve().name if "/" in name or path.is_dir() else name)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Artefact(name=label, path=str(path.resolve()), lowbit=lowbit.__version__, added=now, **record)


def _native(path: Path) -> dict[str, Any]:
    manifest = native.verify(path)
    about = stages.describe(path)
    return {
        "digest": about["digest"], "kind": "lowbit", "recipe": about["recipe"], "parents": (manifest["source"],),
        "nbytes": about["bytes_total"], "bits_per_weight": about["bits_per_weight"],
        "files": tuple((file, str(entry["sha256"])) for file, entry in manifest["files"].items()),
        "calibration": manifest["calibration"],
    }  # fmt: skip


def _other(path: Path) -> dict[str, Any]:
    """Files without our manifest: an original, or what was exported, which says from what."""
    note = path / PROVENANCE if path.is_dir() else path.with_name(f"{path.name}.{PROVENANCE}")
    said = read_json(note) if note.is_file() else {}
    parent = said.get("source", {}).get("digest") if isinstance(said.get("source"), dict) else None
    parents = (str(parent),) if parent else ()
    files = Files(path).files if path.is_dir() else [path]
    held: dict[str, Any] = {
        "parents": parents, "files": tuple((f.name, digest.of_file_cached(f)) for f in files), "calibration": None,
    }  # fmt: skip
    if path.is_dir() and "quantization_config" not in read_json(path / "config.json"):
        about = stages.describe_dense(of_directory(path))
        recipe = str(said.get("recipe", "dense"))
        return {
            **held, "digest": about["digest"], "kind": str(said.get("layout", "dense")), "recipe": recipe,
            "nbytes": about["bytes_total"], "bits_per_weight": about["bits_per_weight"],
        }  # fmt: skip
    model = open_low_bit(path)
    bits = 8 * sum(leaf.nbytes for spec in model.specs.values() for leaf in spec.paths().values())
    weights = sum(math.prod(spec.shape) for spec in model.specs.values())
    return {
        **held, "digest": model.digest, "kind": model.origin, "recipe": str(said.get("recipe", model.recipe)),
        "nbytes": sum(f.stat().st_size for f in files), "bits_per_weight": bits / weights,
    }  # fmt: skip


def _checked(path: Path, record: dict[str, Any], base: str) -> str:
    """The digest of ``base``, when ``path`` was made from it, also by way of a rotation of the whole model."""
    if native.is_native(Path(base).expanduser()):
        expected = found = str(stages.describe(Path(base).expanduser())["digest"])
    else:
        source = open_model(base)
        expected = found = source.digest
        if native.is_native(path) and record["recipe"] and not record["recipe"].startswith("imported:"):
            manifest = native.verify(path, contents=False)
            expected = prepared(source, Recipe.model_validate(manifest["recipe"])).digest
    if record["parents"] and record["parents"] != (expected,):
        raise StudyError(
            f"was not made from {base}", where=str(path),
            why=f"it says {digest.short(record['parents'][0])}, and {base} is {digest.short(found)}",
            fix="the model that it was made from, or no --base",
        )  # fmt: skip
    return found
