"""AutoModel reads what ``lowbit compress`` wrote as it reads what was compressed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import family_model
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import CheckpointError
from lowbit.io.compress import coded_files, compress


@pytest.mark.parametrize("recipe", [None, "rtn:int4-g32"])
def test_the_same_model_from_coded_files(recipe: str | None, tmp_path: Path) -> None:
    """Dense and low-bit; tied, so that an embedding that is decoded once serves twice."""
    model = family_model("llama", hidden_size=256, tie_word_embeddings=True).half()
    if recipe is not None:
        model = lowbit.quantize(model, recipe)
    plain, coded = tmp_path / "plain", tmp_path / "coded"
    model.save_pretrained(plain)
    compress(plain, coded)
    (file,) = coded_files(coded)
    expected, found = (AutoModelForCausalLM.from_pretrained(root).state_dict() for root in (plain, coded))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        AutoModelForCausalLM.from_pretrained(coded)
