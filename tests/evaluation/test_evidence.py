"""Evidence on disk is the evidence, bit for bit; what is no evidence, or no fair comparison, is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import EvidenceError
from lowbit.evaluation.evidence import (
    REFERENCE,
    TOKENS,
    Provenance,
    Reference,
    read_reference,
    read_tokens,
    write_reference,
    write_tokens,
)  # fmt: skip
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.protocol import Windows
from lowbit.evaluation.scorer import Scorer
from tests.evaluation.conftest import KINDS, tiny_model


@pytest.fixture(scope="module")
def reference(windows: Windows) -> Reference:
    return Scorer(tiny_model("llama"), "w").reference(windows)


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16", "biased"])
def test_a_reference_makes_the_round_trip_bit_for_bit(kind: str, windows: Windows, tmp_path: Path) -> None:
    model = tiny_model(kind if kind in KINDS else "llama")
    scorer = Scorer(model.bfloat16() if kind == "bfloat16" else model, "w")
    written = scorer.reference(windows)
    if kind == "biased":
        written = replace(written, head=replace(written.head, bias=torch.randn(len(written.head.weight))))
    write_reference(tmp_path, written)
    read = read_reference(tmp_path)
    for name in ("hidden", "log_normalizer"):
        a, b = getattr(written, name), getattr(read, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.equal(read.head.weight, written.head.weight)
    assert (read.head.bias is None) == (written.head.bias is None)
    assert (read.head.cap, read.head.scale) == (written.head.cap, written.head.scale)
    assert read.provenance == written.provenance
    for name, column in written.tokens.columns().items():
        np.testing.assert_array_equal(read.tokens.columns()[name], column)
    if kind != "biased":
        assert scorer.score(windows, read)[0].identical  # KL 0 against what was on disk


def test_tokens_make_the_round_trip(reference: Reference, tmp_path: Path) -> None:
    write_tokens(tmp_path, reference.tokens, reference.provenance)
    tokens, provenance = read_tokens(tmp_path)
    assert provenance == reference.provenance
    for name, column in reference.tokens.columns().items():
        assert tokens.columns()[name].dtype == column.dtype
        np.testing.assert_array_equal(tokens.columns()[name], column)


def test_a_schema_says_whether_the_candidates_margin_is_there(reference: Reference, tmp_path: Path) -> None:
    def rewritten(schema: bytes | None, *without: str) -> Tokens:
        write_tokens(tmp_path, reference.tokens, reference.provenance)
        table = pq.read_table(tmp_path / TOKENS)
        metadata = {k: v for k, v in table.schema.metadata.items() if k != b"lowbit.schema"}
        metadata |= {} if schema is None else {b"lowbit.schema": schema}
        pq.write_table(table.drop_columns(list(without)).replace_schema_metadata(metadata), tmp_path / TOKENS)
        return read_tokens(tmp_path)[0]

    old = rewritten(None, "margin")  # as it was written before there was a schema
    assert old.margin is None
    np.testing.assert_array_equal(old.kl, reference.tokens.kl)
    write_tokens(tmp_path, old, reference.provenance)
    assert read_tokens(tmp_path)[0].margin is None
    with pytest.raises(EvidenceError, match="schema 3, and this version reads up to 2"):
        rewritten(b"3")
    for schema, without in ((b"2", ["margin"]), (None, []), (b"two", []), (b"2", ["kl"])):
        with pytest.raises(EvidenceError):
            rewritten(schema, *without)


@pytest.mark.parametrize("field", [f.name for f in fields(Provenance)])
def test_only_evidence_of_the_same_tokens_and_reference_compares(field: str, reference: Reference) -> None:
    mine = reference.provenance
    other = replace(mine, **{field: "another"})
    if field in ("candidate", "text", "dtype"):  # what may differ: who was scored, and names
        mine.require_comparable(other)
    else:
        with pytest.raises(EvidenceError, match=field):
            mine.require_comparable(other)


def test_files_that_are_no_evidence_are_named(reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=TOKENS):
        read_reference(tmp_path)
    write_tokens(tmp_path, reference.tokens, reference.provenance)
    with pytest.raises(EvidenceError, match=REFERENCE):
        read_reference(tmp_path)
    write_reference(tmp_path, reference)
    whole = (tmp_path / REFERENCE).read_bytes()
    (tmp_path / REFERENCE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EvidenceError, match=REFERENCE):
        read_reference(tmp_path)
    (tmp_path / TOKENS).write_bytes(b"PAR1 is not enough")
    with pytest.raises(EvidenceError, match=TOKENS):
        read_tokens(tmp_path)


def test_hidden_states_of_other_tokens_are_refused(reference: Reference, tmp_path: Path) -> None:
    write_reference(tmp_path, reference)
    held = load_file(tmp_path / REFERENCE)
    held["hidden"] = held["hidden"][1:].clone()
    save_file(held, tmp_path / REFERENCE, metadata={"head": '{"cap":null,"scale":1.0}'})
    with pytest.raises(EvidenceError, match="194 hidden states for 195 tokens"):
        read_reference(tmp_path)
