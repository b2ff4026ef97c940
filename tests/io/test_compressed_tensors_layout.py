"""compressed-tensors, proved with the library itself and with transformers: same codes, same values, both ways."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import family_model
from transformers import AutoModelForCausalLM

from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.activation import Input, activation
from lowbit.formats.blocks import Block
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import Table
from lowbit.formats.heads import CacheFormat
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Affine, Lookup, QTensor
from lowbit.io.interchange.base import Layout, LowBitModel
from lowbit.io.interchange.compressed_tensors import CompressedTensors
from lowbit.models.graph import sites_of
from lowbit.runtime.linear import QLinear

W, X = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"


TILES = Format("fp8-tiles", Table("e4m3"), Block("tile", (4, 32)), Stored(torch.float32))  # as DeepSeek has them


def coded(name: str, w: torch.Tensor) -> Any:
    fmt = TILES if name == TILES.name else preset(name)
    return fmt.encode(w, fmt.fit(w))


def some(name: str, rows: int = 6, columns: int = 64) -> Any:
    return coded(name, torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)))


def input_of(name: str | None) -> Input | None:
    if name is None:
        return None
    fmt = activation(name)
    return Input(fmt, torch.tensor([-1.7]), torch.tensor([2.9])) if fmt.static else Input(fmt)


def layout_of(q: QTensor, input: Input | None = None, kv: CacheFormat | None = None) -> CompressedTensors:
    inputs = {} if input is None else {W: input.format}
    return CompressedTensors.for_model(LowBitModel("LlamaForCausalLM", {W: q.spec()}, ("lm_head",), inputs, kv))


def written(layout: CompressedTensors) -> Any:
    """Its configuration as config.json holds it."""
    return json.loads(json.dumps(layout.config()))


def same(a: QTensor, b: QTensor) -> bool:
    return a.spec() == b.spec() and all(torch.equal(p.data, r.data) for p, r in zip(a.parts(), b.parts(), strict=True))


# --- whole models ----------------------------------------------------------------------------------------------------


def exported(
    root: Path, layout: type[Layout], formats: Callable[[str], str | None], input: str | None = None
) -> tuple[Any, dict[str, QTensor]]:
    """A tiny model's folder in a layout; the model with our own linears over the same QTensors, and these."""
    model, qs = family_model("llama", num_hidden_layers=1), {}
    for site in sites_of(model.model.layers, "model.layers"):
        if (name := formats(site.name)) is not None:
            qs[site.name] = coded(name, model.get_submodule(site.name).weight.data)
    rounding = input_of(input)
    dense = [s.name for s in sites_of(model, "") if s.name not in qs]
    specs, inputs = {s: q.spec() for s, q in qs.items()}, {} if rounding is None else {s: rounding.format for s in qs}
    one = layout.for_model(LowBitModel("LlamaForCausalLM", specs, tuple(dense), inputs))
    state = {name: t for name, t in model.state_dict().items() if name.removesuffix(".weight") not in qs}
    for site, q in qs.items():
        state |= {f"{site}.{suffix}": part.contiguous() for suffix, part in one.pack(site, q, rounding).items()}
    save_file(state, root / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "quantization_config": one.config(), "dtype": "float32"}
    (root / "config.json").write_text(json.dumps(config))
    for site, q in qs.items():
        parent, _, leaf = site.rpartition(".")
        own = QLinear.of(q, input=rounding)
        own.use("reference")  # the reader multiplies floats
        setattr(model.get_submodule(parent), leaf, own)
    return model, qs


MIXED = {"self_attn": "int8-row-sym", "gate_proj": "int4-g32-sym", "up_proj": "int4-g32-sym", "down_proj": None}


def mixed(site: str) -> str | None:
    return next(name for part, name in MIXED.items() if part in site)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "input", "dtype"),
    [
        ("int3-g32-sym", None, "float32"),
        ("int4-g32", None, "float16"),  # dense matrices in the dtype of the scales
        ("mixed", None, "float32"),
        ("int8-row-sym", "int8-tensor-sym-static", "float32"),
        ("int4-g32-sym", "int8-token", "float32"),
        ("fp8-e4m3", "fp8-e4m3-token", "float32"),
        ("mxfp4", None, "bfloat16"),
    ],
)
def test_transformers_computes_what_we_compute(
    name: str, input: str | None, dtype: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    ours, qs = exported(tmp_path, CompressedTensors, mixed if name == "mixed" else lambda _: name, input)
    kind = torch.float32 if dtype == "float16" else getattr(torch, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind)
    with torch.inference_mode():
        expected, found = ours(tokens[:2]).logits, theirs(tokens[:2]).logits  # the first call decompresses
    for site, q in qs.items():
        assert torch.equal(theirs.get_submodule(site).weight.float(), q.decode(getattr(torch, dtype)).float()), site
    if dtype == "float32":
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update({X: "int8-row"}), f"gate_up_proj: {W} is int4 .*, {X} is int8"),
        (
            lambda s: s.update({"model.layers.0.self_attn.k_proj": "int4-g32-sym"}),
            "qkv_proj: .*q_proj is 16 bit, .*k_proj is int4",
        ),
        (
            lambda s: s.update({"m.experts.0.w1": "int4-row", "m.experts.1.w2": "int8-row"}),
            "m.experts: .*0.w1 is int4.*1.w2 is int8",
        ),
        (lambda s: s.update({"m.o_proj": "int4-g48"}), "m.o_proj: 64 columns in groups of 48"),
    ],
)
def test_what_vllm_fuses_has_one_scheme(damage: Callable[[dict[str, str]], None], message: str) -> None:
    sites = {W: "int4-g32", X: "int4-g32", "model.layers.0.self_attn.o_proj": "int8-row"}
    damage(sites)
    dense = ("model.layers.0.self_attn.q_proj",)
    with pytest.raises(ExportError, match=message):
        CompressedTensors.for_model(LowBitModel("M", {site: some(name).spec() for site, name in sites.items()}, dense))


def test_notes_say_what_files_cannot() -> None:
    kv = [CacheFormat("int4-head", "int4-head"), CacheFormat("fp8-e4m3-head", "fp8-e4m3-head"), None]
    assert [bool(layout_of(some("int4-g32-sym"), kv=k).notes()) for k in kv] == [True, True, False]
    assert "int4-head" in layout_of(some("int4-g32-sym"), kv=kv[0]).notes()[0]
    schemes = [written(layout_of(some("int4-g32-sym"), kv=k))["kv_cache_scheme"] for k in kv]
    assert schemes[0] is schemes[2] is None
    assert schemes[1]["num_bits"] == 8


# --- single tensors, against the library's own compressors -----------------------------------------------------------

NAMES: list[tuple[str, str | None]] = [
    *((f"int{b}-{block}{s}", None) for b in range(2, 9) for block in ("tensor", "row", "g32") for s in ("", "-sym")),
    ("int8-row-sym", "int8-token-sym"), ("int8-row", "int8-tensor-static"), ("int4-g32", "int8-g32"),
    ("fp8-e4m3", None), ("fp8-e4m3-g32", None), ("fp8-e4m3-tensor", "fp8-e4m3-tensor-static"),
    (TILES.name, None), ("mxfp4", None), ("mxfp8", None), ("nvfp4", None),
]  # fmt: skip


def theirs(layout: CompressedTensors) -> tuple[Any, Any]:
    """The library's compressor and scheme, from our configuration."""
    ct = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    config = ct.QuantizationConfig.model_validate(written(layout))
    (scheme,) = config.config_groups.values()
    return BaseCompressor.get_value_from_registry(scheme.format), scheme


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "input"), NAMES)
def test_their_decompressor_and_ours_both_ways(name: str, input: str | None) -> None:
    q, rounding = some(name, 7, 96), input_of(input)
    layout = layout_of(q, rounding)
    held = layout.pack(W, q, rounding)
    compressor, scheme = theirs(layout)
    dense = compressor.decompress({n: t for n, t in held.items() if not n.startswith("input")}, scheme)["weight"]
    if name == "nvfp4":  # they multiply by a reciprocal: one unit of bfloat16 where that is a tie
        torch.testing.assert_close(dense, q.decode(torch.bfloat16), rtol=2**-7, atol=0)
    else:
        assert torch.equal(dense, q.decode(dense.dtype))

    read = CompressedTensors.of_config(written(layout))
    again, again_input = read.unpack(W, (7, 96), held)
    assert written(read) == written(layout)
    assert (again_input and again_input.format) == (rounding and rounding.format)
    if name == "nvfp4":
        torch.testing.assert_close(again.decode(), q.decode(), rtol=2**-22, atol=0)
        again = again.map(lambda t: t if t.shape != (1, 1) else q.scale.scale.data)
    assert same(again, q)
    if name.startswith("int") and input is None:  # and what they compress themselves
        zero = q.zero and (q.zero.unpack().view(q.block.count(q.shape)).to(torch.int16) - q.codes.levels // 2)
        state = {"weight": q.decode(), "weight_scale": q.scale.decode()}
        if zero is not None:
            state["weight_zero_point"] = zero.to(torch.int8)
        made = compressor.compress(state, scheme)
        assert same(read.unpack(W, (7, 96), {**made, "weight_scale": q.scale.data})[0], q)


def test_a_measured_range_gives_the_step_and_zero_of_the_file() -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("int8-tensor-static", "int8-tensor-sym-static", "fp8-e4m3-tensor-static"):
        fmt, x = activation(name), torch.randn(4, 64, generator=generator)
        for _ in range(8):
            low, high = (torch.rand(2, 1, generator=generator) * torch.tensor([[-3.0], [4.0]])).unbind()
            q = some("int8-row-sym" if name.startswith("int") else "fp8-e4m3")
            layout = layout_of(q, Input(fmt, low, high))
            held = layout.pack(W, q, Input(fmt, low, high))
            _, again = layout.unpack(W, (6, 64), held)
            assert again is not None
            assert torch.equal(again.round(x), Input(fmt, low, high).round(x))
            assert torch.equal(layout.pack(W, q, again)["input_scale"], held["input_scale"])


def test_a_divisor_that_is_read_is_written_again() -> None:
    q = some("nvfp4")
    layout = layout_of(q)
    for scale in torch.rand(24, generator=torch.Generator().manual_seed(0)) * 1e-3:
        held = layout.pack(W, q.map(lambda t, scale=scale: scale.view(1, 1) if t.shape == (1, 1) else t))
        again, _ = layout.unpack(W, (6, 64), held)
        assert torch.equal(layout.pack(W, again)["weight_global_scale"], held["weight_global_scale"])
        assert isinstance(again, Lookup)
        assert isinstance(again.scale, Lookup)
        assert again.scale.scale is not None
        (found,) = again.scale.scale.decode().view(-1)
        # only scales of a mantissa beyond the square root of two share their reciprocal with a neighbour
        near = [scale] if math.frexp(float(scale))[0] * 2 < math.sqrt(2) else [
            scale, *(scale.nextafter(scale * factor) for factor in (2.0, 0.5))
        ]  # fmt: skip
        assert any(torch.equal(found, one) for one in near)


def test_golden_bytes() -> None:
    w = torch.tensor([[-4.0, -3, -2, -1, 0, 1, 2, 3] * 4]) / 4
    (q,) = [coded("int3-row-sym", w)]
    assert q.codes.unpack()[0, :8].tolist() == [1, 2, 2, 3, 4, 5, 6, 6]
    held = layout_of(q).pack(W, q)
    # codes 1, 2, 2, 3, 4, 5, 6, 6 in three bits each, the first one lowest: 24 bits, four times
    bits = sum(code << (3 * i) for i, code in enumerate([1, 2, 2, 3, 4, 5, 6, 6]))
    assert held["weight_packed"].view(torch.uint8).flatten().tolist() == list(bits.to_bytes(3, "little")) * 4
    assert held["weight_shape"].tolist() == [1, 32]
    zeros = coded("int4-row", torch.tensor([[0.0, 15], [-15, 0], [-5, 10], [-1, 14]]).repeat(1, 16))
    held = layout_of(zeros).pack(W, zeros)
    assert held["weight_zero_point"].tolist() == [[0x15F0]]
    assert held["weight_packed"][:2].flatten().tolist() == [-0x0F0F0F10] * 8  # 0 and 15 take turns
    fp4 = coded("nvfp4", torch.tensor([[0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 6]]))
    held = layout_of(fp4).pack(W, fp4)
    assert bytes(held["weight_packed"][0].tolist()) == bytes.fromhex("10325476a9cbed7f"[:16])


def test_words_of_whole_codes_are_the_older_layout() -> None:
    q = some("int3-g32", 5, 96)
    held = layout_of(q).pack(W, q)
    codes = q.codes.unpack().numpy().astype(np.int64)
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 10))).reshape(5, -1, 10)
    old = (padded << (3 * np.arange(10))).sum(-1).astype(np.int32)
    assert old.shape[1] == 10 != held["weight_packed"].shape[1]
    assert same(layout_of(q).unpack(W, (5, 96), {**held, "weight_packed": torch.from_numpy(old)})[0], q)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "input", "message"),
    [
        ("int4-g32-z16", None, "zeros lie between"), ("nf4", None, "values of nf4"), ("ternary", None, "values of ter"),
        ("int4-g48", None, "shorter last group"), ("fp8-e5m2", None, "values of e5m2"),
        ("fp4-e2m1", None, "values of e2m1"), ("quantile4-g32", None, "stored with the weight"),
        ("int8-row", "fp8-e5m2-token", "fp8-e5m2-token"),
    ],
)  # fmt: skip
def test_what_has_no_scheme_is_refused_with_another(name: str, input: str | None, message: str) -> None:
    spec = some(name).spec()
    refusal = CompressedTensors.refusal(spec, None if input is None else activation(input))
    assert refusal is not None
    assert message in refusal.why
    assert refusal.fix
    assert CompressedTensors.refusal(some("int4-g32").spec()) is None


def test_a_linear_of_another_scheme_than_the_models_is_not_packed() -> None:
    with pytest.raises(ExportError, match="M: has no low-bit linears"):
        CompressedTensors.for_model(LowBitModel("M", {}))
    with pytest.raises(ExportError, match=f"{W}: is not in the scheme"):
        layout_of(some("int4-g32")).pack(W, some("int4-row"))


def put(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def damage(weights: dict[str, Any]) -> None:
        weights.update(changes)

    return damage


def at(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return damage


G = "config_groups", "group_0"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (at(*G, "weights", "num_bits", value=64), "weights.num_bits: is 64"),
        (at(*G, "weights", "num_bits", value=True), "weights.num_bits: is True"),
        (at(*G, "weights", "type", value="float"), "weights: float4 .*pack-quantized"),
        (at(*G, "weights", "group_size", value=0), "weights.group_size: is 0"),
        (at(*G, "weights", "group_size", value=10**30), "weights.group_size"),
        (at(*G, "weights", "strategy", value="spiral"), "weights.strategy: is 'spiral'"),
        (at(*G, "weights", "symmetric", value="yes"), "weights.symmetric"),
        (at(*G, "weights", "actorder", value="group"), "weights.actorder: .*removed"),
        (at(*G, "weights", value=None), "group_0.weights: is None"),
        (at(*G, "format", value="nvfp4-pack-quantised"), "(?s)group_0.format: .*did you mean .nvfp4-pack-quantized"),
        (at(*G, "output_activations", value={}), "group_0.output_activations"),
        (at(*G, "input_activations", value={"strategy": "token", "num_bits": 8}), "input_activations.*token"),
        (at(*G, "input_activations", value={"strategy": "block"}), "input_activations.strategy"),
        (at(*G, "targets", value="Linear"), "targets: is no list"),
        (at(*G, "targets", value=["re:(a*)*b"]), "targets: the pattern .*repeats a group"),
        (at(*G, "targets", value=["re:" + ".*" * 9]), "targets: the pattern .*too often"),
        (at(*G, "targets", value=["re:["]), "targets: the pattern .*malformed"),
        (at("ignore", value=[3]), "ignore: is no list"),
        (at("config_groups", value={}), "config_groups is no table"),
        (at("config_groups", value={"W4A16": ["Linear"]}), "config_groups.W4A16: is no scheme"),
        (at("sparsity_config", value={"format": "dense"}), "sparse"),
    ],
)
def test_damaged_configurations_are_named(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    config = copy.deepcopy(written(layout_of(some("int4-g32"))))
    damage(config)
    with pytest.raises(CheckpointError, match=message):
        CompressedTensors.of_config(config)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("int4-g32", lambda t: t.pop("weight_packed"), "weight_packed: is missing"),
        ("int4-g32", lambda t: t.update(weight_packed=t["weight_packed"].to(torch.int64)), "weight_packed: .*int64"),
        ("int4-g32", lambda t: t.update(weight_packed=t["weight_packed"][:, :-1]), r"weight_packed: .*\(6, 7\)"),
        ("int4-g32", lambda t: t.update(weight_shape=torch.tensor([6, 128])), "weight_shape: is .6, 128."),
        ("int4-g32", lambda t: t["weight_scale"].fill_(torch.nan), "weight_scale: is not finite"),
        ("int4-g32", lambda t: t.update(weight_scale=t["weight_scale"].t()), r"weight_scale: .*\(2, 6\)"),
        ("int4-g32", lambda t: t.update(weight_zero_point=t["weight_zero_point"].t()), "weight_zero_point: is"),
        ("int4-tensor", lambda t: t["weight_zero_point"].fill_(8), "weight_zero_point: leaves the range of 16"),
        ("fp8-e4m3", lambda t: t["weight"].view(torch.uint8).fill_(255), "weight: holds NaN"),
        ("mxfp4", lambda t: t["weight_scale"].fill_(255), "weight_scale: holds NaN"),
        ("nvfp4", lambda t: t["weight_scale"].view(torch.uint8).fill_(127), "weight_scale: holds NaN"),
        ("nvfp4", lambda t: t["weight_global_scale"].fill_(0), "weight_global_scale: is 0.0"),
        (
            "nvfp4",
            lambda t: t.update(weight_packed=t["weight_packed"].view(torch.int8)),
            "weight_packed: is torch.int8",
        ),
    ],
)
def test_damaged_tensors_are_named(name: str, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    q = some(name)
    layout = layout_of(q)
    held = {key: part.clone() for key, part in layout.pack(W, q).items()}
    damage(held)
    with pytest.raises(CheckpointError, match=f"{W}.{message}"):
        layout.unpack(W, (6, 64), held)


def test_a_site_without_a_scheme_is_named() -> None:
    q = some("int4-g32")
    layout = layout_of(q)
    with pytest.raises(CheckpointError, match="lm_head: no config group"):
        layout.unpack("lm_head", (6, 64), layout.pack(W, q))


def test_names_come_before_patterns_before_all() -> None:
    config = written(layout_of(some("int4-g32")))
    one = config["config_groups"]["group_0"]
    eight = copy.deepcopy(one)
    eight["weights"]["num_bits"] = 8
    eight["targets"] = [r"re:.*\.mlp\..*", "a.b"]
    layout = CompressedTensors.of_config(
        {**config, "config_groups": {"first": one, "second": eight}, "ignore": ["a.c"]}
    )
    found = {site: layout._scheme(site) for site in (W, "a.b", "a.c", "a.d")}
    assert {site: s and s.bits for site, s in found.items()} == {W: 8, "a.b": 8, "a.c": None, "a.d": 4}
    assert isinstance(some("int4-g32"), Affine)
    assert isinstance(some("nvfp4"), Lookup)
