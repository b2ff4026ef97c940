"""Reading a GGUF file as a model of QTensors: nothing is rounded, and nothing believed unchecked."""

from __future__ import annotations

import warnings as python_warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped

from lowbit.arrays import Tensor, UInt8
from lowbit.errors import CheckpointError, LowbitError, ModelError
from lowbit.formats.qtensor import QTensor
from lowbit.io.gguf.blocks import unpack
from lowbit.io.gguf.card import save_card
from lowbit.io.gguf.fields import KINDS
from lowbit.io.gguf.metadata import config_of
from lowbit.io.gguf.names import Names, Place
from lowbit.io.gguf.tokenizer import save_tokenizer
from lowbit.io.opening import skeleton
from lowbit.models.gguf import plain
from lowbit.models.gguf_header import check_header
from lowbit.models.store import Memory

_PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_KNOWN_EXTRA = ("rope_freqs.weight",)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its type, shape (rows before columns), and bytes, mapped."""

    kind: str
    shape: tuple[int, ...]
    data: Shaped[np.ndarray, "..."]

    def rows(self, expert: int | None) -> UInt8[Tensor, "rows bytes"]:
        """The bytes of each row, or of each number of a vector, copied."""
        part = self.data if expert is None else self.data[expert]
        count = self.shape[-2] if len(self.shape) > 1 else self.shape[0]
        return torch.from_numpy(np.ascontiguousarray(part).view(np.uint8).reshape(count, -1).copy())


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file in the terms of transformers. ``tensors`` may be walked again; nothing is kept."""

    path: Path
    config: Mapping[str, Any]
    """For ``config.json``, without a ``quantization_config``."""
    warnings: tuple[str, ...]
    _fields: Mapping[str, Any]
    _stored: Mapping[str, Stored]
    _names: Names

    def tensors(self) -> Iterator[tuple[str, QTensor | Tensor]]:
        """Every parameter by the model's name: quantized weights of linears as QTensors, all else as plain tensors.

        Raises CheckpointError for blocks that are none.
        """
        for name in self._names.places:
            try:
                yield name, self._tensor(name)
            except CheckpointError as error:
                raise CheckpointError(error.what, where=f"{self.path}: {name}: {error.where}", why=error.why) from error

    def companions(self, folder: Path) -> None:
        """Write tokenizer files and chat template, and a card with the license; nothing of what the file lacks."""
        save_tokenizer(self._fields, self.path, folder)
        save_card(self._fields, folder)

    def _tensor(self, name: str) -> QTensor | Tensor:
        shape, found = self._names.shapes[name], []
        for place in self._names.places[name]:
            if place.name not in self._stored:
                return torch.zeros(shape)  # a bias that only some linears of the file have
            rows = self._stored[place.name].rows(place.expert)
            if place.order is not None:
                rows = torch.empty_like(rows).index_copy_(0, place.order, rows)
            found.append((self._stored[place.name].kind, rows))
        kind, data = found[0][0], torch.cat([rows for _, rows in found])
        if any(other != kind for other, _ in found):
            raise CheckpointError(
                f"is {', '.join(other for other, _ in found)}", where=name, why="experts of two types"
            )
        if kind in KINDS:
            q = unpack(kind, data, shape[-1])
            return q if name in self._names.linears else _narrow(q.decode())
        value = data.view(_PLAIN[kind]).reshape(shape)
        if self._names.family.norm_plus_one and name.endswith("norm.weight"):
            value = value.to(torch.float32) - 1
        if name in self._names.transposed:
            value = value.t().contiguous()
        return _narrow(value) if value.ndim > 1 else value


def read(path: Path) -> GgufModel:
    """Open a GGUF file; reads its header and maps its tensors. Coded files are decoded into the cache first.

    Raises ModelError for a file that is no whole GGUF file, and CheckpointError, naming the key or the tensor, for
    one that is no model that lowbit reads.
    """
    from gguf import GGUFReader

    path = plain(path)
    check_header(path)
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")  # numpy, about scalars that hostile files overflow
            reader = GGUFReader(path)
            fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"is no whole GGUF file: {error}", where=str(path), why="it was altered") from error
    stored = {
        t.name: Stored(t.tensor_type.name.lower(), tuple(int(n) for n in reversed(t.shape)), t.data)
        for t in reader.tensors
    }
    for name, tensor in stored.items():
        if tensor.kind not in KINDS and tensor.kind not in _PLAIN:
            raise CheckpointError(
                f"type {tensor.kind.upper()} is not read", where=f"{path}: {name}",
                fix=f"one of {', '.join([*_PLAIN, *KINDS])}; a file of another type can be requantized by llama.cpp",
            )  # fmt: skip
    try:
        factors = torch.from_numpy(np.array(stored["rope_freqs.weight"].data)) if _KNOWN_EXTRA[0] in stored else None
        config = config_of(fields, {name: tensor.shape for name, tensor in stored.items()}, factors)
        names = Names(skeleton(path.stem, config, Memory({}), None))
    except CheckpointError as error:
        raise CheckpointError(error.what, where=f"{path}: {error.where}", why=error.why, fix=error.fix) from error
    except LowbitError as error:
        raise CheckpointError(f"its values are of no model: {error}", where=str(path)) from error
    extra = _check(names, stored, path)
    return GgufModel(path, config, extra, fields, stored, names)


def _check(names: Names, stored: Mapping[str, Stored], path: Path) -> tuple[str, ...]:
    """Every tensor that the model wants is there in its shape; returns warnings about others."""
    counts: dict[str, int] = {}
    for places in names.places.values():
        for place in places:
            counts[place.name] = max(counts.get(place.name, 0), -1 if place.expert is None else place.expert + 1)
    for name, places in names.places.items():
        for place in places:
            tensor = stored.get(place.name)
            if tensor is None:
                if name.endswith(".bias") and names.family.biases:
                    continue
                raise CheckpointError(f"the tensor {place.name!r} is missing", where=str(path), fix="a whole file")
            expected = _shape(names.shapes[name], place, counts[place.name])
            if tensor.shape != expected:
                raise CheckpointError(
                    f"has shape {tensor.shape}, the header says {expected}", where=f"{path}: {place.name}"
                )
    extra = sorted(stored.keys() - counts.keys() - set(_KNOWN_EXTRA))
    return (f"{len(extra)} tensors are not read: {', '.join(extra[:3])}",) if extra else ()


def _shape(whole: tuple[int, ...], place: Place, experts: int) -> tuple[int, ...]:
    rows = len(range(*place.rows.indices(whole[0])))
    return (rows, *whole[1:]) if place.expert is None else (experts, rows, *whole[1:])


def _narrow(values: Tensor) -> Tensor:
    """In 16 bit where that loses nothing."""
    for dtype in (torch.float16, torch.bfloat16):
        if values.dtype == torch.float32 and torch.equal(values.to(dtype).to(torch.float32), values):
            return values.to(dtype)
    return values
