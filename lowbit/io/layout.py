"""The layout of a native checkpoint's shards (docs/reference/checkpoint.md): their metadata, and reading them.

A shard is a safetensors file; the ``lowbit`` entry of its metadata is JSON with the version and the spec of every
low-bit site in it, whose parts are tensors named ``SITE.weight.PATH``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lowbit import digest
from lowbit.errors import CheckpointError, FormatError
from lowbit.formats.qtensor import QTensor, build
from lowbit.formats.spec import Spec

VERSION = 1


def header(specs: Mapping[str, Spec]) -> dict[str, str]:
    """The metadata of a shard."""
    held = {"specs": {site: spec.to_json() for site, spec in specs.items()}, "version": VERSION}
    return {"format": "pt", "lowbit": digest.canonical(held)}


def shard_specs(metadata: Mapping[str, str], path: Path) -> dict[str, Spec]:
    try:
        held = json.loads(metadata["lowbit"])
        if held["version"] != VERSION:
            raise CheckpointError(f"metadata.lowbit.version is {held['version']!r}", where=str(path))
        return {str(site): Spec.from_json(spec) for site, spec in held["specs"].items()}
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, FormatError) as error:
        raise CheckpointError(f"metadata.lowbit is malformed: {error!r}", where=str(path)) from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path), fix="remove it and run again") from error


def check_parts(shard: Any, site: str, spec: Spec, path: Path) -> None:
    held = set(shard.keys())
    for part, leaf in spec.paths(f"{site}.weight.").items():
        if part not in held:
            raise CheckpointError(f"the part {part!r} is missing", where=str(path))
        header = shard.get_slice(part)
        found = (_DTYPES.get(header.get_dtype()), tuple(header.get_shape()))
        if found != (leaf.dtype, leaf.shape):
            raise CheckpointError(
                f"{part} is {found}, metadata.lowbit says {(leaf.dtype, leaf.shape)}", where=str(path)
            )


_DTYPES = {
    "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32",
}  # fmt: skip


def read_shard(path: Path) -> Iterator[tuple[str, QTensor]]:
    with opened(path) as shard:
        for site, spec in shard_specs(shard.metadata() or {}, path).items():
            check_parts(shard, site, spec, path)
            prefix = f"{site}.weight."
            yield site, build(spec, {part: shard.get_tensor(part) for part in spec.paths(prefix)}, prefix)


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
    except (KeyError, TypeError, AttributeError, FormatError) as error:
        raise CheckpointError(f"quantization_config.formats is malformed: {error!r}", where=where) from error
    return specs
