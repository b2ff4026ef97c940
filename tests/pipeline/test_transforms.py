"""Transforms change no function before rounding, on any family; and what a walk does with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sinks import Kept
from transformers import AutoModelForCausalLM

from lowbit.methods.base import kind, names
from lowbit.models.graph import set_matrix, split_experts
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import parse
from lowbit.pipeline.walk import walk

LOSSLESS = {"qllm": ",assemble=false,rank=0"}  # merging channels and correcting errors change the function on purpose
TRANSFORMS = [name + LOSSLESS.get(name, "") for name in names() if kind(name) == "transform"]


def _logits(root: Path, sink: Kept, tokens: torch.Tensor) -> torch.Tensor:
    """Of the model with what a walk wrote in place of its own weights."""
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    split_experts(model)
    with torch.no_grad():
        for name, value in sink.edited.items():
            model.get_parameter(name).copy_(value)
        for site, q in sink.codes.items():
            set_matrix(model.get_submodule(site), q.decode())
        return model(tokens).logits


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_transform_changes_a_logit(family: Path, tokens: torch.Tensor, name: str) -> None:
    plain = _logits(family, Kept(), tokens)
    sink = Kept()
    walk(of_directory(family), parse(f"{name}+rtn:int4-g32+a:int8-tensor+until:transforms"), tokens, sink)
    assert float((_logits(family, sink, tokens) - plain).abs().max()) <= 1e-4
    assert sink.edited or sink.codes or name == "clip"
