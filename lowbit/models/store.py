"""Where weights come from: safetensors files read by mmap, or a model in memory. Untrusted files are refused."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError

from lowbit import digest
from lowbit.arrays import Tensor
from lowbit.codec.container import Reader, as_tensor, open_tensors
from lowbit.codec.identity import of_decoded
from lowbit.errors import ModelError, WeightError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_JSON = 64 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@runtime_checkable
class TensorStore(Protocol):
    """Named tensors, one at a time."""

    def names(self) -> Iterable[str]: ...
    def get(self, name: str, index: int | None = None) -> Tensor: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def nbytes(self) -> int: ...
    def digest(self) -> str: ...


class Files:
    """The safetensors files of a model directory. Headers are read and checked at once, tensors on demand.

    Coded files (docs/reference/container.md) are read like plain ones: the same tensors and the same identity.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = weight_files(root)
        self.coded: list[Path] = []
        self._where: dict[str, tuple[Any, str]] = {}
        self._last: tuple[str, Tensor] | None = None  # experts are asked for one by one, and decoded all at once
        for path in self.files:
            try:
                handle = open_tensors(path)
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"cannot be read: {error}", where=str(path),
                    why="the file is truncated, altered or not safetensors", fix="download or copy it again",
                ) from error  # fmt: skip
            if isinstance(handle, Reader):
                self.coded.append(path)
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                self._where[name] = (handle, path.name)

    def names(self) -> Iterable[str]:
        return self._where

    def get(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or only its slice ``index`` along the first dimension. Raises WeightError when it is missing."""
        if name not in self._where:
            raise WeightError(f"the weight {name!r} is missing", where=str(self.root), fix="check the shards")
        handle = self._where[name][0]
        if index is None:
            whole: Tensor = handle.get_tensor(name)
            return whole
        if not isinstance(handle, Reader):
            part: Tensor = handle.get_slice(name)[index]
            return part
        if self._last is None or self._last[0] != name:
            self._last = (name, handle.get_tensor(name))
        return self._last[1][index].clone()

    def state(self) -> dict[str, Tensor]:
        """Every tensor, those of coded files decoded by several threads."""
        found = {}
        for handle in dict.fromkeys(handle for handle, _ in self._where.values()):
            if isinstance(handle, Reader):
                for name, data in handle.read_all():
                    found[name] = as_tensor(handle.entries[name], data)
            else:
                found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name][0].get_slice(name).get_shape())

    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(path.stat().st_size for path in self.files)

    def digest(self) -> str:
        """sha256 over the sha256 of the files, coded ones decoded: compressing a model does not change what it is.

        Reads every byte once, then remembered by size and time of change.
        """
        return digest.of_value([[path.name, of_decoded(path)] for path in self.files])


class Memory:
    """The state of a model in memory."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def names(self) -> Iterable[str]:
        return self.state

    def get(self, name: str, index: int | None = None) -> Tensor:
        if name not in self.state:
            raise WeightError(f"the weight {name!r} is missing", where="the model in memory")
        tensor = self.state[name].detach()
        return tensor if index is None else tensor[index]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.state.values())

    def digest(self) -> str:
        return digest.of_value([[name, digest.of_tensor(self.state[name])] for name in sorted(self.state)])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file of at most 64 MiB; raises ModelError otherwise.

    JSON as RFC 8259 has it: no NaN, no infinity (``1e999`` is one), no half of a surrogate pair.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise ModelError("is no regular file", where=str(path), fix="a Hugging Face model directory")
        if state.st_size > _MAX_JSON:
            raise ModelError(f"larger than {_MAX_JSON >> 20} MiB", where=str(path), why="no such file is this large")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if _SURROGATE.search(text):  # an escaped half of a character has no UTF-8, and so no digest
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise ModelError("does not exist", where=str(path), fix="a Hugging Face model directory") from None
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"is not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=str(path))
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def require_counts(config: Mapping[str, Any], store: TensorStore, where: str) -> None:
    """Raises ModelError unless an untrusted configuration counts no more layers and experts than files can hold.

    To be called before a model is built, which takes time and memory for every layer. Layers have a tensor each;
    experts have one each, or are slices of one along its first dimension.
    """
    names = list(store.names())
    for key in (*_LAYERS, *_EXPERTS):
        count = config.get(key)
        if count is None:
            continue
        if type(count) is not int or count < 0:
            raise ModelError(f"{key} is {str(count)[:50]!r}", where=where, why="it is a whole number")
        most = len(names)
        if count > most and key in _EXPERTS:
            most = max((most, *(n for name in names for n in store.shape(name)[:1])))
        if count > most:
            raise ModelError(
                f"{key} is {str(count)[:50]}, the files hold {len(names)} tensors", where=where,
                why="the configuration is of another model, or was altered",
            )  # fmt: skip
    for part in config.values():
        if isinstance(part, Mapping):  # text_config and the like
            require_counts(part, store, where)


def weight_files(root: Path) -> list[Path]:
    """The safetensors files of a directory, by its index when it has one.

    Raises ModelError for a missing shard, for a name that leaves the directory, and for pickled weights.
    """
    if (root / INDEX).exists():
        weight_map = read_json(root / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError("has no weight_map", where=str(root / INDEX))
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if "/" in name or "\\" in name or name.startswith("."):
                raise ModelError(f"names a file outside its directory: {name!r}", where=str(root / INDEX))
            if not _is_file(root / name):
                raise ModelError(
                    f"the shard {name!r} is missing", where=str(root),
                    why="a model cannot be read without all its shards", fix="download the directory again",
                )  # fmt: skip
        return [root / name for name in names]
    if _is_file(root / SINGLE):
        return [root / SINGLE]
    if any(root.glob("*.bin")):
        raise ModelError(
            "holds pickled weights only", where=str(root), why="unpickling runs code",
            fix="convert it to safetensors where you trust it",
        )  # fmt: skip
    raise ModelError("holds no model.safetensors", where=str(root), fix="a Hugging Face directory or a .gguf file")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()  # no pipe or device, which would be waited for
    except OSError:  # a name that is too long
        return False
