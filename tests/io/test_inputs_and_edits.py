"""Checkpoints that hold more than codes: rounded inputs, a KV format, edited and added parameters."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_native_reading import BLOCK, Q, in_config, in_shard
from tiny import family_model
from torch import nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.errors import CheckpointError
from lowbit.formats.activation import activation
from lowbit.formats.heads import CacheFormat
from lowbit.io.native import Writer, qtensors, settings, verify
from lowbit.models.graph import set_matrix
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import Override, Recipe, parse
from lowbit.pipeline.walk import Finished, walk
from lowbit.runtime.facade import cache_format
from lowbit.runtime.linear import QLinear

LINE = "rtn:int8-row-sym+a:int8-tensor-static+kv:int4-head:int8-head,sink=4"
DYNAMIC = "*.down_proj"  # sites whose inputs take their ranges from themselves, as the override says


def recipe() -> Recipe:
    return parse(LINE).model_copy(update={"override": [Override(sites=DYNAMIC, activations="int4-token")]})


@pytest.fixture(scope="session")
def rounded(llama: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with static and dynamic input formats and a KV format; read only."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    source = of_directory(llama)
    with Writer(out, source, recipe(), "the tokens") as sink:
        walk(source, recipe(), tokens, sink)
        assert sink.finish({}) == out
    return out


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits  # type: ignore[no-any-return]


def test_input_formats_and_their_ranges_make_a_round_trip(rounded: Path, tokens: torch.Tensor) -> None:
    held = settings(rounded)
    assert held.kv == CacheFormat("int4-head", "int8-head", sink=4)
    assert held.inputs.keys() == held.specs.keys()
    assert {fmt.name for site, fmt in held.inputs.items() if site.endswith("down_proj")} == {"int4-token"}
    model = lowbit.load(rounded, dtype=torch.float32)
    assert cache_format(model) == held.kv
    seen: dict[str, tuple[float, float]] = {}

    def watch(site: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[site] = float(inputs[0].min()), float(inputs[0].max())

        return hook

    dense = family_model("llama")  # ranges of the first linears, whose inputs no rounding has reached
    for leaf in ("q_proj", "k_proj", "v_proj"):
        site = f"model.layers.0.self_attn.{leaf}"
        dense.get_submodule(site).register_forward_pre_hook(watch(site))
    logits(dense, tokens)
    for site, (low, high) in seen.items():
        rounding = model.get_submodule(site).input
        assert (float(rounding.low), float(rounding.high)) == pytest.approx((low, high))
        assert rounding.format == activation("int8-tensor-static")


def test_a_checkpoint_computes_what_quantizing_in_memory_does(
    rounded: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    text = tmp_path / "recipe.toml"
    text.write_text(
        '[[step]]\nmethod = "rtn"\nformat = "int8-row-sym"\n[activations]\nformat = "int8-tensor-static"\n'
        f'[[override]]\nsites = "{DYNAMIC}"\nactivations = "int4-token"\n'
        '[kv]\nkey = "int4-head"\nvalue = "int8-head"\nsink = 4\n'
    )
    model = lowbit.quantize(family_model("llama"), str(text), tokens=tokens)
    loaded = lowbit.load(rounded, dtype=torch.float32)
    assert torch.equal(logits(model, tokens), logits(loaded, tokens))
    assert cache_format(model) == cache_format(loaded)
    for module in loaded.modules():
        if isinstance(module, QLinear):
            module.input = None
    assert not torch.allclose(logits(model, tokens), logits(loaded, tokens), atol=1e-2)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert cache_format(again) == cache_format(model)
    state = load_file(tmp_path / "saved" / "model.safetensors")
    del state[f"{Q}.input.low"]
    save_file(state, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{Q}\.input\.low' is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


# --- edited and added parameters -------------------------------------------------------------------------------------

KEPT = "model.layers.1.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"


def edits(block: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """Values that 16 bits do not hold: of a norm, of a kept linear, of biases that LLaMA does not have."""
    if block != "model.layers.1":
        return {}
    generator = torch.Generator().manual_seed(0)
    q_bias, up_bias = (torch.randn(n, generator=generator) / 3 for n in (64, 96))
    return {
        NORM: torch.rand(64, generator=generator) + 0.5,
        f"{KEPT}.weight": torch.randn(96, 64, generator=generator) / 7,
        f"{Q}.bias": q_bias,
        f"{KEPT}.bias": up_bias,
    }


class Editing:
    """A sink that passes blocks on with edits, as a walk with transforms would."""

    def __init__(self, sink: Writer) -> None:
        self.sink = sink
        self.finished: dict[str, Finished] = {}

    def has(self, block: str) -> bool:
        return self.sink.has(block)

    def read(self, block: str) -> Finished:
        return self.sink.read(block)

    def write(self, block: str, module: nn.Module, done: Finished) -> None:
        self.finished[block] = dataclasses.replace(done, edited=edits(block, module))
        self.sink.write(block, module, self.finished[block])


@pytest.fixture(scope="session")
def edited(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with edited and added parameters; read only."""
    out, source = tmp_path_factory.mktemp("edited") / "out", of_directory(llama)
    keep = parse("rtn:int8-row+a:int8-token").model_copy(update={"override": [Override(sites=KEPT, keep="as it is")]})
    with Writer(out, source, keep, None) as sink:
        editing = Editing(sink)
        walk(source, keep, None, editing)
        for block, done in editing.finished.items():
            held = sink.read(block)
            assert held.codes.keys() == done.codes.keys()
            assert {site: i.format for site, i in held.inputs.items()} == {s: i.format for s, i in done.inputs.items()}
            for name, value in done.edited.items():
                same = value if value.ndim == 1 else value.half().float()
                assert torch.equal(held.edited[name], same)
        sink.finish({})
    return out


def test_edited_and_added_parameters_are_used(edited: Path, llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    assert settings(edited).added == (f"{KEPT}.bias", f"{Q}.bias")
    with safe_open(edited / BLOCK, framework="pt") as shard:
        kinds = {name: shard.get_tensor(name).dtype for name in edits("model.layers.1", nn.Module())}
    assert kinds == {
        NORM: torch.float32, f"{KEPT}.weight": torch.float16, f"{Q}.bias": torch.float32,
        f"{KEPT}.bias": torch.float32,
    }  # fmt: skip
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for site, q in qtensors(edited):
        set_matrix(expected.get_submodule(site), q.decode())
    for name, value in edits("model.layers.1", nn.Module()).items():
        owner, _, leaf = name.rpartition(".")
        stored = value.half().float() if value.ndim == 2 else value
        expected.get_submodule(owner).register_parameter(leaf, nn.Parameter(stored))
    model = lowbit.load(edited, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, QLinear):
            module.input = None
    torch.testing.assert_close(logits(model, tokens), logits(expected, tokens), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    state = {name: value for name, value in again.state_dict().items() if name in edits("model.layers.1", nn.Module())}
    assert len(state) == 4
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    held = load_file(tmp_path / "saved" / "model.safetensors")
    del held[f"{KEPT}.bias"]
    save_file(held, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{KEPT}\.bias' is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


# --- versions and damage ---------------------------------------------------------------------------------------------


def test_a_checkpoint_of_version_1_is_read(finished: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    """It has weights only, and none of the newer fields."""
    old = Path(shutil.copytree(finished, tmp_path / "old"))

    def to_version_1(held: dict[str, Any]) -> None:
        held["version"] = 1
        for field in ("inputs", "edited", "activations", "added", "kv"):
            held.pop(field, None)

    for name in (BLOCK, BLOCK.replace("1", "0"), "lowbit-rest.safetensors"):
        in_shard(lambda _, held: to_version_1(held), name)(old)
    in_config(to_version_1)(old)
    manifest = json.loads((old / "lowbit.json").read_text())
    (old / "lowbit.json").write_text(json.dumps({**manifest, "version": 1}))
    assert verify(old)["version"] == 1
    now, then = (lowbit.load(root, dtype=torch.float32) for root in (finished, old))
    assert torch.equal(logits(now, tokens), logits(then, tokens))


def rename(table: dict[str, Any], old: str, new: str) -> None:
    table[new] = table.pop(old)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (in_shard(lambda t, held: held["inputs"].update({Q: "int8-row"})), "metadata.lowbit is malformed.*int8-row"),
        (in_shard(lambda t, held: rename(held["inputs"], Q, "model.x")), "malformed.*model.x.*has no codes"),
        (in_shard(lambda t, held: t.pop(f"{Q}.input.high")), f"the part '{Q}.input.high' is missing"),
        (in_shard(lambda t, held: t.update({f"{Q}.input.high": torch.ones(2)})), r"input.high is \('float32', \(2,\)"),
        (in_shard(lambda t, held: t.update({f"{Q}.input.low": torch.ones(1).half()})), "input.low is .*float16"),
        (in_shard(lambda t, held: held.update(edited=["model.layers.1.x"])), "the parameter 'model.layers.1.x' is mis"),
        (in_shard(lambda t, held: held.update(edited=3)), "metadata.lowbit is malformed.*no list of names"),
        (in_config(lambda c: c["activations"][0]["sites"].pop()), "quantization_config.activations is not what"),
        (in_config(lambda c: c["activations"][0].update(format="int8-x")), "quantization_config.activations is malf"),
        (in_config(lambda c: c.update(added=["model.norm.bias"])), "quantization_config.added is not what"),
        (in_config(lambda c: c.update(added=[3])), "quantization_config.added is malformed"),
        (in_config(lambda c: c["kv"].update(key="int4")), "quantization_config.kv is malformed.*int4"),
        (in_config(lambda c: c["kv"].update(sink="4")), "quantization_config.kv is malformed"),
        (in_config(lambda c: c["kv"].update(more=1)), "quantization_config.kv is malformed"),
        (in_config(lambda c: c["kv"].pop("window")), "quantization_config.kv is malformed"),
    ],
)
def test_damage_is_named(rounded: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    root = Path(shutil.copytree(rounded, tmp_path / "copy"))
    damage(root)
    with pytest.raises(CheckpointError, match=message):
        verify(root)


@pytest.mark.parametrize("name", ["model.norm.bias", f"{KEPT}.shift", "model.layers.0.self_attn.bias"])
def test_only_biases_of_linears_can_be_added(edited: Path, tmp_path: Path, name: str) -> None:
    model = lowbit.load(edited)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["added"].append(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=name.rpartition(".")[0]):
        AutoModelForCausalLM.from_pretrained(tmp_path)
