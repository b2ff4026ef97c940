"""Tiny models, and what they say of every token according to plain transformers and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VOCAB, family_model

from lowbit.evaluation.protocol import Windows, parse

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {"head_dim": 16, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}),
    "granite": ("granite", {"logits_scaling": 4.0}),
}


def tiny_model(kind: str, seed: int = 0) -> Any:
    name, changes = KINDS[kind]
    return family_model(name, seed, **changes)


def log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float64 log-probabilities of every next token, one window at a time."""
    with torch.inference_mode():
        return torch.cat([torch.log_softmax(model(row[None]).logits.double(), dim=-1) for row in ids])


@pytest.fixture(scope="session")
def windows() -> Windows:
    """Five windows of 40 tokens."""
    ids = torch.randint(0, VOCAB, (200,), generator=torch.Generator().manual_seed(3))
    return parse("windows-40").cut(ids, None, "random", "digest of random")
