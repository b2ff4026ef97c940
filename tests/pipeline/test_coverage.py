"""Coverage: every matrix is quantized, kept with a reason, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sinks import recipe
from tiny import family_model
from torch import nn

from lowbit.errors import CoverageError, FormatError, RecipeError
from lowbit.models.source import of_directory, of_model
from lowbit.pipeline.coverage import audit
from lowbit.pipeline.recipe import Override, parse


def test_fused_parameters_of_an_unknown_kind_are_refused_by_name(tokens: torch.Tensor) -> None:
    model = family_model("mixtral")
    source = of_model(model)
    block = source.skeleton.get_submodule(source.blocks[1])
    block.mlp.mixing = nn.Parameter(torch.empty(4, 8, 8, device="meta"))
    with pytest.raises(CoverageError, match=r"model\.layers\.1\.mlp\.mixing.*\(4, 8, 8\)"):
        audit(source, parse("rtn:int8-row"))


def test_experts_with_transposed_weights_are_refused_not_guessed() -> None:
    model = family_model("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    with pytest.raises(CoverageError, match=r"experts\.gate_up_proj"):
        audit(of_model(model), parse("rtn:int8-row"))


def test_a_linear_router_is_kept_unless_a_recipe_names_it() -> None:
    source = of_model(family_model("mixtral"))
    for block in source.blocks:
        source.skeleton.get_submodule(block).mlp.gate = nn.Linear(64, 4, bias=False, device="meta")
    plain = audit(source, parse("rtn:int8-row"))
    assert not any(name.endswith("mlp.gate") for name in plain.treated)
    assert {k.name for k in plain.kept if "router" in k.why} == {f"{b}.mlp.gate" for b in source.blocks}
    everything = audit(source, recipe("rtn:int8-row", Override(sites="*", format="int4-g32")))
    assert everything.treated.keys() == plain.treated.keys()
    named = audit(source, recipe("rtn:int8-row", Override(sites="*.mlp.gate", format="int8-tensor")))
    assert named.treated["model.layers.1.mlp.gate"][1].format.name == "int8-tensor"


def test_the_head_is_kept_with_a_reason_or_refused(llama: Path) -> None:
    source = of_directory(llama)
    assert [site.name for site in source.head_sites()] == ["lm_head"]
    reasons = {
        k.name: k.why for k in audit(source, recipe("rtn:int8-row", Override(sites="lm_head", keep="tiny"))).kept
    }
    assert reasons["lm_head.weight"] == "tiny"
    assert reasons["model.embed_tokens.weight"] == "embedding or head: 16 bit"
    for pattern in ("lm_head", "lm_*"):
        with pytest.raises(RecipeError, match="head cannot be quantized"):
            audit(source, recipe("rtn:int8-row", Override(sites=pattern, format="int8-row")))
    assert of_directory(llama.parent / "mistral").head_sites() == []  # tied: the head is the embedding


def test_sizes_and_shares_come_from_shapes(llama: Path) -> None:
    coverage = audit(of_directory(llama), recipe("rtn:int8-row", Override(sites="*.down_proj", keep="sensitive")))
    block = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 2
    assert coverage.quantized == 2 * block
    total = 2 * (block + 64 * 96) + 2 * 288 * 64 + 5 * 64
    assert coverage.parameters == total
    assert coverage.share == pytest.approx(2 * block / total)


def test_a_recipe_that_keeps_everything_is_an_error(llama: Path) -> None:
    with pytest.raises(CoverageError, match="quantizes nothing"):
        audit(of_directory(llama), recipe("rtn:int8-row", Override(sites="*", keep="just looking")))


def test_a_shape_that_a_format_cannot_take_is_named(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    source = of_directory(llama)
    empty = nn.Linear(1, 64, bias=False, device="meta")
    empty.weight = nn.Parameter(torch.empty(64, 0, device="meta"))
    source.skeleton.get_submodule(source.blocks[1]).mlp.extra = empty
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.extra: .*\(64, 0\)"):
        audit(source, parse("rtn:int4-g32"))
