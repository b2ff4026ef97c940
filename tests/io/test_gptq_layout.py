"""GPTQ files: bits where the layout says, nothing rounded, every refusal by name.

The oracle is a reader of its own in numpy, written from the layout's description word by word.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.activation import activation
from lowbit.formats.blocks import Block
from lowbit.formats.heads import CacheFormat
from lowbit.formats.pack import Codes
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Affine, Gathered, QTensor, Raw, Rotated
from lowbit.io.interchange.base import LowBitModel
from lowbit.io.interchange.gptq import Gptq, GptqV2

Tensors = dict[str, torch.Tensor]
GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "gptq.safetensors")
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
GATE = "model.layers.0.mlp.gate_proj"


def encoded(name: str, rows: int = 32, columns: int = 64, seed: int = 0) -> QTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return preset(name).encode(w, preset(name).fit(w))


def reordered(q: QTensor, seed: int = 0) -> Gathered:
    """``q`` on inputs in another order: what act-order files hold."""
    columns = q.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    return Gathered(q.shape, order.view(-1, 1).repeat(1, 2), Raw((columns, 2), torch.tensor([[1.0, 0.0]])), q)


def three_bits(words: np.ndarray) -> np.ndarray:
    """32 values of three words each: 10 + 2 bits | 1 bit + 10 + 1 bit | 2 bits + 10."""
    a, b, c = (words[:, i::3].astype(np.uint64) for i in range(3))
    values = [a >> (3 * i) & 7 for i in range(10)] + [(a >> 30 & 3) | (b & 1) << 2]
    values += [b >> (3 * i + 1) & 7 for i in range(10)] + [(b >> 31 & 1) | (c & 3) << 1]
    values += [c >> (3 * i + 2) & 7 for i in range(10)]
    return np.stack(values, axis=-1).reshape(len(words), -1)


def values(words: torch.Tensor, bits: int) -> np.ndarray:
    """The small integers of each row of words."""
    unsigned = words.numpy().view(np.uint32)
    if bits == 3:
        return three_bits(unsigned)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (unsigned[..., None] >> shifts & np.uint32((1 << bits) - 1)).reshape(len(unsigned), -1)


def read(tensors: Tensors, bits: int, version: int) -> np.ndarray:
    """The matrix (out, in) in float32, as the layout's description has it."""
    q = values(tensors["qweight"].t().contiguous(), bits).T  # (in, out)
    zeros = values(tensors["qzeros"], bits).astype(np.int64) + (version == 1)
    g = tensors["g_idx"].numpy()
    return (tensors["scales"].float().numpy()[g] * (q - zeros[g]).astype(np.float32)).T


def settled(layout: type[Gptq], q: QTensor) -> Gptq:
    return layout.for_model(LowBitModel("LlamaForCausalLM", {UP: q.spec()}))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)), block=st.sampled_from(("row", "g16", "g32")), sym=st.booleans(),
    layout=st.sampled_from((Gptq, GptqV2)), rows=st.sampled_from((32, 64)), columns=st.sampled_from((32, 96)),
    act_order=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_written_is_the_matrix_and_comes_back(
    bits: int, block: str, sym: bool, layout: type[Gptq], rows: int, columns: int, act_order: bool, seed: int
) -> None:
    q: QTensor = encoded(f"int{bits}-{block}{'-sym' if sym else ''}", rows, columns, seed)
    assert isinstance(q, Affine)
    if isinstance(q.zero, Codes):  # version 1 has no zero of 0
        zeros = q.zero.unpack().clamp(min=1)
        q = dataclasses.replace(q, zero=Codes.of(zeros, 1 << bits))
    matrix = reordered(q, seed) if act_order else q
    chosen = settled(layout, matrix)
    tensors = chosen.pack(UP, matrix)
    version = 1 if layout is Gptq else 2
    np.testing.assert_array_equal(read(tensors, bits, version), matrix.decode().numpy())
    assert tensors.keys() == layout.suffixes
    assert all(t.is_contiguous() for t in tensors.values())
    again, input = layout.of_config(json.loads(json.dumps(chosen.config()))).unpack(UP, (rows, columns), tensors)
    assert input is None
    assert not again.problem()
    assert torch.equal(again.decode(), matrix.decode())
    inner = again.inner if isinstance(again, Gathered) else again
    assert isinstance(inner, Affine)
    assert isinstance(again, Gathered) == (act_order and block != "row" and columns > int(block[1:]))
    if not act_order:
        assert inner.spec() == q.spec()
        assert torch.equal(inner.codes.data, q.codes.data)
    assert all(torch.equal(a, b) for a, b in zip(chosen.pack(UP, again).values(), tensors.values(), strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_golden_bytes(bits: int) -> None:
    held = {name.partition(".")[2]: t for name, t in GOLDEN.items() if name.startswith(f"{bits}.")}
    zeros = Codes.of(held["zeros"].reshape(1, -1), 1 << bits)
    scale = Raw.of(held["scales"].t().contiguous())
    q = Affine((32, 64), Codes.of(held["codes"], 1 << bits), scale, zeros, Block("group", (32,)))
    for layout, name in ((Gptq, "qzeros"), (GptqV2, "qzeros_v2")):
        packed = settled(layout, q).pack(UP, q)
        for suffix, golden in (("qweight", "qweight"), ("qzeros", name), ("scales", "scales"), ("g_idx", "g_idx")):
            assert torch.equal(packed[suffix], held[golden]), (layout.name, suffix)


def test_version_1_has_no_zero_of_0() -> None:
    positive = torch.rand(32, 64)
    q = preset("int4-g32").encode(positive, preset("int4-g32").fit(positive))
    with pytest.raises(ExportError, match=r"up_proj: a zero is 0 in 64 of 64(.|\n)*codes that reach 15(.|\n)*gptq-v2"):
        settled(Gptq, q).pack(UP, q)
    assert isinstance(q, Affine)
    spare = dataclasses.replace(q, codes=Codes.of(q.codes.unpack().clamp(max=14), 16))  # room for one more
    moved = settled(Gptq, spare).pack(UP, spare)
    np.testing.assert_array_equal(read(moved, 4, 1), spare.decode().numpy())
    held = settled(GptqV2, q).pack(UP, q)
    np.testing.assert_array_equal(read(held, 4, 2), q.decode().numpy())
    held["qzeros"] = torch.full_like(held["qzeros"], -1)
    with pytest.raises(CheckpointError, match=r"up_proj\.qzeros: stores 15(.|\n)*0 or 16"):
        settled(Gptq, q).unpack(UP, (32, 64), held)


def test_a_last_group_of_fewer_inputs_is_read() -> None:
    q = encoded("int4-g64-sym", 32, 96)
    tensors = settled(GptqV2, encoded("int4-g32-sym", 32, 96)).pack(UP, encoded("int4-g32-sym", 32, 96))
    tensors |= {"scales": tensors["scales"][:2], "qzeros": tensors["qzeros"][:2]}
    tensors["g_idx"] = torch.arange(96, dtype=torch.int32) // 64
    again, _ = settled(GptqV2, encoded("int4-g64-sym")).unpack(UP, (32, 96), tensors)
    np.testing.assert_array_equal(again.decode().numpy(), read(tensors, 4, 2))
    assert again.spec() == q.spec()


# --- refusals --------------------------------------------------------------------------------------------------------


def rotated(columns: int = 64) -> QTensor:
    signs = Codes.of(torch.zeros(1, columns, dtype=torch.uint8), 2)
    return Rotated((32, columns), signs, encoded("int4-g32", 32, columns), 64)


@pytest.mark.parametrize(
    ("q", "why", "fix"),
    [
        (encoded("nf4"), "Lookup", "bnb"),
        (encoded("mxfp4"), "Lookup", "compressed-tensors"),
        (encoded("int5-g32"), "32 levels", "compressed-tensors"),
        (encoded("ternary", 32, 128), "Lookup", "bf16"),
        (encoded("int4-g32-z16"), "zeros", "without -z16"),
        (encoded("int4-tensor"), "scales a tensor", "-g128"),
        (encoded("int4-g64", 32, 96), "96 inputs are no multiple of the group of 64", "int4-g32"),
        (encoded("int3-row", 32, 40), "do not fill words", "16 bit"),
        (encoded("int4-row", 36, 64), "do not fill words", "16 bit"),
        (rotated(), "Rotated", "bf16"),
    ],
)
def test_what_the_layout_cannot_hold(q: QTensor, why: str, fix: str) -> None:
    refused = Gptq.refusal(q.spec())
    assert refused is not None
    assert why in refused.why
    assert fix in refused.fix
    with pytest.raises(ExportError, match=f"{re.escape(UP)}: .*{re.escape(refused.why)}"):
        settled(Gptq, q)


def test_rounded_inputs_are_refused() -> None:
    refused = Gptq.refusal(encoded("int4-g32").spec(), activation("int8-token"))
    assert refused is not None
    assert "int8-token" in refused.why


def test_values_that_only_packing_sees() -> None:
    q = encoded("int4-g32-sym")
    assert isinstance(q, Affine)
    precise = dataclasses.replace(q, scale=Raw.of(q.scale.decode() * (1 + 2**-20)))
    with pytest.raises(ExportError, match=r"up_proj: a scale is no float16"):
        settled(Gptq, precise).pack(UP, precise)
    exact = dataclasses.replace(q, scale=Raw.of(q.scale.decode()))  # float32 that is float16
    np.testing.assert_array_equal(read(settled(Gptq, exact).pack(UP, exact), 4, 1), q.decode().numpy())
    order = reordered(q)
    for damaged in (
        dataclasses.replace(order, scale=Raw((64, 2), torch.tensor([[0.5, 0.5]]))),
        dataclasses.replace(order, index=order.index.clone().fill_(3)),
    ):
        with pytest.raises(ExportError, match="only reorder"):
            settled(Gptq, damaged).pack(UP, damaged)


# --- what loaders require of the configuration -----------------------------------------------------------------------

INT4, INT8 = encoded("int4-g32-sym").spec(), encoded("int8-row-sym").spec()
Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


def config_of(
    specs: dict[str, Any], dense: tuple[str, ...] = ("lm_head",), layout: type[Gptq] = Gptq
) -> dict[str, Any]:
    return dict(layout.for_model(LowBitModel("LlamaForCausalLM", specs, dense)).config())


def test_vllm_requires_bits_group_size_sym_and_desc_act() -> None:
    said = config_of({UP: INT4, GATE: INT4})
    assert {key: said[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "lm_head")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False,
    }  # fmt: skip
    assert config_of({UP: INT8})["group_size"] == -1
    assert not config_of({UP: INT4, DOWN: encoded("int4-g32").spec()})["sym"]
    assert config_of({UP: INT4, DOWN: reordered(encoded("int4-g32-sym")).spec()})["desc_act"]


def test_gptqmodel_requires_the_version_and_the_words() -> None:
    for layout, version in ((Gptq, "gptq"), (GptqV2, "gptq_v2")):
        said = config_of({UP: INT4}, layout=layout)
        assert (said["checkpoint_format"], said["pack_dtype"]) == (version, "int32")
        assert said["meta"]["quantizer"][0].startswith("lowbit:")


def test_autogptq_requires_its_own_file() -> None:
    layout = Gptq.for_model(LowBitModel("LlamaForCausalLM", {UP: INT4}))
    assert layout.files() == {"quantize_config.json": layout.config()}


def test_vllm_requires_what_it_fuses_to_be_alike() -> None:
    with pytest.raises(ExportError, match=r"qkv_proj: (.|\n)*q_proj is int4-g32, (.|\n)*v_proj is int8-row"):
        config_of({Q: INT4, K: INT4, V: INT8})
    with pytest.raises(ExportError, match=r"gate_up_proj: (.|\n)*16 bit"):
        config_of({UP: INT4}, (GATE,))
    with pytest.raises(ExportError, match=r"mlp\.experts: "):
        config_of({"model.layers.0.mlp.experts.0.w1": INT4, "model.layers.0.mlp.experts.7.w2": INT8})


def test_sites_of_other_kinds_are_named_for_engines_that_fuse_and_that_do_not() -> None:
    (pattern, override), = config_of({Q: INT8, K: INT8, V: INT8, UP: INT4, GATE: INT4, DOWN: INT4, "a.1.x": INT4})[
        "dynamic"
    ].items()  # fmt: skip
    assert override == {"bits": 8, "group_size": -1}
    named = {site for site in (Q, K, V, UP, DOWN, Q + "x", "model.layers.0.self_attn.qkv_proj", "model.layers.10." + Q)
             if re.match(pattern.removeprefix("+:"), site)}  # fmt: skip
    assert named == {Q, K, V, "model.layers.0.self_attn.qkv_proj"}
    varied = Gptq.of_config(config_of({Q: INT8, K: INT8, V: INT8, UP: INT4, GATE: INT4, DOWN: INT4, "a.1.x": INT4}))
    for name in ("int8-row-sym", "int4-g32-sym", "int3-g16"):
        q = encoded(name)
        again, _ = varied.unpack(Q, (32, 64), settled(Gptq, q).pack(Q, q))
        assert again.spec() == q.spec()


def test_linears_in_blocks_that_stay_are_skipped_by_both_conventions() -> None:
    said = config_of({UP: INT4, GATE: INT4}, (DOWN, "lm_head"))
    assert said["modules_in_block_to_quantize"] == [["mlp.up_proj", "mlp.gate_proj"]]
    assert said["dynamic"] == {"-:^(?:" + re.escape(DOWN) + ")$": {}}
    second = DOWN.replace("0", "1")
    assert "modules_in_block_to_quantize" not in config_of({UP: INT4, GATE: INT4, second: INT4}, (DOWN,))
    assert "dynamic" not in config_of({UP: INT4, GATE: INT4})
    assert config_of({UP: INT4, "lm_head": INT4}, ())["lm_head"]


def test_what_files_cannot_say_is_said() -> None:
    model = LowBitModel("L", {UP: encoded("int4-g32").spec()}, kv=CacheFormat("int4-head", "int4-head"))
    assert [re.search(r"int4-head|gptq-v2", note) is not None for note in Gptq.for_model(model).notes()] == [True, True]
    assert settled(Gptq, encoded("int4-g32-sym")).notes() == settled(GptqV2, encoded("int4-g32")).notes() == ()


# --- untrusted files -------------------------------------------------------------------------------------------------


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda t: t.pop("scales"), "scales: is missing"),
        (lambda t: t.pop("g_idx"), "g_idx: is missing"),
        (put("qweight", lambda t: t[:-1]), "qweight: is int32 (7, 32), expected int32 (8, 32)"),
        (put("qweight", lambda t: t.float()), "qweight: is float32"),
        (put("qzeros", lambda t: t.t()), "qzeros: is int32 (4, 2)"),
        (put("scales", lambda t: t[:1]), "scales: is float16 (1, 32)"),
        (put("scales", lambda t: t.double()), "scales: is float64"),
        (put("scales", lambda t: t.clone().fill_(torch.nan)), "scales: has a NaN"),
        (put("g_idx", lambda t: t - 1), "g_idx: does not put 32 inputs"),
        (put("g_idx", lambda t: t + 1), "g_idx: does not put 32 inputs"),
        (put("g_idx", lambda t: torch.zeros_like(t)), "g_idx: does not put 32 inputs"),
        (put("g_idx", lambda t: t.float()), "g_idx: is float32"),
        (put("qzeros", lambda t: t.clone().fill_(0x11111111)), "qzeros: has other zeros"),
    ],
)
def test_hostile_tensors(damage: Callable[[Tensors], object], named: str) -> None:
    q = reordered(encoded("int4-g32-sym"))
    tensors = settled(Gptq, q).pack(UP, q)
    damage(tensors)
    with pytest.raises(CheckpointError) as error:
        settled(Gptq, q).unpack(UP, (32, 64), tensors)
    assert f"{UP}.{named}" in str(error.value)


def test_an_order_that_the_configuration_denies_is_refused() -> None:
    q = reordered(encoded("int4-g32-sym"))
    with pytest.raises(CheckpointError, match=r"g_idx: is not in order"):
        settled(Gptq, encoded("int4-g32-sym")).unpack(UP, (32, 64), settled(Gptq, q).pack(UP, q))


def test_shapes_that_fill_no_words_are_refused() -> None:
    with pytest.raises(CheckpointError, match="do not fill words"):
        settled(Gptq, encoded("int4-g32")).unpack(UP, (33, 64), {})
    varied = dataclasses.replace(settled(Gptq, encoded("int4-g32")), varies=True)
    absurd = {"qweight": torch.zeros(3, 32, dtype=torch.int32), "scales": torch.zeros(2, 32)}
    for tensors in (absurd, {"qweight": torch.zeros(8)}):
        with pytest.raises(CheckpointError, match="qweight"):
            varied.unpack(UP, (32, 64), tensors)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_method", "awq"), ("bits", 5), ("bits", "4"), ("bits", None), ("bits", True), ("group_size", 0),
        ("group_size", 1.5), ("sym", None), ("sym", 1), ("desc_act", "yes"), ("checkpoint_format", "gptq_v2"),
        ("checkpoint_format", "gptq_p"), ("pack_dtype", "int64"), ("dynamic", [1]), ("lm_head", 3),
    ],
)  # fmt: skip
def test_hostile_configurations(field: str, value: Any) -> None:
    config = {**config_of({UP: INT4}), field: value}
    with pytest.raises(CheckpointError, match=rf"^quantization_config\.{field}: "):
        Gptq.of_config(config)
