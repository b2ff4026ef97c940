"""AWQ files: bits where the layout says, nothing rounded, every refusal by name; against a reader in numpy."""

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
from lowbit.formats.blocks import Block
from lowbit.formats.pack import Codes
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Affine, Gathered, QTensor, Raw
from lowbit.io.interchange.awq import Awq
from lowbit.io.interchange.base import LowBitModel

Tensors = dict[str, torch.Tensor]
GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "awq.safetensors")
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def encoded(name: str, rows: int = 32, columns: int = 64, seed: int = 0) -> QTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return preset(name).encode(w, preset(name).fit(w))


def nibbles(words: torch.Tensor) -> np.ndarray:
    """Column 0 of eight lies in the lowest nibble, column 1 in the fifth, column 2 in the second, ..."""
    unsigned = words.numpy().view(np.uint32)
    at = np.array([0, 4, 1, 5, 2, 6, 3, 7], dtype=np.uint32) * np.uint32(4)
    return (unsigned[..., None] >> at & np.uint32(15)).reshape(len(unsigned), -1)


def read(tensors: Tensors) -> np.ndarray:
    """The matrix (out, in) in float32."""
    q, zeros = nibbles(tensors["qweight"]).astype(np.int64), nibbles(tensors["qzeros"]).astype(np.int64)
    g = np.arange(len(q)) // (len(q) // len(zeros))
    return ((q - zeros[g]).astype(np.float32) * tensors["scales"].float().numpy()[g]).T


def settled(q: QTensor) -> Awq:
    return Awq.for_model(LowBitModel("LlamaForCausalLM", {UP: q.spec()}))


@settings(max_examples=25, deadline=None)
@given(
    block=st.sampled_from(("row", "g8", "g32")), sym=st.booleans(), rows=st.sampled_from((8, 40)),
    columns=st.sampled_from((32, 96)), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_written_is_the_matrix_and_comes_back(
    block: str, sym: bool, rows: int, columns: int, seed: int
) -> None:
    q = encoded(f"int4-{block}{'-sym' if sym else ''}", rows, columns, seed)
    assert isinstance(q, Affine)
    tensors = settled(q).pack(UP, q)
    np.testing.assert_array_equal(read(tensors), q.decode().numpy())
    assert tensors.keys() == Awq.suffixes
    assert all(t.is_contiguous() for t in tensors.values())
    layout = Awq.of_config(json.loads(json.dumps(settled(q).config())))
    again, input = layout.unpack(UP, (rows, columns), tensors)
    assert input is None
    assert isinstance(again, Affine)
    assert not again.problem()
    assert torch.equal(again.codes.data, q.codes.data)
    assert torch.equal(again.decode(), q.decode())
    assert again.spec() == q.spec() or sym  # zeros are explicit in files
    assert all(torch.equal(a, b) for a, b in zip(layout.pack(UP, again).values(), tensors.values(), strict=True))


def test_golden_bytes() -> None:
    scale = Raw.of(GOLDEN["scales"].t().contiguous())
    zeros = Codes.of(GOLDEN["zeros"].reshape(1, -1), 16)
    q = Affine((32, 64), Codes.of(GOLDEN["codes"], 16), scale, zeros, Block("group", (32,)))
    packed = settled(q).pack(UP, q)
    for name in Awq.suffixes:
        assert torch.equal(packed[name], GOLDEN[name]), name


@pytest.mark.parametrize(
    ("q", "why", "fix"),
    [
        (encoded("int3-g32"), "8 levels", "compressed-tensors"),
        (encoded("nf4"), "Lookup", "bnb"),
        (encoded("int4-g64", 32, 96), "no multiple of the group", "int4-g32"),
        (encoded("int4-row", 36, 64), "do not fill words", "16 bit"),
        (
            Gathered((32, 64), torch.zeros(64, 2, dtype=torch.int32), Raw.of(torch.ones(64, 2)), encoded("int4-g32")),
            "reordered inputs",
            "gptq",
        ),
    ],
)
def test_what_the_layout_cannot_hold(q: QTensor, why: str, fix: str) -> None:
    refused = Awq.refusal(q.spec())
    assert refused is not None
    assert why in refused.why
    assert fix in refused.fix
    with pytest.raises(ExportError, match=f"{re.escape(UP)}: .*{re.escape(refused.why)}"):
        settled(q)


def test_a_scale_that_is_no_float16_is_refused() -> None:
    q = encoded("int4-g32")
    assert isinstance(q, Affine)
    precise = dataclasses.replace(q, scale=Raw.of(q.scale.decode() * (1 + 2**-20)))
    with pytest.raises(ExportError, match=r"up_proj: a scale is no float16"):
        settled(precise).pack(UP, precise)


# --- what loaders require --------------------------------------------------------------------------------------------

G32, G16 = encoded("int4-g32").spec(), encoded("int4-g16").spec()


def for_model(specs: dict[str, Any], dense: tuple[str, ...] = ("lm_head",)) -> Awq:
    return Awq.for_model(LowBitModel("LlamaForCausalLM", specs, dense))


def test_vllm_requires_four_bits_a_group_and_zero_points() -> None:
    said = for_model({UP: G32}).config()
    assert {key: said[key] for key in ("quant_method", "bits", "group_size", "zero_point", "version")} == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    }  # fmt: skip
    assert for_model({UP: encoded("int4-row").spec()}).config()["group_size"] == -1


def test_readers_require_the_names_of_what_stays_in_16_bit() -> None:
    assert for_model({UP: G32}, (DOWN, "lm_head")).config()["modules_to_not_convert"] == [DOWN, "lm_head"]
    assert for_model({UP: G32}, ()).config()["modules_to_not_convert"] is None
    gate = "model.layers.0.mlp.gate"  # they look for parts of names
    with pytest.raises(ExportError, match=r"mlp\.gate: .*mlp\.gate_up"):
        for_model({"model.layers.0.mlp.gate_up": G32}, (gate,))


def test_readers_require_one_group_size() -> None:
    with pytest.raises(ExportError, match=r"down_proj: is int4-g16, .*up_proj is int4-g32"):
        for_model({UP: G32, DOWN: G16})


def test_vllm_requires_what_it_fuses_to_be_alike() -> None:
    with pytest.raises(ExportError, match=r"gate_up_proj: (.|\n)*16 bit"):
        for_model({UP: G32}, ("model.layers.0.mlp.gate_proj",))


def test_readers_require_a_head_in_16_bit() -> None:
    with pytest.raises(ExportError, match="lm_head: "):
        for_model({UP: G32, "lm_head": G32}, ())


# --- untrusted files -------------------------------------------------------------------------------------------------


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda t: t.pop("qzeros"), "qzeros: is missing"),
        (put("qweight", lambda t: t.t()), "qweight: is int32 (4, 64), expected int32 (64, 4)"),
        (put("qweight", lambda t: t.long()), "qweight: is int64"),
        (put("qzeros", lambda t: t[:1]), "qzeros: is int32 (1, 4)"),
        (put("scales", lambda t: t.clone().fill_(torch.inf)), "scales: has a NaN"),
    ],
)
def test_hostile_tensors(damage: Callable[[Tensors], object], named: str) -> None:
    q = encoded("int4-g32")
    tensors = settled(q).pack(UP, q)
    damage(tensors)
    with pytest.raises(CheckpointError) as error:
        settled(q).unpack(UP, (32, 64), tensors)
    assert f"{UP}.{named}" in str(error.value)
    with pytest.raises(CheckpointError, match="no place"):
        settled(q).unpack(UP, (32, 48), tensors)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_method", "gptq"), ("bits", 3), ("bits", 4.0), ("group_size", -2), ("group_size", None),
        ("zero_point", False), ("zero_point", 1), ("version", "gemv"),
    ],
)  # fmt: skip
def test_hostile_configurations(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^quantization_config\.{field}: "):
        Awq.of_config({**for_model({UP: G32}).config(), field: value})


def test_the_old_names_are_read() -> None:
    said = {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM", "quant_method": "awq"}
    assert Awq.of_config(said) == Awq(128)
