"""Transforms change no function before rounding, on any family; and what a walk does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sinks import Kept, recipe, same_codes
from transformers import AutoModelForCausalLM

from lowbit.calibration import cards
from lowbit.calibration.samples import Range
from lowbit.calibration.stats import Gram, Moments
from lowbit.calibration.text import Tokens
from lowbit.errors import CalibrationError, RecipeError
from lowbit.methods.base import kind, names
from lowbit.models.graph import set_matrix, split_experts
from lowbit.models.source import of_directory
from lowbit.pipeline.encode import BlockWork
from lowbit.pipeline.recipe import parse
from lowbit.pipeline.walk import walk

# merging channels and correcting errors change the function on purpose; a few steps of a search are enough here
OPTIONS = {"qllm": ",assemble=false,rank=0", "awq": ",steps=4", "clip": ",steps=2"}
TRANSFORMS = [name + OPTIONS.get(name, "") for name in names() if kind(name) == "transform"]


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
    assert sink.edited or sink.codes or name.startswith("clip")


@pytest.mark.parametrize("line", ["awq,steps=4+clip,steps=2+gptq:int3-g32,damp=0.1", "rotate+gptq:int3-g32,damp=0.1"])
def test_a_transformed_walk_resumes_with_the_same_codes(llama: Path, tokens: torch.Tensor, line: str) -> None:
    source, whole = of_directory(llama), Kept()
    walk(source, parse(line), tokens, whole)
    resumed = Kept({source.blocks[0]: whole.blocks[source.blocks[0]]})
    walk(source, parse(line), tokens, resumed)
    assert same_codes(resumed.codes, whole.codes)
    assert all(torch.equal(value, resumed.edited[name]) for name, value in whole.edited.items())


def test_a_clip_after_awq_needs_no_pass_of_its_own(
    llama: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, kept, again, passes = of_directory(llama), Kept(), Kept(), []
    observe = BlockWork._observe

    def counted(self: BlockWork, *arguments: Any) -> Any:
        passes.append(self.name)
        return observe(self, *arguments)

    monkeypatch.setattr(BlockWork, "_observe", counted)
    walk(source, parse("awq,steps=4+clip,steps=2+rtn:int4-g32"), tokens, kept)
    fewer = len(passes)
    monkeypatch.setattr(BlockWork, "_follow", lambda *_: False)
    walk(source, parse("awq,steps=4+clip,steps=2+rtn:int4-g32"), tokens, again)
    assert len(passes) - fewer == fewer + len(source.blocks)
    assert same_codes(kept.codes, again.codes)


def test_two_ways_into_a_linear_are_refused(llama: Path, tokens: torch.Tensor) -> None:
    with pytest.raises(RecipeError, match="two steps change how inputs enter"):
        walk(of_directory(llama), parse("rotate+rotate,seed=1+rtn:int4-g32"), tokens, Kept())


@pytest.mark.parametrize("line", ["gptq:int3-g32,damp=0.1", "rtn:int3-g32,weighted=true+a:int8-tensor-static"])
def test_a_card_gives_the_codes_of_original_propagation(
    llama: Path, tokens: torch.Tensor, tmp_path: Path, line: str
) -> None:
    source = of_directory(llama)
    windows = Tokens(tokens, "random", "0" * 64, None)
    card = cards.make(tmp_path / "card", source, windows, kinds={Gram, Moments, Range}, batch=8)
    from_card, from_text = Kept(), Kept()
    walk(source, parse(line), None, from_card, card=card)
    walk(source, recipe(line, propagate="original"), tokens, from_text)
    differ = [float((q.decode() != from_text.codes[s].decode()).float().mean()) for s, q in from_card.codes.items()]
    assert max(differ) < 0.01
    with pytest.raises(RecipeError, match="a card cannot calibrate transforms"):
        walk(source, parse("awq+rtn:int4-g32"), None, Kept(), card=card)
    light = cards.make(tmp_path / "light", source, windows, kinds={Moments})
    with pytest.raises(CalibrationError, match="holds no Gram"):
        walk(source, parse("gptq:int3-g32"), None, Kept(), card=light)
