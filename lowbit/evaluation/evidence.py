"""Evidence on disk: what happened at every scored token, and the reference's hidden states for exact KL.

tokens.parquet         the columns of Tokens, zstd, with the identities of both models and of the text, and the schema:
                       2 holds the candidate's margin, 1 (files that name none) does not
reference.safetensors  the reference's final hidden states at every scored position, and its head
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lowbit import digest
from lowbit.arrays import Float, Tensor
from lowbit.errors import EvidenceError
from lowbit.evaluation.head import Head
from lowbit.evaluation.metrics.base import Tokens

TOKENS, REFERENCE = "tokens.parquet", "reference.safetensors"
SCHEMA = 2
_METADATA, _SCHEMA = b"lowbit", b"lowbit.schema"


@dataclass(frozen=True)
class Provenance:
    """Where evidence comes from: identities are digests, never names; the names are for people."""

    candidate: str
    reference: str
    windows: str
    protocol: str
    text: str
    text_digest: str
    dtype: str

    def require_comparable(self, other: Provenance) -> None:
        """Raises EvidenceError unless both scored the same tokens, by one protocol, against one reference."""
        for field in ("reference", "windows", "protocol", "text_digest"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise EvidenceError(
                    f"{field} differs: {mine} and {theirs}", why="numbers across protocols or texts do not compare",
                    fix="score both with one text, one protocol and one reference",
                )  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """The hidden-state evidence of a reference: exact KL needs no logits on disk."""

    hidden: Float[Tensor, "tokens d"]
    head: Head
    log_normalizer: Float[Tensor, "tokens"]
    tokens: Tokens
    provenance: Provenance


def write_tokens(folder: Path, tokens: Tokens, provenance: Provenance) -> None:
    table = pa.table(dict(tokens.columns()))
    schema = 1 if tokens.margin is None else SCHEMA
    metadata = {_METADATA: json.dumps(asdict(provenance)).encode(), _SCHEMA: str(schema).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), folder / TOKENS, compression="zstd")


def read_tokens(folder: Path) -> tuple[Tokens, Provenance]:
    """Raises EvidenceError for a file that is not such evidence, or of a schema that is not known."""
    try:
        table = pq.read_table(folder / TOKENS)
        metadata = table.schema.metadata or {}
        provenance, schema = Provenance(**json.loads(metadata[_METADATA])), int(metadata.get(_SCHEMA, b"1"))
        columns = {name: table[name].to_numpy() for name in table.column_names}
        if not 1 <= schema <= SCHEMA:
            raise EvidenceError(
                f"schema {schema}, and this version reads up to {SCHEMA}", where=str(folder / TOKENS),
                fix="the version of lowbit that wrote it, or score again",
            )  # fmt: skip
        if (schema >= 2) != ("margin" in columns):
            raise KeyError(f"schema {schema} {'with' if 'margin' in columns else 'without'} a margin")
        return Tokens.of(columns), provenance
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise EvidenceError(f"is no token evidence: {error}", where=str(folder / TOKENS)) from error


def write_reference(folder: Path, reference: Reference) -> None:
    tensors = {"hidden": reference.hidden, "log_normalizer": reference.log_normalizer, "head": reference.head.weight}
    if reference.head.bias is not None:
        tensors["bias"] = reference.head.bias
    about = digest.canonical({"cap": reference.head.cap, "scale": reference.head.scale})
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / REFERENCE, metadata={"head": about})  # one entry: several are written in no order
    write_tokens(folder, reference.tokens, reference.provenance)


def read_reference(folder: Path) -> Reference:
    """Raises EvidenceError for files that are not such evidence."""
    tokens, provenance = read_tokens(folder)
    try:
        with safe_open(folder / REFERENCE, framework="pt") as file:
            tensors: Mapping[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            held = json.loads((file.metadata() or {})["head"])
        cap, scale = held["cap"], held["scale"]
        head = Head(tensors["head"], tensors.get("bias"), None if cap is None else float(cap), float(scale))
        if not len(tokens) == len(tensors["hidden"]) == len(tensors["log_normalizer"]):
            raise ValueError(f"{len(tensors['hidden'])} hidden states for {len(tokens)} tokens")
        return Reference(tensors["hidden"], head, tensors["log_normalizer"], tokens, provenance)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise EvidenceError(f"is no reference evidence: {error}", where=str(folder / REFERENCE)) from error


def empty_columns(n: int) -> dict[str, Tensor]:
    """Columns of ``Tokens`` to be filled."""
    integers = ("doc", "chunk", "pos", "token", "top1", "top1_ref")
    floats = ("nll", "nll_ref", "kl", "margin_ref", "top1_p", "entropy_ref", "margin")
    return {c: torch.zeros(n, dtype=torch.int32) for c in integers} | {c: torch.zeros(n) for c in floats}
