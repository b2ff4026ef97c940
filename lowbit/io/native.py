"""The native checkpoint: a Hugging Face directory whose safetensors hold packed parts (docs/reference/checkpoint.md).

    config.json                      the model's, with quantization_config.quant_method = "lowbit"
    lowbit.json                      recipe, source, calibration, sha256 of every file, one record a site
    model.safetensors.index.json     which shard holds which tensor
    lowbit-block-00000.safetensors   one shard a decoder block, and lowbit-rest.safetensors
    tokenizer and generation files   as the source has them

While a walk is under way the directory holds ``lowbit-work.json`` and the finished shards, but no config.json.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lowbit import digest
from lowbit.arrays import Tensor
from lowbit.errors import CheckpointError, StorageError
from lowbit.formats.qtensor import QTensor, build
from lowbit.formats.spec import Spec
from lowbit.models.graph import outside_blocks
from lowbit.models.source import Source
from lowbit.models.store import INDEX, read_json
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.walk import SiteReport

VERSION = 1
MANIFEST, WORK, REST, LOCK = "lowbit.json", "lowbit-work.json", "lowbit-rest.safetensors", ".lowbit-lock"
_COPIED = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json",
           "generation_config.json", "chat_template*", "*.model")  # fmt: skip


class Writer:
    """The sink of a walk that makes a native checkpoint; one process at a time, every file atomic."""

    def __init__(self, out: Path, source: Source, recipe: Recipe, calibration: str | None) -> None:
        """``calibration`` is the digest of the calibration tokens, None when none are used.

        Raises StorageError when the directory holds something else, or another process is writing it.
        """
        self.out, self.source, self.recipe = out, source, recipe
        self.work = {
            "version": VERSION, "source": source.digest, "recipe": recipe.model_dump(), "calibration": calibration,
        }  # fmt: skip
        with _storage(out):
            out.mkdir(parents=True, exist_ok=True)
            self._lock = _acquire(out)
            self._begin()

    def has(self, block: str) -> bool:
        return self._shard(block).exists()

    def read(self, block: str) -> dict[str, QTensor]:
        path = self._shard(block)
        with _opened(path) as shard:
            specs = _specs(shard.metadata() or {}, path)
            parts = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        return {site: build(spec, parts, f"{site}.weight.") for site, spec in specs.items()}

    def write(self, block: str, module: nn.Module, codes: Mapping[str, QTensor], reports: list[SiteReport]) -> None:
        tensors = {f"{site}.weight.{p.path}": p.data.contiguous() for site, q in codes.items() for p in q.parts()}
        for name, parameter in module.named_parameters():
            full = f"{block}.{name}"
            if full.removesuffix(".weight") not in codes:
                tensors[full] = _sixteen(self.source.tensor(full, tuple(parameter.shape)))
        specs = {site: q.spec().to_json() for site, q in codes.items()}
        with _storage(self.out):
            report = [asdict(r) for r in reports]
            _write_json(self._shard(block).with_suffix(".json"), report)
            _write_tensors(self._shard(block), tensors, {"specs": specs, "version": VERSION})

    def finish(self, extra: Mapping[str, Any]) -> Path:
        """Write what belongs to no block, the index, the manifest and last of all config.json."""
        rest: dict[str, Tensor] = {}
        for name, parameter in outside_blocks(self.source.skeleton, self.source.blocks):
            rest[name] = _sixteen(self.source.tensor(name, tuple(parameter.shape)))
        with _storage(self.out):
            _write_tensors(self.out / REST, rest, {"specs": {}, "version": VERSION})
            shards = [self._shard(block) for block in self.source.blocks] + [self.out / REST]
            weight_map, specs, reports, total = {}, {}, [], 0
            for path in shards:
                with _opened(path) as shard:
                    specs |= _specs(shard.metadata() or {}, path)
                    weight_map |= dict.fromkeys(shard.keys(), path.name)
                total += path.stat().st_size
                if path.name != REST:
                    reports += json.loads(path.with_suffix(".json").read_text())
            self._copy_companions()
            _write_json(self.out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            files = {p.name: {"bytes": p.stat().st_size, "sha256": digest.of_file(p)} for p in shards}
            _write_json(self.out / MANIFEST, {**self.work, **extra, "files": files, "sites": reports})
            _write_json(self.out / "config.json", self._config(specs))
            (self.out / WORK).unlink()
            for path in shards[:-1]:
                path.with_suffix(".json").unlink()
        self.close()
        return self.out

    def close(self) -> None:
        """Let another process write here."""
        self._lock.close()
        (self.out / LOCK).unlink(missing_ok=True)

    def _begin(self) -> None:
        marker = self.out / WORK
        if (self.out / "config.json").exists():
            held = self.out / MANIFEST
            same = held.exists() and {k: read_json(held).get(k) for k in self.work} == _jsoned(self.work)
            raise StorageError(
                "holds this very result already" if same else "holds another model", where=str(self.out),
                why="nothing is overwritten", fix="another -o, or remove the directory first",
            )  # fmt: skip
        if marker.exists():
            if read_json(marker) != _jsoned(self.work):
                raise StorageError(
                    "holds an unfinished run of another recipe, model or text", where=str(self.out),
                    fix="the same command as before to go on with it, another -o, or remove the directory",
                )  # fmt: skip
        elif any(p.name != LOCK for p in self.out.iterdir()):
            raise StorageError("is not empty", where=str(self.out), why="nothing is overwritten", fix="another -o")
        else:
            _write_json(marker, self.work)

    def _shard(self, block: str) -> Path:
        return self.out / f"lowbit-block-{self.source.blocks.index(block):05d}.safetensors"

    def _copy_companions(self) -> None:
        if self.source.root is None:
            return
        for pattern in _COPIED:
            for path in self.source.root.glob(pattern):
                if path.is_file() and path.suffix not in (".safetensors", ".bin", ".py"):
                    shutil.copyfile(path, self.out / path.name)

    def _config(self, specs: Mapping[str, Spec]) -> dict[str, Any]:
        grouped: dict[Spec, list[str]] = {}
        for site, spec in specs.items():
            grouped.setdefault(spec, []).append(site)
        config = json.loads(self.source.config.to_json_string(use_diff=False))
        config["quantization_config"] = {
            "quant_method": "lowbit", "version": VERSION, "recipe": self.recipe.line,
            "formats": [{"spec": spec.to_json(), "sites": sites} for spec, sites in grouped.items()],
        }  # fmt: skip
        return dict(config)


def site_specs(quantization_config: Mapping[str, Any], where: str) -> dict[str, Spec]:
    """The spec of every site from a config's ``quantization_config``; raises CheckpointError when it is not one."""
    if quantization_config.get("version") != VERSION:
        raise CheckpointError(
            f"quantization_config.version is {quantization_config.get('version')!r}", where=where,
            why=f"this lowbit reads version {VERSION}", fix="another version of lowbit",
        )  # fmt: skip
    specs: dict[str, Spec] = {}
    try:
        for entry in quantization_config["formats"]:
            spec = Spec.from_json(entry["spec"])
            specs |= dict.fromkeys(map(str, entry["sites"]), spec)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"quantization_config.formats is malformed: {error!r}", where=where) from error
    return specs


def verify(root: Path, contents: bool = True) -> dict[str, Any]:
    """Check a native checkpoint against its manifest, before anything is allocated; returns the manifest.

    Sizes and headers always; every byte's sha256 when ``contents``. Raises CheckpointError naming file and field.
    """
    try:
        manifest = read_json(root / MANIFEST)
    except Exception as error:
        raise CheckpointError(f"no readable manifest: {error}", where=str(root / MANIFEST)) from error
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"version is {manifest.get('version')!r}, this lowbit reads {VERSION}", where=str(root / MANIFEST),
        )  # fmt: skip
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(v, dict) for v in files.values()):
        raise CheckpointError("files is no table", where=str(root / MANIFEST))
    for name, entry in files.items():
        path = root / name
        if "/" in name or name.startswith(".") or not path.is_file():
            raise CheckpointError(f"the file {name!r} is missing", where=str(root), fix="copy the directory again")
        if path.stat().st_size != entry.get("bytes"):
            raise CheckpointError(
                f"has {path.stat().st_size} bytes, files.{name}.bytes says {entry.get('bytes')}", where=str(path),
                why="it was cut short or altered", fix="copy it again",
            )  # fmt: skip
        if contents and digest.of_file_cached(path) != entry.get("sha256"):
            raise CheckpointError(
                f"its bytes do not have files.{name}.sha256", where=str(path), why="it was altered",
                fix="copy it again, or quantize again",
            )  # fmt: skip
    return manifest


def is_native(root: Path) -> bool:
    return (root / MANIFEST).is_file() and (root / "config.json").is_file()


def qtensors(root: Path) -> Iterator[tuple[str, QTensor]]:
    """Every low-bit site of a verified checkpoint with its QTensor, one shard at a time."""
    for name in verify(root, contents=False)["files"]:
        path = root / name
        with _opened(path) as shard:
            for site, spec in _specs(shard.metadata() or {}, path).items():
                prefix = f"{site}.weight."
                yield site, build(spec, {prefix + p: shard.get_tensor(prefix + p) for p in spec.paths()}, prefix)


def _sixteen(tensor: Tensor) -> Tensor:
    """float32 becomes float16 where it fits and bfloat16 elsewhere; everything else stays as it is."""
    if tensor.dtype != torch.float32:
        return tensor.contiguous()
    fits = tensor.numel() == 0 or float(tensor.abs().max()) < torch.finfo(torch.float16).max
    return tensor.to(torch.float16 if fits else torch.bfloat16).contiguous()


def _specs(metadata: Mapping[str, str], path: Path) -> dict[str, Spec]:
    try:
        held = json.loads(metadata["lowbit"])
        if held["version"] != VERSION:
            raise CheckpointError(f"metadata.lowbit.version is {held['version']!r}", where=str(path))
        return {str(site): Spec.from_json(spec) for site, spec in held["specs"].items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"metadata.lowbit is malformed: {error!r}", where=str(path)) from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path), fix="remove it and run again") from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file(dict(tensors), partial, metadata={"format": "pt", "lowbit": digest.canonical(header)})
    _commit(partial, path)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _commit(partial, path)


def _commit(partial: Path, path: Path) -> None:
    """Make a finished file visible under its name, durably."""
    with partial.open("rb") as f:
        os.fsync(f.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _acquire(out: Path) -> Any:
    lock = (out / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise StorageError(
            "another process is writing here", where=str(out), fix="wait for it, or another -o"
        ) from None
    return lock


@contextlib.contextmanager
def _storage(out: Path) -> Iterator[None]:
    """Disk trouble as one clear error; what was finished stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        raise StorageError(
            "the disk is full" if full else f"cannot be written: {error}", where=str(out),
            why="finished blocks are kept", fix="make room, then the same command again" if full else "",
        ) from error  # fmt: skip


def _jsoned(value: Any) -> Any:
    return json.loads(json.dumps(value))
