"""The native checkpoint: a Hugging Face directory whose safetensors hold packed parts (docs/reference/checkpoint.md).

    config.json                      the model's, with quantization_config.quant_method = "lowbit"
    lowbit.json                      recipe, source, calibration, sha256 of every file, one record a site
    model.safetensors.index.json     which shard holds which tensor
    lowbit-block-00000.safetensors   one shard a decoder block, and lowbit-rest.safetensors
    tokenizer and generation files   as the source has them

While a walk is under way the directory holds ``lowbit-work.json`` and the finished shards, but no config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lowbit import digest
from lowbit.arrays import Tensor
from lowbit.errors import CheckpointError, ModelError, StorageError
from lowbit.formats.qtensor import QTensor
from lowbit.formats.spec import Spec
from lowbit.io.layout import VERSION, check_parts, header, opened, read_shard, shard_specs, site_specs
from lowbit.io.storage import LOCK, Lock, storage, write_json, write_tensors
from lowbit.models.graph import outside_blocks, stored
from lowbit.models.source import Source
from lowbit.models.store import INDEX, read_json
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.walk import SiteReport

__all__ = ["VERSION", "Writer", "is_native", "qtensors", "site_specs", "verify"]

MANIFEST, WORK, REST = "lowbit.json", "lowbit-work.json", "lowbit-rest.safetensors"
_COPIED = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json",
           "generation_config.json", "chat_template*", "*.model")  # fmt: skip


class Writer:
    """The sink of a walk that makes a native checkpoint; one process at a time, every file atomic.

    with Writer(out, source, recipe, calibration) as sink:
        if not sink.already_done:
            walk(source, recipe, tokens, sink)
            sink.finish({})
    """

    def __init__(
        self, out: Path, source: Source, recipe: Recipe, calibration: str | None, dtype: torch.dtype = torch.float32
    ) -> None:
        """``calibration`` is the digest of the calibration tokens, None when none are used; ``dtype`` the walk's.

        ``already_done`` tells that the directory holds this very result. Raises StorageError when it holds something
        else, or another process is writing it.
        """
        self.out, self.source, self.recipe = out, source, recipe
        self.work = {
            "version": VERSION, "source": source.digest, "recipe": recipe.model_dump(), "calibration": calibration,
            "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        with storage(out):
            out.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(out)
            try:
                self.already_done = self._begin()
            except BaseException:
                self._lock.release()
                raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def has(self, block: str) -> bool:
        return self._shard(block).exists()

    def read(self, block: str) -> dict[str, QTensor]:
        return dict(read_shard(self._shard(block)))

    def write(self, block: str, module: nn.Module, codes: Mapping[str, QTensor], reports: list[SiteReport]) -> None:
        tensors = {f"{site}.weight.{p.path}": p.data.contiguous() for site, q in codes.items() for p in q.parts()}
        rest = ((f"{block}.{name}", tensor) for name, tensor in stored(module))
        tensors |= self._sixteen((name, t) for name, t in rest if name.removesuffix(".weight") not in codes)
        with storage(self.out):
            write_json(self._shard(block).with_suffix(".json"), [asdict(r) for r in reports])
            write_tensors(self._shard(block), tensors, header({site: q.spec() for site, q in codes.items()}))

    def finish(self, extra: Mapping[str, Any]) -> Path:
        """Write what belongs to no block, the index, the manifest with ``extra``, and last of all config.json."""
        if self.already_done:
            return self.out
        rest = self._sixteen(outside_blocks(self.source.skeleton, self.source.blocks))
        with storage(self.out):
            write_tensors(self.out / REST, rest, header({}))
            blocks = [self._shard(block) for block in self.source.blocks]
            weight_map: dict[str, str] = {}
            specs: dict[str, Spec] = {}
            files: dict[str, dict[str, Any]] = {}
            reports: list[Any] = []
            for path in [*blocks, self.out / REST]:
                with opened(path) as shard:
                    specs |= shard_specs(shard.metadata() or {}, path)
                    weight_map |= dict.fromkeys(shard.keys(), path.name)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": digest.of_file(path)}
            for path in blocks:
                reports += json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            self._copy_companions()
            total = sum(int(entry["bytes"]) for entry in files.values())
            write_json(self.out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            write_json(self.out / MANIFEST, {**extra, **self.work, "files": files, "sites": reports})
            write_json(self.out / "config.json", self._config(specs))
            self._clean()
        self.close()
        return self.out

    def close(self) -> None:
        """Let another process write here."""
        self._lock.release()

    def _begin(self) -> bool:
        """Whether the result is there already; else marks the directory as this work's."""
        marker = self.out / WORK
        if (self.out / "config.json").exists():
            if not is_native(self.out) or _work_of(self.out / MANIFEST, self.work) != self.work:
                raise StorageError(
                    "holds another model", where=str(self.out), why="nothing is overwritten",
                    fix="another -o, or remove the directory first",
                )  # fmt: skip
            verify(self.out, contents=False)
            self._clean()
            return True
        if marker.exists():
            if _work_of(marker, self.work) != self.work:
                raise StorageError(
                    "holds an unfinished run of another recipe, model or text", where=str(self.out),
                    fix="the same command as before to go on with it, another -o, or remove the directory",
                )  # fmt: skip
        elif any(p.name not in (LOCK, f"{WORK}.partial") for p in self.out.iterdir()):
            raise StorageError("is not empty", where=str(self.out), why="nothing is overwritten", fix="another -o")
        else:
            write_json(marker, self.work)
        return False

    def _clean(self) -> None:
        """Remove what only an unfinished run needs; config.json is there, so a kill in between loses nothing."""
        for block in self.source.blocks:
            self._shard(block).with_suffix(".json").unlink(missing_ok=True)
        (self.out / WORK).unlink(missing_ok=True)

    def _sixteen(self, held: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The source's weights of these names in 16 bit, and its buffers as they are; absent ones are computed."""
        kept = {}
        for name, tensor in held:
            if isinstance(tensor, nn.Parameter):
                kept[name] = _to_sixteen(self.source.tensor(name, tuple(tensor.shape)))
            elif self.source.has(name):
                kept[name] = self.source.tensor(name, tuple(tensor.shape)).contiguous()
        return kept

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


def verify(root: Path, contents: bool = True) -> dict[str, Any]:
    """Check a native checkpoint against its manifest, before anything is allocated; returns the manifest.

    Sizes, headers, index and specs always; every byte's sha256 when ``contents``. Raises CheckpointError naming file
    and field.
    """
    try:
        manifest = read_json(root / MANIFEST)
        index, config = read_json(root / INDEX), read_json(root / "config.json")
    except ModelError as error:
        raise CheckpointError(error.what, where=error.where, fix="copy the directory again") from error
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
    _check_headers(root, list(files), index, config)
    return manifest


def _check_headers(root: Path, files: list[str], index: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Every tensor is where the index says and is what the specs of its shard and of config.json say."""
    where: dict[str, str] = {}
    specs: dict[str, Spec] = {}
    for name in files:
        path = root / name
        with opened(path) as shard:
            where |= dict.fromkeys(shard.keys(), name)
            for site, spec in shard_specs(shard.metadata() or {}, path).items():
                specs[site] = spec
                check_parts(shard, site, spec, path)
    if index.get("weight_map") != where:
        raise CheckpointError("weight_map is not what the shards hold", where=str(root / INDEX), fix="copy it again")
    if site_specs(config.get("quantization_config") or {}, str(root / "config.json")) != specs:
        raise CheckpointError(
            "quantization_config.formats is not what the shards hold", where=str(root / "config.json"),
            fix="copy it again",
        )  # fmt: skip


def is_native(root: Path) -> bool:
    return (root / MANIFEST).is_file() and (root / "config.json").is_file()


def qtensors(root: Path) -> Iterator[tuple[str, QTensor]]:
    """Every low-bit site of a verified checkpoint with its QTensor, one shard at a time."""
    for name in verify(root, contents=False)["files"]:
        yield from read_shard(root / name)


def _work_of(path: Path, work: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a manifest or marker that say which work it belongs to."""
    held = read_json(path)
    return {key: held.get(key) for key in work}


def _to_sixteen(tensor: Tensor) -> Tensor:
    """float32 becomes float16 where it fits and bfloat16 elsewhere; everything else stays as it is."""
    if tensor.dtype != torch.float32:
        return tensor.contiguous()
    fits = tensor.numel() == 0 or float(tensor.abs().max()) < torch.finfo(torch.float16).max
    return tensor.to(torch.float16 if fits else torch.bfloat16).contiguous()
