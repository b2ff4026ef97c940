"""What coding gives, field by field: order-0 entropy against stored bits, also of files that are not coded yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowbit.codec.coding import Blob, decode, entropy, fit, histogram, layout, price
from lowbit.codec.container import Reader, is_coded
from lowbit.errors import ModelError
from lowbit.io.compress import execution_order
from lowbit.io.plain import open_plain


@dataclass(frozen=True)
class FieldEntropy:
    """A field of a tensor: ``raw_bits`` of a code, its order-0 ``entropy`` in bits a code, and the bytes stored.

    ``nbytes`` is estimated where the file is not coded.
    """

    name: str
    codec: str
    codes: int
    raw_bits: int
    entropy: float
    nbytes: float

    @property
    def stored_bits(self) -> float:
        """Bits a code."""
        return 8 * self.nbytes / self.codes if self.codes else 0.0


@dataclass(frozen=True)
class TensorEntropy:
    """A tensor; no fields where its bytes are best left as they are. ``stored``: bytes, estimated if not coded yet."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    stored: float
    layout: str | None
    fields: tuple[FieldEntropy, ...]


def entropies(path: Path) -> Iterator[TensorEntropy]:
    """Every tensor of a file, or of the safetensors and GGUF files of a directory. Reads every byte; encodes nothing.

    Raises ModelError where there is no such file, CheckpointError for a damaged coded one.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".gguf"))
    if not files:
        raise ModelError("holds no safetensors or GGUF file", where=str(path), fix="a model directory or file")
    for file in files:
        yield from _coded(file) if is_coded(file) else _plain(file)


def _coded(path: Path) -> Iterator[TensorEntropy]:
    with Reader(path) as reader:
        for entry in reader.entries.values():
            fields = []
            if entry.layout is not None:
                stored = reader.stored(entry.name)
                for field, part in zip(entry.fields, layout(entry.layout).parts, strict=True):
                    blob = Blob(field.codec, stored[field.begin : field.begin + field.length], field.codes)
                    bits = entropy(histogram(decode(blob, part), part.signed))
                    fields.append(
                        FieldEntropy(part.name, field.codec, field.codes, part.bits, bits, float(field.length))
                    )
            yield TensorEntropy(
                path.name, entry.name, entry.dtype, entry.shape, entry.nbytes, float(entry.end - entry.begin),
                entry.layout, tuple(fields),
            )  # fmt: skip


def _plain(path: Path) -> Iterator[TensorEntropy]:
    with open_plain(path) as plain:
        for name in execution_order(plain.tensors):
            placed = plain.tensors[name]
            data = plain.read(name)
            found = fit(data, placed.dtype)
            fields = []
            if found is not None:
                for codes, part in zip(found.split(data), found.parts, strict=True):
                    p = price(histogram(codes, part.signed), part)
                    fields.append(FieldEntropy(part.name, p.codec, codes.size, part.bits, p.entropy, p.nbytes))
            stored = sum(field.nbytes for field in fields) if fields else float(placed.nbytes)
            yield TensorEntropy(
                path.name, name, placed.dtype, placed.shape, placed.nbytes, stored, found.name if found else None,
                tuple(fields),
            )  # fmt: skip
