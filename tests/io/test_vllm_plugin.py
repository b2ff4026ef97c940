"""The vLLM plug-in: which layout a linear goes to; in a tree of modules with vLLM's interface, what it computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FUSED, LinearBase, install
from safetensors.torch import load_file
from whole_runs import quantize

from lowbit.errors import CheckpointError, ExportError, FormatError
from lowbit.formats.activation import activation
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Gathered, QTensor, Raw
from lowbit.io.layout import Settings
from lowbit.io.native import qtensors, settings
from lowbit.io.vllm_plugin import Part, member, register, settings_of, sites_of, target

Checkpoint = dict[str, QTensor]
LAYER = "model.layers.0"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down"))


def encoded(name: str, rows: int = 64, columns: int = 128, seed: int = 0) -> QTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return preset(name).encode(w, preset(name).fit(w))


def reordered(q: QTensor) -> QTensor:
    order = torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(0))
    return Gathered(q.shape, order.view(-1, 1).repeat(1, 2), Raw((q.shape[1], 2), torch.tensor([[1.0, 0.0]])), q)


# --- where linears go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("int4-g128-sym", ("auto_gptq", "gptq_marlin")), ("int8-row-sym", ("auto_gptq", "gptq_marlin")),
        ("int4-g64", ("auto_awq", "awq_marlin")), ("int4-row", ("auto_awq", "awq_marlin")),
        ("int8-g64", ()), ("int3-g64-sym", ()), ("int2-row", ()), ("int4-g16-sym", ()), ("nf4", ()), ("mxfp4", ()),
    ],
)  # fmt: skip
def test_the_layout_of_a_format(name: str, methods: tuple[str, ...]) -> None:
    to = target({OUT: encoded(name).spec()}, Part(128, 64))
    assert to.methods == methods
    assert (to.layout is None) == (not methods) == bool(to.why)


def test_shares_that_the_kernels_do_not_take_are_plain() -> None:
    specs = {OUT: encoded("int4-g128-sym", 128, 256).spec()}
    assert target(specs, Part(128, 64)).layout is not None
    for part in (Part(192, 128), Part(64, 128), Part(256, 32)):
        assert "no multiple" in target(specs, part).why


def test_fused_linears_share_a_layout_or_none() -> None:
    alike = {Q: encoded("int4-g64-sym", 128).spec(), K: encoded("int4-g64-sym").spec()}
    assert target(alike, Part(128, 192)).methods
    assert "different formats" in target({**alike, V: encoded("int8-row-sym").spec()}, Part(128, 256)).why
    assert "reordered" in target({OUT: reordered(encoded("int4-g64-sym")).spec()}, Part(128, 64)).why
    assert target({OUT: reordered(encoded("int4-row-sym")).spec()}, Part(128, 64)).methods  # an order that is none


def test_what_vllm_requires_of_a_configuration_is_in_it() -> None:
    gptq = target({Q: encoded("int4-g64-sym").spec()}, Part(128, 64)).config([Q])
    assert {"bits", "group_size", "sym", "desc_act", "checkpoint_format"} <= gptq.keys()
    assert gptq["modules_in_block_to_quantize"] == [Q]
    assert {"bits", "group_size", "zero_point"} <= target({OUT: encoded("int4-row").spec()}, Part(128, 64)).config(
        [OUT]
    ).keys()


def test_shards_are_members_in_order() -> None:
    assert [member((Q, K, V), shard) for shard in ("q", "k", "v", 2)] == [Q, K, V, V]
    assert member((OUT,), None) == OUT
    for shard in (None, 3, "x", -1):
        with pytest.raises(CheckpointError, match="shard"):
            member((Q, K, V), shard)


def test_sites_behind_a_linear() -> None:
    specs = {site: encoded("int4-row").spec() for site in (Q, K, V, OUT, UP)}
    assert sites_of(f"{LAYER}.self_attn.qkv_proj", FUSED, specs) == (Q, K, V)
    assert sites_of(OUT, FUSED, specs) == (OUT,)
    assert sites_of("lm_head", FUSED, specs) == ()
    with pytest.raises(ExportError, match=r"up_proj is low-bit, .*gate_proj is not"):
        sites_of(f"{LAYER}.mlp.gate_up_proj", FUSED, specs)


def test_what_vllms_linears_cannot_do_is_refused() -> None:
    specs = {OUT: encoded("int4-row").spec()}
    with pytest.raises(ExportError, match=r"o_proj: its inputs(.|\n)*compressed-tensors"):
        settings_of(Settings(specs, {OUT: activation("int8-token")}).to_json())
    with pytest.raises(ExportError, match="is a bias"):
        settings_of(Settings(specs, added=(f"{OUT}.bias",)).to_json())
    with pytest.raises(CheckpointError, match="version"):
        settings_of({"quant_method": "lowbit"})


def test_without_vllm_nothing_is_registered() -> None:
    register()


# --- in vLLM's place -------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    quantization = install(monkeypatch)
    register()
    register()  # every process does, and some do it again
    return quantization


def config_for(vllm: Any, said: Mapping[str, Any]) -> Any:
    config = vllm.get_quantization_config("lowbit").from_config({"quant_method": "lowbit", **said})
    config.packed_modules_mapping = FUSED
    return config


def load(layers: Mapping[str, LinearBase], weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """As the models of vLLM do: rename, look up the parameter, call its loader; then have all weights processed."""
    stacked = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v"),
               "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip
    parameters = {f"{prefix}.{name}": p for prefix, layer in layers.items() for name, p in layer.named_parameters()}
    for name, loaded in weights:
        leaf = next((leaf for leaf in stacked if f".{leaf}." in name), None)
        shard = () if leaf is None else (stacked[leaf][1],)
        if leaf is not None:
            name = name.replace(leaf, stacked[leaf][0])
        if name in parameters:
            parameters[name].weight_loader(parameters[name], loaded, *shard)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


def parts(held: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    return ((f"{site}.weight.{part.path}", part.data) for site, q in held.items() for part in q.parts())


def test_the_interface(vllm: Any) -> None:
    cls = vllm.get_quantization_config("lowbit")
    assert vllm.QUANTIZATION_METHODS.count("lowbit") == 1
    config = config_for(vllm, Settings({OUT: encoded("int4-row").spec()}).to_json())
    assert config.get_name() == "lowbit"
    assert set(config.get_supported_act_dtypes()) == {torch.half, torch.bfloat16}
    assert cls.get_min_capability() == 75
    assert cls.get_config_filenames() == []
    assert cls.override_quantization_method({"quant_method": "lowbit"}, None) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_every_linear_computes_what_the_checkpoint_says(vllm: Any, rank: int, caplog: pytest.LogCaptureFixture) -> None:
    held = {
        Q: encoded("int4-g32-sym", 256, seed=1), K: encoded("int4-g32-sym", 128, seed=2),
        V: encoded("int4-g32-sym", 128, seed=3), OUT: reordered(encoded("int8-row-sym", 128)),
        GATE: encoded("int4-g64", 128, seed=4), UP: encoded("int4-g64", 128, seed=5), DOWN: encoded("nf4", 128),
    }  # fmt: skip
    config = config_for(vllm, Settings({site: q.spec() for site, q in held.items()}).to_json())
    fused = {
        f"{LAYER}.self_attn.qkv_proj": (Q, K, V),
        OUT: (OUT,),
        f"{LAYER}.mlp.gate_up_proj": (GATE, UP),
        DOWN: (DOWN,),
    }
    layers = {
        prefix: LinearBase(128, [held[site].shape[0] for site in sites], config, prefix, rank, 2)
        for prefix, sites in fused.items()
    }
    with caplog.at_level(logging.WARNING):
        load(layers, parts(held))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(9))
    for prefix, sites in fused.items():
        shares = [held[site].decode().chunk(2)[rank] for site in sites]
        torch.testing.assert_close(layers[prefix](x), x @ torch.cat(shares).t(), rtol=1e-5, atol=1e-5)
    methods = [type(layer.quant_method.method).__name__ for layer in layers.values()]
    assert methods == [
        "GPTQMarlinLinearMethod", "GPTQMarlinLinearMethod", "AWQMarlinLinearMethod", "UnquantizedLinearMethod"
    ]  # fmt: skip
    assert [record.getMessage().split()[0] for record in caplog.records] == [DOWN]
    assert not any(layer.quant_method.shards for layer in layers.values())


def test_a_native_checkpoint_is_loaded_by_its_own_names(vllm: Any, llama: Path, tmp_path: Path) -> None:
    finished = tmp_path / "out"
    quantize(llama, finished, None, "rtn:int3-g32")
    held = dict(qtensors(finished))
    config = config_for(vllm, settings(finished).to_json())
    prefixes = {site: [site] for site in held if site.rpartition(".")[2] in ("o_proj", "down_proj")}
    for i in range(2):
        for fused, names in FUSED.items():
            parent = f"model.layers.{i}." + ("self_attn" if fused == "qkv_proj" else "mlp")
            prefixes[f"{parent}.{fused}"] = [f"{parent}.{name}" for name in names]
    layers = {
        prefix: LinearBase(held[sites[0]].shape[1], [held[site].shape[0] for site in sites], config, prefix)
        for prefix, sites in prefixes.items()
    }
    load(layers, (item for shard in sorted(finished.glob("*.safetensors")) for item in load_file(shard).items()))
    for prefix, sites in prefixes.items():
        assert torch.equal(layers[prefix].weight, torch.cat([held[site].decode() for site in sites]))


def test_what_stays_in_16_bit_is_vllms_own(vllm: Any) -> None:
    config = config_for(vllm, Settings({OUT: encoded("int4-row").spec()}).to_json())
    layer = LinearBase(128, [64], config, "lm_head")
    assert type(layer.quant_method).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


def test_low_bit_experts_are_refused(vllm: Any) -> None:
    site = f"{LAYER}.mlp.experts.3.down_proj"
    config = config_for(vllm, Settings({site: encoded("int4-row").spec()}).to_json())
    with pytest.raises(ExportError, match=rf"{site}: is in a Identity(.|\n)*--to gptq"):
        config.get_quant_method(torch.nn.Identity(), f"{LAYER}.mlp.experts")


def test_a_missing_part_is_named(vllm: Any) -> None:
    q = encoded("int4-g64-sym")
    layer = LinearBase(128, [64], config_for(vllm, Settings({OUT: q.spec()}).to_json()), OUT)
    with pytest.raises(FormatError, match=r"part '.*o_proj\.weight\.scale\.data' is missing"):
        load({OUT: layer}, (item for item in parts({OUT: q}) if "scale" not in item[0]))


def test_sites_follow_vllms_names(vllm: Any) -> None:
    class Mapper:
        def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
            return {f"language_model.{name}": value for name, value in values.items()}

    config = config_for(vllm, Settings({OUT: encoded("int4-row").spec()}).to_json())
    config.apply_vllm_mapper(Mapper())
    assert type(LinearBase(128, [64], config, f"language_model.{OUT}").quant_method).__name__ == "LowbitLinear"
