"""The walk: every family, stages, lockstep, propagation, spilled hidden states, errors inside."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from sinks import Kept, recipe, same_codes
from tiny import family_model
from torch import nn
from transformers import AutoModelForCausalLM

from lowbit.calibration.stats import Gram, Stats
from lowbit.errors import (
    CalibrationError,
    GramError,
    StorageError,
    WeightError,
)
from lowbit.methods.base import Weight
from lowbit.models.graph import matrix
from lowbit.models.source import of_directory, of_model
from lowbit.models.stream import Stream
from lowbit.pipeline import encode, spill
from lowbit.pipeline.observe import Stage, discover
from lowbit.pipeline.recipe import Override, Recipe, Step, parse, with_calibration
from lowbit.pipeline.spill import Hidden
from lowbit.pipeline.walk import Progress, walk


@pytest.mark.parametrize("line", ["rtn:int8-row", "gptq:int4-g32,damp=0.1,clip=0"])
def test_every_linear_of_every_family_becomes_codes(family: Path, tokens: torch.Tensor, line: str) -> None:
    source, sink, seen = of_directory(family), Kept(), []
    coverage = walk(source, parse(line), tokens, sink, on_progress=seen.append)
    sites = {site.name: site for block in source.blocks for site in source.sites(block)}
    assert sink.codes.keys() == sites.keys() == coverage.treated.keys()
    assert all(sink.codes[name].shape == site.shape for name, site in sites.items())
    assert all(report.weight_error < (1e-4 if "int8" in line else 0.05) for report in sink.reports)
    assert [p.done for p in seen] == list(range(1, len(sites) + 1))
    assert isinstance(seen[0], Progress)
    assert {(k.name, k.why) for k in coverage.kept if ".layers." in k.name} == (
        {(f"model.layers.{i}.mlp.gate.weight", "router: 16 bit unless a recipe names it") for i in range(2)}
        if "mixtral" in str(family)
        else set()
    )


def test_stages_follow_execution_and_share_inputs(llama: Path, tokens: torch.Tensor) -> None:
    source = of_directory(llama)
    stream = Stream(source, torch.float32)
    hidden = Hidden.embed(stream, tokens, 4)
    name = source.blocks[0]
    stages = discover(stream, 0, stream.load(0), hidden, [site.name for site in source.sites(name)])
    leaves = [[[site.rpartition(".")[2] for site in shared] for shared in stage.inputs] for stage in stages]
    assert leaves == [[["q_proj", "k_proj", "v_proj"]], [["o_proj"]], [["gate_proj", "up_proj"]], [["down_proj"]]]
    assert isinstance(stages[0], Stage)


def test_one_gram_matrix_is_factorised_once_for_q_k_and_v(
    llama: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, plain = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: count.append(1) or plain(*a, **k))
    walk(of_directory(llama), parse("gptq:int4-g32,clip=0"), tokens, Kept())
    assert len(count) == 2 * 4  # blocks * inputs, not * 7 linears


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2"])
def test_lockstep_gives_the_bits_of_a_pass_a_stage(
    families: dict[str, Path], name: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, chosen = of_directory(families[name]), recipe("gptq:int3-g32", batch=4)
    in_step, again = Kept(), Kept()
    used = []
    plain = encode.BlockWork._lockstep
    monkeypatch.setattr(encode.BlockWork, "_lockstep", lambda self, *a: used.append(1) or plain(self, *a))
    walk(source, chosen, tokens, in_step)
    assert len(used) == 2
    monkeypatch.setattr(encode.BlockWork, "_fits", lambda self: False)
    walk(source, chosen, tokens, again)
    assert len(used) == 2
    assert same_codes(in_step.codes, again.codes)


def test_true_sequential_sees_quantized_inputs(llama: Path, tokens: torch.Tensor) -> None:
    """The Gram matrix of o_proj is that of a plain model whose q, k and v hold their low-bit values."""
    source, sink = of_directory(llama), Kept()
    walk(source, recipe("gptq:int2-g32,clip=0", batch=2), tokens, sink)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    name = f"{source.blocks[0]}.self_attn.o_proj"
    for leaf in ("q_proj", "k_proj", "v_proj"):
        linear = model.get_submodule(name.replace("o_proj", leaf))
        linear.weight.data = sink.codes[name.replace("o_proj", leaf)].decode()
    assert torch.equal(_by_hand(model, [name], tokens, "gptq:int2-g32,clip=0")[name], sink.codes[name].decode())


@pytest.mark.parametrize("sequential", [True, False])
def test_propagating_the_original_uses_the_original_activations(
    llama: Path, tokens: torch.Tensor, sequential: bool
) -> None:
    line = f"gptq:int2-g32,clip=0,true_sequential={str(sequential).lower()}"
    source, sink = of_directory(llama), Kept()
    walk(source, recipe(line, propagate="original", batch=2), tokens, sink)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    expected = _by_hand(model, list(sink.codes), tokens, line)
    agree = [float((expected[site] == q.decode()).float().mean()) for site, q in sink.codes.items()]
    assert min(agree) > 0.995  # a code on the edge between two may fall either way
    resumed = Kept({source.blocks[0]: sink.blocks[source.blocks[0]]})
    walk(source, recipe(line, propagate="original", batch=2), tokens, resumed)
    assert same_codes(resumed.codes, sink.codes)


def _by_hand(model: nn.Module, sites: list[str], tokens: torch.Tensor, line: str) -> dict[str, torch.Tensor]:
    """Each linear encoded from its inputs in a plain forward pass, two windows at a time."""
    treatment = parse(line).treatment("")
    assert not isinstance(treatment, str)
    grams: dict[str, Gram] = {}
    handles = []
    for site in sites:
        linear = model.get_submodule(site)
        grams[site] = Gram(matrix(linear).shape[1])
        see = lambda _m, x, gram=grams[site]: gram.update(x[0].reshape(-1, x[0].shape[-1]))  # noqa: E731
        handles.append(linear.register_forward_pre_hook(see))
    with torch.inference_mode():
        for pair in tokens.split(2):
            model(pair)
    for handle in handles:
        handle.remove()
    encode, fmt = treatment.encoder, treatment.format
    return {
        site: encode(
            Weight(site, matrix(model.get_submodule(site)).detach()), Stats(site, {Gram: grams[site]}), fmt
        ).decode()
        for site in sites
    }


def test_resuming_after_any_block_gives_the_same_codes(families: dict[str, Path], tokens: torch.Tensor) -> None:
    for name in ("llama", "mixtral"):
        source, chosen, whole = of_directory(families[name]), recipe("gptq:int3-g32,damp=0.1", batch=4), Kept()
        walk(source, chosen, tokens, whole)
        resumed = Kept({source.blocks[0]: whole.blocks[source.blocks[0]]})
        walk(source, chosen, tokens, resumed)
        assert same_codes(resumed.codes, whole.codes)


@pytest.mark.parametrize("lockstep", [True, False])
def test_threads_are_gone_after_success_and_after_an_error(
    llama: Path, tokens: torch.Tensor, lockstep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not lockstep:
        monkeypatch.setattr(encode.BlockWork, "_fits", lambda self: False)
    before = threading.active_count()
    walk(of_directory(llama), recipe("gptq:int4-g32", batch=2), tokens, Kept())
    assert threading.active_count() == before
    with pytest.raises(GramError, match=r"layers\.0\.self_attn\.q_proj.*not\s+positive definite"):
        walk(of_directory(llama), recipe("gptq:int4-g32,damp=0.0", batch=1), tokens[:1], Kept())
    assert threading.active_count() == before


def test_an_error_in_the_middle_of_a_block_frees_its_threads(
    llama: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain = threading.active_count(), encode.replace_by_codes

    def fail(recipe: Any, block: Any, name: str, site: str, decoded: Any) -> None:
        if site.endswith("up_proj"):
            raise GramError("not today", where=site)
        plain(recipe, block, name, site, decoded)

    monkeypatch.setattr(encode, "replace_by_codes", fail)
    with pytest.raises(GramError, match="up_proj: not today"):
        walk(of_directory(llama), recipe("gptq:int4-g32", batch=2), tokens, Kept())
    assert threading.active_count() == before


def test_hidden_states_beyond_the_limit_live_in_a_file(
    llama: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, chosen = of_directory(llama), recipe("gptq:int3-g32", batch=4)
    in_memory, spilled = Kept(), Kept()
    walk(source, chosen, tokens, in_memory)
    made, plain = [], spill._room
    monkeypatch.setattr(spill, "LIMIT", 1024)
    monkeypatch.setattr(spill, "_room", lambda size: made.append(size) or plain(size))
    walk(source, chosen, tokens, spilled)
    assert made == [Hidden.nbytes(6, 32, 64, torch.float32)]
    assert same_codes(in_memory.codes, spilled.codes)


def test_no_room_for_hidden_states_is_one_error(
    llama: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "LIMIT", 1024)
    monkeypatch.setattr(spill.os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left on device"):
        walk(of_directory(llama), parse("gptq:int4-g32"), tokens, Kept())


def test_an_expert_that_no_token_reaches_is_named(tokens: torch.Tensor) -> None:
    model = family_model("mixtral")
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        model.model.embed_tokens.weight.abs_()
        gate.weight.abs_()
        gate.weight[3] = -gate.weight[3]  # expert 3 is last for every token with positive hidden states
        model.model.layers[0].post_attention_layernorm.weight.fill_(1.0)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    sink = Kept()
    walk(of_model(model), parse("gptq:int4-g32,damp=0.1"), tokens, sink)
    noted = {r.site.removeprefix("model.layers.0.mlp."): r.note for r in sink.reports if r.note}
    unseen = "no calibration token reached it: rounded to nearest"
    assert noted == {"experts.3.gate_up_proj": unseen, "experts.3.down_proj": unseen}
    # static ranges have nothing to fall back on
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.experts\.3\.gate_up_proj: no calibration token"):
        walk(of_model(model), parse("gptq:int4-g32,damp=0.1+a:int8-tensor-static"), tokens, Kept())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad: float, tokens: torch.Tensor) -> None:
    model = family_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 6144 values"):
        walk(of_model(model), parse("rtn:int8-row"), None, Kept())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, "needs calibration text"),
        (torch.zeros(0, 32, dtype=torch.int64), "needs calibration text"),
        (torch.full((2, 32), 288), "ids from 288 to 288, the model knows 0 to 287"),
        (torch.full((2, 32), -1), "ids from -1"),
        (torch.zeros(1, 129, dtype=torch.int64), "windows of 129 tokens, the model reads at most 128"),
    ],
)
def test_tokens_that_the_model_cannot_read(llama: Path, tokens: torch.Tensor | None, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        walk(of_directory(llama), parse("gptq:int4-g32"), tokens, Kept())


def test_methods_without_statistics_compute_no_activation(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "run", lambda *_: pytest.fail("a forward pass"))
    walk(of_directory(llama), with_calibration(parse("rtn:int4-g32"), seed=1), None, Kept())


def test_an_override_is_applied_to_its_sites_only(llama: Path, tokens: torch.Tensor) -> None:
    sink = Kept()
    chosen = Recipe(
        step=[Step(method="gptq", format="int4-g32", options={"damp": 0.1})],
        override=[Override(sites="*.layers.0.*.o_proj", keep="fragile"), Override(sites="*.o_proj", format="int8-row")],
    )
    coverage = walk(of_directory(llama), chosen, tokens, sink)
    by_site = {r.site: (r.method, r.format) for r in sink.reports}
    assert "model.layers.0.self_attn.o_proj" not in by_site
    assert by_site["model.layers.1.self_attn.o_proj"] == ("gptq", "int8-row")
    assert {v for k, v in by_site.items() if not k.endswith("o_proj")} == {("gptq", "int4-g32")}
    assert [(k.name, k.why) for k in coverage.kept if "o_proj" in k.name] == [
        ("model.layers.0.self_attn.o_proj", "fragile")
    ]
