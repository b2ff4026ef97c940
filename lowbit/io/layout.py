"""The layout of a native checkpoint (docs/reference/checkpoint.md): what shards and ``config.json`` say they hold.

A shard is a safetensors file; the ``lowbit`` entry of its metadata is JSON with the version, the spec of every low-bit
site in it, whose parts are tensors named ``SITE.weight.PATH``, how inputs are rounded, and which parameters changed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lowbit import digest
from lowbit.arrays import Tensor
from lowbit.codec.container import open_tensors
from lowbit.errors import CheckpointError, FormatError, RecipeError
from lowbit.formats.activation import ActivationFormat, Input, activation
from lowbit.formats.heads import CacheFormat
from lowbit.formats.qtensor import QTensor, build
from lowbit.formats.spec import Leaf, Spec

VERSION = 2
READABLE = (1, 2)
"""Version 1 has weights only, in the same layout."""
_BOUND = Leaf("", "float32", (1,))  # the low or the high end of a static range
_MALFORMED = (
    KeyError, TypeError, AttributeError, ValueError, RecursionError, json.JSONDecodeError, FormatError, RecipeError,
)  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What a shard holds beside plain tensors: specs and input formats by site, and names of changed parameters."""

    specs: dict[str, Spec]
    inputs: dict[str, ActivationFormat] = field(default_factory=dict)
    edited: tuple[str, ...] = ()

    def parts(self) -> dict[str, Leaf]:
        """Every tensor that must be there for the sites, by its name."""
        found: dict[str, Leaf] = {}
        for site, spec in self.specs.items():
            found |= spec.paths(f"{site}.weight.")
        for site, fmt in self.inputs.items():
            if fmt.static:
                found |= {f"{site}.input.{end}": _BOUND for end in ("low", "high")}
        return found


@dataclass(frozen=True)
class Settings:
    """What ``quantization_config`` says: what is where, ``added`` parameters that the model itself lacks, the cache."""

    specs: dict[str, Spec]
    inputs: dict[str, ActivationFormat] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    kv: CacheFormat | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields of ``quantization_config``; sites of one spec, or one input format, together."""
        formats: dict[Spec, list[str]] = {}
        for site, spec in self.specs.items():
            formats.setdefault(spec, []).append(site)
        activations: dict[str, list[str]] = {}
        for site, fmt in self.inputs.items():
            activations.setdefault(fmt.name, []).append(site)
        return {
            "version": VERSION,
            "formats": [{"spec": spec.to_json(), "sites": sites} for spec, sites in formats.items()],
            "activations": [{"format": name, "sites": sites} for name, sites in activations.items()],
            "added": list(self.added), "kv": None if self.kv is None else asdict(self.kv),
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Settings:
        """Read an untrusted ``quantization_config``; raises CheckpointError when it is not one."""
        if value.get("version") not in READABLE:
            raise CheckpointError(
                f"quantization_config.version is {value.get('version')!r}", where=where,
                why=f"this lowbit reads versions {READABLE}", fix="another version of lowbit",
            )  # fmt: skip
        specs: dict[str, Spec] = {}
        inputs: dict[str, ActivationFormat] = {}
        name = "formats"
        try:
            for entry in value["formats"]:
                specs |= dict.fromkeys(map(str, entry["sites"]), Spec.from_json(entry["spec"]))
            name = "activations"
            for entry in value.get("activations", []):
                inputs |= dict.fromkeys(map(str, entry["sites"]), activation(entry["format"]))
            _require_sites(inputs, specs)
            name = "added"
            added = _names(value.get("added", []))
            name = "kv"
            kv = None if value.get("kv") is None else _cache(value["kv"])
        except _MALFORMED as error:
            raise CheckpointError(f"quantization_config.{name} is malformed: {error!r}", where=where) from error
        return cls(specs, inputs, added, kv)


def header(contents: Contents) -> dict[str, str]:
    """The metadata of a shard."""
    held = {
        "specs": {site: spec.to_json() for site, spec in contents.specs.items()}, "version": VERSION,
        "inputs": {site: fmt.name for site, fmt in contents.inputs.items()}, "edited": sorted(contents.edited),
    }  # fmt: skip
    return {"format": "pt", "lowbit": digest.canonical(held)}


def contents_of(shard: Any, path: Path) -> Contents:
    """What an opened shard says it holds; raises CheckpointError unless it is all there."""
    try:
        held = json.loads((shard.metadata() or {})["lowbit"])
        if held["version"] not in READABLE:
            raise CheckpointError(f"metadata.lowbit.version is {held['version']!r}", where=str(path))
        specs = {str(site): Spec.from_json(spec) for site, spec in held["specs"].items()}
        inputs = {str(site): activation(name) for site, name in held.get("inputs", {}).items()}
        _require_sites(inputs, specs)
        contents = Contents(specs, inputs, _names(held.get("edited", [])))
    except _MALFORMED as error:
        raise CheckpointError(f"metadata.lowbit is malformed: {error!r}", where=str(path)) from error
    names = set(shard.keys())
    for part, leaf in contents.parts().items():
        if part not in names:
            raise CheckpointError(f"the part {part!r} is missing", where=str(path))
        entry = shard.get_slice(part)
        found = (_DTYPES.get(entry.get_dtype()), tuple(entry.get_shape()))
        if found != (leaf.dtype, leaf.shape):
            raise CheckpointError(
                f"{part} is {found}, metadata.lowbit says {(leaf.dtype, leaf.shape)}", where=str(path)
            )
    if lost := set(contents.edited) - names:
        raise CheckpointError(f"the parameter {min(lost)!r} is missing", where=str(path))
    return contents


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A shard, coded or plain, behind the interface of ``safe_open``; raises CheckpointError."""
    try:
        with open_tensors(path) as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path), fix="remove it and run again") from error


@dataclass(frozen=True)
class Read:
    """The contents of a shard, read."""

    codes: dict[str, QTensor]
    inputs: dict[str, Input]
    edited: dict[str, Tensor]


def read_shard(path: Path) -> Read:
    """Everything that a shard holds but what is as in the source. Raises CheckpointError."""
    with opened(path) as shard:
        contents = contents_of(shard, path)
        codes = {}
        for site, spec in contents.specs.items():
            prefix = f"{site}.weight."
            codes[site] = build(spec, {part: shard.get_tensor(part) for part in spec.paths(prefix)}, prefix)
        inputs = {site: _input(shard, site, fmt) for site, fmt in contents.inputs.items()}
        return Read(codes, inputs, {name: shard.get_tensor(name).float() for name in contents.edited})


def _input(shard: Any, site: str, fmt: ActivationFormat) -> Input:
    if not fmt.static:
        return Input(fmt)
    return Input(fmt, shard.get_tensor(f"{site}.input.low"), shard.get_tensor(f"{site}.input.high"))


def _require_sites(inputs: Iterable[str], specs: Mapping[str, Spec]) -> None:
    if free := set(inputs) - specs.keys():
        raise ValueError(f"inputs of {min(free)!r}, which has no codes")


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} is no list of names")
    return tuple(value)


def _cache(value: Any) -> CacheFormat:
    if not all(type(value[key]) is kind for key, kind in _CACHE.items()):
        raise TypeError(f"{value!r} is no KV format")
    return CacheFormat(**value)


_CACHE = {"key": str, "value": str, "sink": int, "window": int}
_DTYPES = {
    "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32",
}  # fmt: skip
