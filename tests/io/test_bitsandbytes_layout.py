"""The layout of bitsandbytes, proved with the library itself and with transformers: same codes, same values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compressed_tensors_layout import W, coded, exported, input_of, same, some
from transformers import AutoModelForCausalLM

from lowbit.errors import CheckpointError, ExportError
from lowbit.formats.activation import Input, activation
from lowbit.formats.blocks import Block
from lowbit.formats.heads import CacheFormat
from lowbit.formats.pack import Codes
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Columns, Lookup, QTensor, Raw, Sum
from lowbit.io.interchange.base import LowBitModel
from lowbit.io.interchange.bitsandbytes import BitsAndBytes

STATE = "weight.quant_state.bitsandbytes__nf4"


def layout_of(q: QTensor, input: Input | None = None) -> BitsAndBytes:
    inputs = {} if input is None else {W: input.format}
    return BitsAndBytes.for_model(LowBitModel("LlamaForCausalLM", {W: q.spec()}, ("lm_head",), inputs))


def reread(layout: BitsAndBytes) -> BitsAndBytes:
    return BitsAndBytes.of_config(json.loads(json.dumps(layout.config())))


def flat(rows: int, columns: int, size: int = 64) -> Lookup:
    """nf4 whose blocks cross rows and whose last one is short."""
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(1))
    block = Block("flat", (size,))
    scale = torch.rand(block.count((rows, columns)), generator=torch.Generator().manual_seed(2)) + 0.5
    return Lookup((rows, columns), Codes.of(codes, 16), "nf4", Raw.of(scale), block)


TREES: dict[str, Callable[[], QTensor]] = {
    **{name: lambda name=name: some(name, 6, 128) for name in ("nf4", "fp4", "nf4-dq", "fp4-dq")},
    "nf4-dq of two nested blocks": lambda: some("nf4-dq", 136, 128),
    "blocks across rows": lambda: flat(6, 70),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(TREES))
def test_their_dequantizer_and_ours_both_ways(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    q = TREES[name]()
    layout = layout_of(q)
    held = layout.pack(W, q)
    parts = {k.removeprefix("weight."): t.clone() for k, t in held.items() if k != "weight"}
    state = bnb.functional.QuantState.from_dict(parts, torch.device("cpu"))
    assert torch.equal(bnb.functional.dequantize_4bit(held["weight"], state), q.decode())

    again, input = reread(layout).unpack(W, q.shape, held)
    assert input is None
    assert same(again, q)
    assert layout.config() == reread(layout).config()

    kind = layout.kind  # and what the library makes itself
    w = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))
    packed, theirs = bnb.functional.quantize_4bit(
        w, blocksize=64, quant_type=kind.table, compress_statistics=kind.nested
    )
    made = {f"weight.{key}": t for key, t in theirs.as_dict(packed=True).items()}
    assert made.keys() == held.keys() - {"weight"}
    ours = layout.unpack(W, q.shape, {"weight": packed, **made})[0]
    assert torch.equal(ours.decode(), bnb.functional.dequantize_4bit(packed, theirs))
    wide = packed.flatten().view(torch.bfloat16).view(-1, 1)  # bnb_4bit_quant_storage
    assert same(layout.unpack(W, q.shape, {"weight": wide, **made})[0], ours)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "input"), [("nf4-dq", None), ("fp4", None), ("int8-row-sym", None), ("int8-row-sym", "int8-token-sym")]
)
def test_transformers_computes_what_we_compute(
    name: str, input: str | None, tokens: torch.Tensor, tmp_path: Path
) -> None:
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)

    def formats(site: str) -> str | None:
        return None if "down_proj" in site else name  # 96 columns hold no blocks of 64

    ours, qs = exported(tmp_path, BitsAndBytes, formats, input)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    dense = theirs.get_submodule("model.layers.0.mlp.down_proj")
    assert type(dense) is torch.nn.Linear
    for site, q in qs.items():
        linear = theirs.get_submodule(site)
        if name == "int8-row-sym":
            scale = (linear.weight.SCB.double() / 127).float().view(-1, 1)
            assert torch.equal(linear.weight.data.float() * scale, q.decode())
            assert linear.state.threshold == (6.0 if input is None else 0.0)
        else:
            w = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            assert torch.equal(w, q.decode())
    with torch.inference_mode():
        expected, found = ours(tokens[:2]).logits, theirs(tokens[:2]).logits
    bound = 1e-5 if name != "int8-row-sym" else 0.03 if input else 0.3  # it rounds inputs to int8, and all to float16
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_int8_both_ways() -> None:
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    q = some("int8-row-sym", 40, 96)
    for input in (None, input_of("int8-token-sym")):
        layout = layout_of(q, input)
        held = layout.pack(W, q, input)
        dense = bnb.functional.int8_vectorwise_dequant(held["weight"], held["SCB"])
        torch.testing.assert_close(dense, q.decode(), rtol=2**-22, atol=0)
        again, rounding = reread(layout).unpack(W, q.shape, held)
        assert same(again, q)
        assert (rounding and rounding.format) == (input and input.format)
        assert bool(layout.notes()) == (input is None)
    w = torch.randn(40, 96, generator=torch.Generator().manual_seed(8)).half()
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(w)
    theirs, _ = layout.unpack(W, (40, 96), {"weight": codes, "SCB": absmax})
    torch.testing.assert_close(
        theirs.decode(), bnb.functional.int8_vectorwise_dequant(codes, absmax), rtol=2**-22, atol=0
    )
    assert torch.equal(layout_of(theirs).pack(W, theirs)["SCB"], absmax)


def test_golden_bytes() -> None:
    w = torch.tensor([[-1.0, 1, 0, 0.44] + [0.0] * 60])
    q = coded("nf4", w)
    held = layout_of(q).pack(W, q)
    assert held["weight"].shape == (32, 1)
    assert held["weight"].flatten().tolist() == [0x0F, 0x7C] + [0x77] * 30
    assert held["weight.absmax"].tolist() == [1.0]
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1, 64]}
    assert json.loads(bytes(held[STATE].tolist())) == state
    odd = flat(3, 5, 32)
    held = layout_of(odd).pack(W, odd)
    assert held["weight"].shape == (8, 1)
    assert held["weight"][-1].item() == int(odd.codes.unpack()[2, 4]) << 4
    assert same(layout_of(odd).unpack(W, (3, 5), held)[0], odd)
    q = coded("int8-row-sym", torch.tensor([[-127.0, 63.5, 1]]))
    held = layout_of(q).pack(W, q)
    assert held["weight"].tolist() == [[-127, 64, 1]]
    assert (held["SCB"].tolist(), held["weight_format"].item()) == ([127.0], 0)


# --- refusals --------------------------------------------------------------------------------------------------------


def outliers() -> Sum:
    inner = some("int8-row-sym", 6, 64)
    return Sum((6, 64), (inner, Columns((6, 64), torch.tensor([3]), Raw.of(torch.ones(6, 1).half()))))


@pytest.mark.parametrize(
    ("make", "input", "message"),
    [
        (outliers, None, "16-bit columns"), (lambda: some("int4-g32"), None, "symmetric int8"),
        (lambda: some("int8-row"), None, "symmetric int8"), (lambda: some("nf4", 6, 96), None, "flattened"),
        (lambda: some("nf4-g48", 6, 96), None, "flattened"), (lambda: some("mxfp4"), None, "neither"),
        (lambda: some("nf4"), "int8-token-sym", "int8-token-sym"),
        (lambda: some("int8-row-sym"), "int8-g32", "int8-g32"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused_with_another(
    make: Callable[[], QTensor], input: str | None, message: str
) -> None:
    refusal = BitsAndBytes.refusal(make().spec(), None if input is None else activation(input))
    assert refusal is not None
    assert message in refusal.why
    assert refusal.fix


def test_one_model_has_one_kind() -> None:
    specs = {W: some("nf4").spec(), "b": some("nf4-dq").spec()}
    with pytest.raises(ExportError, match=f"b: is nf4-dq, {W} is nf4"):
        BitsAndBytes.for_model(LowBitModel("M", specs))
    int8 = {W: some("int8-row-sym").spec(), "b": some("int8-row-sym").spec()}
    with pytest.raises(ExportError, match="b: does not round its inputs"):
        BitsAndBytes.for_model(LowBitModel("M", int8, inputs={W: activation("int8-token-sym")}))
    with pytest.raises(ExportError, match=r"mlp.experts.3.w1: is an expert"):
        BitsAndBytes.for_model(LowBitModel("M", {W: some("nf4").spec(), "mlp.experts.3.w1": some("nf4").spec()}))
    with pytest.raises(ExportError, match=f"{W}: is not nf4, as"):
        layout_of(some("nf4")).pack(W, some("fp4"))
    kv = LowBitModel("M", {W: some("nf4").spec()}, kv=CacheFormat("int4-head", "raw"))
    assert "int4-head:raw" in BitsAndBytes.for_model(kv).notes()[0]
    assert preset("nf4-g128").block.size == (128,)
    wide = some("nf4-g128", 6, 128)  # float16 scales become float32, exactly
    assert torch.equal(layout_of(wide).unpack(W, (6, 128), layout_of(wide).pack(W, wide))[0].decode(), wide.decode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": False, "_load_in_4bit": False}, "load_in_4bit and load_in_8bit"),
        ({"load_in_8bit": True}, "load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": 1}, "load_in_4bit is 1"),
        ({"bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type is 'nf3'"),
        ({"bnb_4bit_use_double_quant": "no"}, "bnb_4bit_use_double_quant is 'no'"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules"),
    ],
)
def test_damaged_configurations_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        BitsAndBytes.of_config({**layout_of(some("nf4")).config(), **changes})


def state(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def damage(tensors: dict[str, Any]) -> None:
        held = {**json.loads(bytes(tensors[STATE].tolist())), **changes}
        tensors[STATE] = torch.tensor(list(json.dumps(held).encode()), dtype=torch.uint8)

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("nf4", lambda t: t.pop("weight"), "weight: is missing"),
        ("nf4", lambda t: t.update(weight=t["weight"][:-1]), "weight: has 191 bytes, expected 192"),
        ("nf4", lambda t: t.pop(STATE), "has no quant_state"),
        ("nf4", lambda t: t.update({STATE: torch.zeros(1 << 20, dtype=torch.uint8)}), "nf4: is no short JSON"),
        ("nf4", lambda t: t.update({STATE: torch.tensor([91] * 4000, dtype=torch.uint8)}), "nf4: is no JSON"),
        ("nf4", lambda t: t.update({STATE: torch.tensor([49], dtype=torch.uint8)}), "nf4: is no table"),
        ("nf4", state(blocksize=10**12), "nf4: blocksize is 1000000000000"),
        ("nf4", state(blocksize=[64]), "nf4: blocksize is .64."),
        ("nf4", state(shape=[64, 6]), "nf4: shape is .64, 6."),
        ("nf4", state(quant_type="fp4"), "nf4: quant_type is 'fp4'"),
        ("nf4", state(dtype="load"), "nf4: dtype is 'load'"),
        ("nf4", state(nested_offset=0.5), "nf4: nested_blocksize is None"),
        ("nf4-dq", state(nested_offset=float("inf")), "nf4: nested_offset is inf"),
        ("nf4-dq", state(nested_blocksize=64), "nf4: nested_blocksize is 64"),
        ("nf4-dq", lambda t: t.pop("weight.nested_absmax"), "nf4: nested_absmax"),
        ("nf4-dq", lambda t: t["weight.nested_quant_map"].neg_(), "nested_quant_map: are not the values of dynamic8"),
        ("nf4", lambda t: t["weight.quant_map"].fill_(0), "quant_map: are not the values of nf4"),
        ("nf4", lambda t: t["weight.absmax"].fill_(torch.inf), "weight.absmax: is not finite"),
        ("nf4", lambda t: t.update({"weight.absmax": t["weight.absmax"][:-1]}), r"weight.absmax: .*\(5,\)"),
        ("int8-row-sym", lambda t: t["weight_format"].fill_(2), "weight_format: is not 0"),
        ("int8-row-sym", lambda t: t.update(SCB=t["SCB"].half()), "SCB: is torch.float16"),
        ("int8-row-sym", lambda t: t.update(weight=t["weight"].view(torch.uint8)), "weight: is torch.uint8"),
    ],
)
def test_damaged_tensors_are_named(name: str, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    q = some(name)
    layout = layout_of(q)
    held = {key: part.clone() for key, part in layout.pack(W, q).items()}
    damage(held)
    with pytest.raises(CheckpointError, match=f"{W}.*{message}"):
        layout.unpack(W, (6, 64), held)
