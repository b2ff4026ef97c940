"""Reading a native checkpoint: nothing is allocated before its files, headers and configuration agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.codec.container import Reader, is_coded
from lowbit.codec.identity import of_decoded
from lowbit.errors import CheckpointError, ModelError
from lowbit.formats.activation import ActivationFormat
from lowbit.formats.qtensor import QTensor
from lowbit.formats.spec import Spec
from lowbit.io.layout import READABLE, Contents, Settings, contents_of, opened, read_shard
from lowbit.models.store import INDEX, read_json

MANIFEST = "lowbit.json"


@dataclass
class Held:
    """What the shards of a checkpoint hold, together."""

    specs: dict[str, Spec] = field(default_factory=dict)
    inputs: dict[str, ActivationFormat] = field(default_factory=dict)
    edited: set[str] = field(default_factory=set)

    def add(self, contents: Contents) -> None:
        self.specs |= contents.specs
        self.inputs |= contents.inputs
        self.edited |= set(contents.edited)


def verify(root: Path, contents: bool = True) -> dict[str, Any]:
    """Check a native checkpoint against its manifest, before anything is allocated; returns the manifest.

    Sizes, headers, index and specs always; every byte's sha256 when ``contents``, that of a coded shard after decoding.
    Raises CheckpointError naming file and field.
    """
    try:
        manifest = read_json(root / MANIFEST)
        index, _ = read_json(root / INDEX), read_json(root / "config.json")
    except ModelError as error:
        raise CheckpointError(error.what, where=error.where, fix="copy the directory again") from error
    if manifest.get("version") not in READABLE:
        raise CheckpointError(
            f"version is {manifest.get('version')!r}, this lowbit reads {READABLE}", where=str(root / MANIFEST),
        )  # fmt: skip
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(v, dict) for v in files.values()):
        raise CheckpointError("files is no table", where=str(root / MANIFEST))
    for name, entry in files.items():
        path = root / name
        if "/" in name or name.startswith(".") or not path.is_file():
            raise CheckpointError(f"the file {name!r} is missing", where=str(root), fix="copy the directory again")
        size = _decoded_size(path)
        if size != entry.get("bytes"):
            raise CheckpointError(
                f"has {size} bytes, files.{name}.bytes says {entry.get('bytes')}", where=str(path),
                why="it was cut short or altered", fix="copy it again",
            )  # fmt: skip
        if contents and of_decoded(path) != entry.get("sha256"):
            raise CheckpointError(
                f"its bytes do not have files.{name}.sha256", where=str(path), why="it was altered",
                fix="copy it again, or quantize again",
            )  # fmt: skip
    _check_headers(root, list(files), index)
    return manifest


def _decoded_size(path: Path) -> int:
    """Bytes of a shard; of a coded one, those that it decodes to, since the manifest is that of the decoded shards."""
    if not is_coded(path):
        return path.stat().st_size
    with Reader(path) as reader:
        return reader.header.nbytes


def _check_headers(root: Path, files: list[str], index: Mapping[str, Any]) -> None:
    """Every tensor is where the index says and is what the specs of its shard and of config.json say."""
    where: dict[str, str] = {}
    held = Held()
    for name in files:
        path = root / name
        with opened(path) as shard:
            where |= dict.fromkeys(shard.keys(), name)
            held.add(contents_of(shard, path))
    if index.get("weight_map") != where:
        raise CheckpointError("weight_map is not what the shards hold", where=str(root / INDEX), fix="copy it again")
    said = settings(root)
    checks = {
        "formats": said.specs == held.specs, "activations": said.inputs == held.inputs,
        "added": held.edited.issuperset(said.added),
    }  # fmt: skip
    for name, agrees in checks.items():
        if not agrees:
            raise CheckpointError(
                f"quantization_config.{name} is not what the shards hold", where=str(root / "config.json"),
                fix="copy it again",
            )  # fmt: skip


def is_native(root: Path) -> bool:
    return (root / MANIFEST).is_file() and (root / "config.json").is_file()


def qtensors(root: Path) -> Iterator[tuple[str, QTensor]]:
    """Every low-bit site of a verified checkpoint with its QTensor, one shard at a time."""
    for name in verify(root, contents=False)["files"]:
        yield from read_shard(root / name).codes.items()


def settings(root: Path) -> Settings:
    """What the ``quantization_config`` of a native checkpoint says; raises CheckpointError when it is not one."""
    path = root / "config.json"
    return Settings.from_json(read_json(path).get("quantization_config") or {}, str(path))
