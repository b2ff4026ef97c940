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
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lowbit import digest
from lowbit.arrays import Tensor
from lowbit.errors import StorageError
from lowbit.formats.activation import Input
from lowbit.formats.heads import CacheFormat
from lowbit.formats.qtensor import QTensor
from lowbit.io.layout import VERSION, Contents, Settings, contents_of, header, opened, read_shard
from lowbit.io.reading import MANIFEST, Held, is_native, qtensors, settings, verify
from lowbit.io.storage import LOCK, Lock, storage, write_json, write_tensors
from lowbit.models.graph import outside_blocks, stored
from lowbit.models.source import Source
from lowbit.models.store import INDEX, read_json
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.result import Finished

__all__ = ["MANIFEST", "VERSION", "Settings", "Writer", "cache_format", "is_native", "qtensors", "settings", "verify"]

WORK, REST = "lowbit-work.json", "lowbit-rest.safetensors"
_COPIED = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json",
           "generation_config.json", "chat_template*", "*.model", "README.md", "LICENSE*", "NOTICE*")  # fmt: skip


class Writer:
    """The sink of a walk that makes a native checkpoint; one process at a time, every file atomic.

    with Writer(out, source, recipe, calibration) as sink:
        if not sink.already_done:
            walk(source, recipe, tokens, sink)
            sink.finish({})
    """

    def __init__(
        self, out: Path, source: Source, recipe: Recipe, calibration: str | None, dtype: torch.dtype = torch.float32,
        identity: str | None = None,
    ) -> None:  # fmt: skip
        """``calibration`` is the digest of the calibration tokens, None when none are used; ``dtype`` the walk's;
        ``identity`` that of the original where it is more than the source's own digest.

        ``already_done`` tells that the directory holds this very result. Raises StorageError when it holds something
        else, or another process is writing it.
        """
        self.out, self.source, self.recipe = out, source, recipe
        self.work = {
            "version": VERSION, "source": identity or source.digest, "recipe": recipe.model_dump(),
            "calibration": calibration, "dtype": str(dtype).removeprefix("torch."),
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

    def read(self, block: str) -> Finished:
        """A block as it was written, without its reports."""
        held = read_shard(self._shard(block))
        return Finished(held.codes, held.inputs, held.edited)

    def write(self, block: str, module: nn.Module, done: Finished) -> None:
        codes, inputs, edited = done.codes, done.inputs, done.edited
        tensors = parts_of(codes, inputs) | {name: _edited(value) for name, value in edited.items()}
        rest = ((f"{block}.{name}", tensor) for name, tensor in stored(module))
        kept = ((name, t) for name, t in rest if name.removesuffix(".weight") not in codes and name not in edited)
        tensors |= self.sixteen(kept)
        contents = Contents(
            {site: q.spec() for site, q in codes.items()}, {site: i.format for site, i in inputs.items()}, (*edited,)
        )
        with storage(self.out):
            write_json(self._shard(block).with_suffix(".json"), [asdict(r) for r in done.reports])
            write_tensors(self._shard(block), tensors, header(contents))

    def finish(self, extra: Mapping[str, Any]) -> Path:
        """Write what belongs to no block, the index, the manifest with ``extra``, and last of all config.json."""
        if self.already_done:
            return self.out
        rest, contents = self.outside()
        with storage(self.out):
            write_tensors(self.out / REST, rest, header(contents))
            blocks = [self._shard(block) for block in self.source.blocks]
            weight_map: dict[str, str] = {}
            held = Held()
            files: dict[str, dict[str, Any]] = {}
            reports: list[Any] = []
            for path in [*blocks, self.out / REST]:
                with opened(path) as shard:
                    held.add(contents_of(shard, path))
                    weight_map |= dict.fromkeys(shard.keys(), path.name)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": digest.of_file(path)}
            for path in blocks:
                reports += json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if self.source.root is not None:
                copy_companions(self.source.root, self.out)
            total = sum(int(entry["bytes"]) for entry in files.values())
            write_json(self.out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            write_json(self.out / MANIFEST, {**extra, **self.work, "files": files, "sites": reports})
            write_json(self.out / "config.json", self._config(held))
            self._clean()
        self.close()
        return self.out

    def outside(self) -> tuple[dict[str, Tensor], Contents]:
        """What belongs to no block."""
        return self.sixteen(outside_blocks(self.source.skeleton, self.source.blocks)), Contents({})

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

    def sixteen(self, held: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The source's weights of these names in 16 bit, and its buffers as they are; absent ones are computed."""
        kept = {}
        for name, tensor in held:
            if isinstance(tensor, nn.Parameter):
                kept[name] = self.narrowed(self.source.tensor(name, tuple(tensor.shape)))
            elif self.source.has(name):
                kept[name] = self.source.tensor(name, tuple(tensor.shape)).contiguous()
        return kept

    def narrowed(self, tensor: Tensor) -> Tensor:
        """A parameter of the source as it is stored: in 16 bit."""
        return _to_sixteen(tensor)

    def _shard(self, block: str) -> Path:
        return self.out / f"lowbit-block-{self.source.blocks.index(block):05d}.safetensors"

    def _config(self, held: Held) -> dict[str, Any]:
        known = {name for name, _ in self.source.skeleton.named_parameters()}
        added = tuple(sorted(held.edited - known))
        found = Settings(held.specs, held.inputs, added, cache_format(self.recipe))
        config = json.loads(self.source.config.to_json_string(use_diff=False))
        config["quantization_config"] = {"quant_method": "lowbit", "recipe": self.recipe.line, **found.to_json()}
        return dict(config)


def cache_format(recipe: Recipe) -> CacheFormat | None:
    """How the recipe wants keys and values rounded."""
    kv = recipe.kv
    return None if kv is None else CacheFormat(kv.key, kv.value, kv.sink, kv.window)


def parts_of(codes: Mapping[str, QTensor], inputs: Mapping[str, Input]) -> dict[str, Tensor]:
    """The tensors of low-bit sites, by their names in a shard."""
    tensors = {f"{site}.weight.{p.path}": p.data.contiguous() for site, q in codes.items() for p in q.parts()}
    for site, rounding in inputs.items():
        ends = {"low": rounding.low, "high": rounding.high}
        tensors |= {f"{site}.input.{end}": value for end, value in ends.items() if value is not None}
    return tensors


def copy_companions(root: Path, out: Path) -> None:
    """Copy a model's tokenizer and generation files, card and license; never code, never pickles. Raises OSError."""
    for pattern in _COPIED:
        for path in root.glob(pattern):
            if path.is_file() and path.suffix not in (".safetensors", ".bin", ".py"):
                shutil.copyfile(path, out / path.name)


def _work_of(path: Path, work: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a manifest or marker that say which work it belongs to."""
    held = read_json(path)
    return {key: held.get(key) for key in work}


def _edited(value: Tensor) -> Tensor:
    """Changed norms and biases keep float32: they are few, and what they undo is exact. Matrices go to 16 bit."""
    return value.to(torch.float32).contiguous() if value.ndim < 2 else _to_sixteen(value)


def _to_sixteen(tensor: Tensor) -> Tensor:
    """float32 becomes float16 where it fits and bfloat16 elsewhere; everything else stays as it is."""
    if tensor.dtype != torch.float32:
        return tensor.contiguous()
    fits = tensor.numel() == 0 or float(tensor.abs().max()) < torch.finfo(torch.float16).max
    return tensor.to(torch.float16 if fits else torch.bfloat16).contiguous()
