"""Low-bit models behind one face, whatever files they lie in: a native checkpoint, another ecosystem's, a GGUF file.

    model = open_low_bit(path)
    model.specs                         # what is where, without its data
    for group in model.groups(): ...    # the QTensors of a block, and its other tensors, block by block

Export, import, convert and check read nothing but this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit import digest
from lowbit.arrays import Tensor
from lowbit.errors import LowbitError, ModelError
from lowbit.formats.activation import ActivationFormat, Input
from lowbit.formats.heads import CacheFormat
from lowbit.formats.qtensor import QTensor
from lowbit.formats.spec import Spec
from lowbit.io.layout import contents_of, opened, read_shard
from lowbit.io.native import copy_companions
from lowbit.io.pickles import refuse_pickles
from lowbit.io.reading import is_native, settings, verify
from lowbit.models.source import Source
from lowbit.models.store import Files, TensorStore, read_json, require_counts

REST = ""
"""The name of the group that holds what lies outside of all blocks."""


@dataclass(frozen=True)
class Group:
    """A decoder block, or what lies outside of all (``REST``): codes by site, other tensors by the model's names."""

    name: str
    codes: Mapping[str, QTensor]
    inputs: Mapping[str, Input] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    edited: frozenset[str] = frozenset()
    """Names in ``dense`` that a transform changed, or that the model itself lacks."""


@dataclass(frozen=True)
class LowBit:
    """A low-bit model whose tensors are read group by group."""

    path: Path
    origin: str
    """``lowbit``, or the layout that it lies in: ``gptq``, ``gguf``, ..."""
    recipe: str
    """What made it, in a line."""
    digest: str
    """Identity of the files."""
    source: Source
    """Its structure, and the weights that have no codes."""
    config: Mapping[str, Any]
    """``config.json`` without its ``quantization_config``."""
    specs: Mapping[str, Spec]
    """By site, named as in the model, experts apart."""
    inputs: Mapping[str, ActivationFormat]
    kv: CacheFormat | None
    groups: Callable[[], Iterator[Group]]
    """Reads the files once a call, and holds one group at a time."""
    companions: Callable[[Path], None]
    """Writes tokenizer and generation files into a directory."""
    added: frozenset[str] = frozenset()
    """Biases that the model itself lacks."""
    warnings: tuple[str, ...] = ()


def open_low_bit(path: Path) -> LowBit:
    """Open a low-bit model of any known layout; runs nothing from it and loads no tensor of a native one.

    Of another ecosystem's files, every tensor is read once, to see that they are what their configuration says.
    Raises ModelError and CheckpointError naming file, field and tensor.
    """
    from lowbit.io.foreign import open_foreign, open_gguf

    refuse_pickles(path)
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path)
    if not path.is_dir():
        raise ModelError(
            "is no directory and no .gguf file" if path.exists() else "does not exist", where=str(path),
            fix="a checkpoint of lowbit quantize, or low-bit files of another ecosystem",
        )  # fmt: skip
    return open_native(path) if is_native(path) else open_foreign(path)


def open_native(root: Path) -> LowBit:
    """A native checkpoint, every byte checked against its manifest."""
    manifest = verify(root)
    said, config = settings(root), plain_config(root)
    source = skeleton(root.resolve().name, config, Files(root), root)
    files = manifest["files"]
    return LowBit(
        root, "lowbit", str((read_json(root / "config.json")["quantization_config"]).get("recipe", "")),
        digest.of_value({name: entry["sha256"] for name, entry in files.items()}), source, config,
        said.specs, said.inputs, said.kv, lambda: (_native_group(root / name, source) for name in files),
        lambda folder: copy_companions(root, folder), frozenset(said.added),
    )  # fmt: skip


def skeleton(name: str, config: Mapping[str, Any], store: TensorStore, root: Path | None) -> Source:
    """The structure that an untrusted configuration means, by transformers' own code; raises ModelError."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    where = name if root is None else str(root)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ModelError(
            f"model type {kind!r} is not known to transformers", where=where,
            why="code from model folders is never run, also where auto_map asks for it",
            fix="a model that transformers supports itself",
        )  # fmt: skip
    if root is not None:  # the reader of a GGUF file has held its counts against its tensors
        require_counts(config, store, where)
    try:
        return Source(name, CONFIG_MAPPING[kind].from_dict(dict(config)), store, root)
    except LowbitError:
        raise
    except Exception as error:  # an untrusted configuration can make transformers and torch raise anything
        raise ModelError(f"is no model that transformers knows: {error}", where=where) from error


def plain_config(root: Path) -> dict[str, Any]:
    """``config.json`` without what is said of low bits, and without references to code."""
    config = read_json(root / "config.json")
    return {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}


def _native_group(path: Path, source: Source) -> Group:
    read = read_shard(path)
    with opened(path) as shard:
        parts = contents_of(shard, path).parts()
        dense = {name: shard.get_tensor(name) for name in shard.keys() if name not in parts}  # noqa: SIM118
    names = [*read.codes, *dense]
    block = next((b for b in source.blocks if any(name.startswith(b + ".") for name in names)), REST)
    return Group(block, read.codes, read.inputs, dense | read.edited, frozenset(read.edited))
