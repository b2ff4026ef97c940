"""Coded files: every tensor and every byte back, sizes near entropy, and a layout that direct reads can use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lowbit.codec import coding
from lowbit.codec.container import DTYPES, Reader, is_coded, open_tensors
from lowbit.codec.fields import LAYOUTS, Part
from lowbit.codec.header import ALIGN, PAD
from lowbit.errors import CheckpointError, FormatError
from lowbit.io.compress import compress, decompress


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def everything() -> dict[str, torch.Tensor]:
    """A tensor of each dtype and kind, some too small or too random to code, in an order that is not that of use."""
    w = gaussian(96, 512)
    int4 = (w * 3 + 8).round().clamp(0, 15).to(torch.uint8)
    flat: dict[str, torch.Tensor] = {
        "lm_head.weight": w.to(torch.bfloat16), "model.layers.1.mlp.up_proj.weight": w.half(),
        "model.layers.0.mlp.down_proj.weight": w.clone(), "model.layers.0.norm.bias": torch.zeros(5000),
        "model.layers.0.fp8": w.to(torch.float8_e4m3fn), "model.layers.0.fp8b": w.to(torch.float8_e5m2),
        "int8": (w * 20).round().to(torch.int8), "int4": int4[:, ::2] | int4[:, 1::2] << 4,
        "index": torch.arange(4000), "small": torch.arange(3), "noise": (gaussian(9999) * 1e4).long().to(torch.uint8),
        "empty": torch.zeros(0, 7), "scalar": torch.tensor(3.5), "flags": w > 1, "f64": w[:4].double(),
        "upcast": w.to(torch.bfloat16).float(), "i16": (w * 300).to(torch.int16),
    }  # fmt: skip
    return flat


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file; read only."""
    path = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    save_file(everything(), path, metadata={"format": "pt", "note": "ünïcode"})
    return path


@pytest.fixture(scope="module")
def coded(plain: Path) -> Path:
    """The same, coded; read only."""
    path = plain.with_name("coded.safetensors")
    compress(plain, path)
    return path


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def test_every_tensor_and_every_byte_comes_back(plain: Path, coded: Path, tmp_path: Path) -> None:
    assert is_coded(coded)
    assert not is_coded(plain)
    with Reader(coded) as reader, safe_open(plain, framework="pt") as original:
        assert set(reader.keys()) == set(original.keys())
        assert reader.metadata() == original.metadata() == {"format": "pt", "note": "ünïcode"}
        for name, tensor in everything().items():
            assert same(reader.get_tensor(name), tensor), name
            assert reader.get_slice(name).get_shape() == list(tensor.shape)
            assert reader.get_slice(name).get_dtype() == original.get_slice(name).get_dtype()
        assert same(reader.get_slice("int8")[3], everything()["int8"][3])
        found = dict(reader.read_all())
        assert list(found) == reader.keys()
    decompress(coded, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == plain.read_bytes()
    assert coded.stat().st_size < 0.72 * plain.stat().st_size


def test_anyone_opens_it(coded: Path) -> None:
    with safe_open(coded, framework="pt") as file, Reader(coded) as reader:
        for name, entry in reader.entries.items():
            held = file.get_tensor(name)
            if entry.layout is None:
                assert same(held, everything()[name])
            else:
                assert held.dtype == torch.uint8
        assert same(file.get_tensor("empty"), torch.zeros(0, 7))


def test_extents_are_pages_in_order_of_use(tmp_path: Path) -> None:
    blocks = {f"model.layers.{i}.mlp.{kind}_proj.weight": gaussian(600, 512, seed=i).bfloat16()
              for i in (1, 0) for kind in ("down", "up", "gate")}  # fmt: skip
    save_file(
        {"lm_head.weight": gaussian(64, 64), "model.embed_tokens.weight": gaussian(64, 64), **blocks},
        tmp_path / "a.safetensors",
    )
    compress(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with Reader(tmp_path / "b.safetensors") as reader:
        kinds = [f"model.layers.{i}.mlp.{kind}_proj.weight" for i in (0, 1) for kind in ("gate", "up", "down")]
        assert reader.keys() == ["model.embed_tokens.weight", *kinds, "lm_head.weight"]
        assert reader.begin % ALIGN == 0
        assert all(extent % ALIGN == 0 for extent in reader.header.extents)
        begins = [reader.entries[name].begin for name in (kinds[0], kinds[3], "lm_head.weight")]
        assert set(begins) < set(reader.header.extents)  # a block is read without its neighbours
        padding = sum(end - begin for begin, end in reader.header.pads.values())
        assert padding < ALIGN * len(reader.header.extents)
        assert all(name.startswith(PAD) for name in reader.header.pads)
        reader.check_padding()


def test_the_same_file_gives_the_same_bytes(plain: Path, coded: Path, tmp_path: Path) -> None:
    compress(plain, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == coded.read_bytes()


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, 10.7), (torch.float8_e4m3fn, 0.83 * 8), (torch.float16, 13.8)]
)
def test_sizes_of_gaussian_weights(dtype: torch.dtype, bits: float) -> None:
    """Rows of unit norm over their largest value, as eight-bit floats are made; ceilings of the field."""
    w = gaussian(400, 1024)
    if dtype == torch.float8_e4m3fn:
        w = w / w.abs().amax(1, keepdim=True) * 448
    data = w.to(dtype).view(torch.uint8).numpy().reshape(-1)
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    found = coding.encode_tensor(data, name)
    assert found is not None
    assert 8 * sum(blob.data.size for blob in found[1]) / w.numel() <= bits


def test_packed_codes_take_their_entropy() -> None:
    codes = (gaussian(512, 2048) * 2.5 + 7.5).round().clamp(0, 15).to(torch.uint8)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).numpy().reshape(-1)
    found = coding.encode_tensor(packed, "U8")
    assert found is not None
    counts = np.bincount(codes.numpy().reshape(-1), minlength=16) / codes.numel()
    entropy = -(counts * np.log2(counts)).sum()
    assert 8 * sum(blob.data.size for blob in found[1]) / codes.numel() <= 1.01 * entropy


def test_what_does_not_shrink_costs_nothing() -> None:
    noise = torch.randint(0, 256, (100_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    assert coding.encode_tensor(noise, "U8") is None
    assert coding.encode_tensor(noise[:4], "F32") is None


@settings(max_examples=25, deadline=None)
@given(data=st.data(), bits=st.integers(1, 8), signed=st.booleans())
def test_fields_survive_every_codec(data: st.DataObject, bits: int, signed: bool) -> None:
    size = data.draw(st.integers(1, 5000))
    kind = data.draw(st.sampled_from(["one", "few", "peaked", "flat"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 16)))
    top = 1 << bits
    codes = {
        "one": np.full(size, top - 1), "few": rng.choice(rng.integers(0, top, 3), size),
        "flat": rng.integers(0, top, size),
        "peaked": np.clip(rng.normal(top / 2, top / 20, size), 0, top - 1),
    }[kind].astype(np.uint8)  # fmt: skip
    part = Part("codes", 1, bits, signed and bits == 8)
    for name in coding.CODECS:
        if name == "constant" and kind != "one":
            continue
        stored = coding._ENCODERS[name](codes, part, coding.histogram(codes, part.signed))
        np.testing.assert_array_equal(coding.decode(coding.Blob(name, stored, size), part), codes)
    chosen = coding.encode(codes, part)
    assert chosen.data.size <= coding.raw_bytes(size, bits)
    np.testing.assert_array_equal(coding.decode(chosen, part), codes)


def test_prices_are_what_coding_costs() -> None:
    for scale in (0.7, 3.0, 20.0):
        codes = (gaussian(300_000) * scale).round().clamp(-128, 127).to(torch.int8).view(torch.uint8).numpy()
        part = Part("codes", 1, 8, True)
        expected = coding.price(coding.histogram(codes, True), part)
        assert expected.codec == coding.encode(codes, part).codec
        assert coding.encode(codes, part).data.size == pytest.approx(expected.nbytes, rel=0.01)


def test_symbols_far_apart_are_ranked() -> None:
    codes = np.random.default_rng(0).choice(np.array([0, 90, 180, 255], np.uint8), 50_000, p=[0.7, 0.1, 0.1, 0.1])
    found = coding.encode(codes, Part("codes", 1, 8))
    assert found.codec == "ranked"
    assert 8 * found.data.size / codes.size < 1.45  # its entropy is 1.357


def test_no_field_decodes_to_much_more_than_it_stores() -> None:
    zeros = np.zeros(10_000_000, np.uint8)
    stored = coding.encode(zeros, Part("codes", 1, 8))
    assert (stored.codec, stored.data.size) == ("constant", 2442)
    with pytest.raises(FormatError, match="cannot hold"):
        coding.decode(coding.Blob("constant", stored.data[:1], 10_000_000), Part("codes", 1, 8))


def test_plain_files_open_as_ever(plain: Path) -> None:
    with open_tensors(plain) as file:
        assert not isinstance(file, Reader)
        assert same(file.get_tensor("index"), torch.arange(4000))
    with pytest.raises(CheckpointError, match=r"plain\.safetensors: cannot be read"):
        Reader(plain)


def test_tensors_come_to_the_device_that_is_asked_for(plain: Path, coded: Path) -> None:
    for path in (plain, coded):
        with open_tensors(path, framework="pt", device="cpu", backend="pread") as file:  # as transformers may ask
            assert same(file.get_slice("upcast")[...], everything()["upcast"])
    with Reader(coded, "meta") as reader:
        for found in (reader.get_tensor("upcast"), reader.get_slice("upcast")[...]):
            assert (found.device.type, found.shape, found.dtype) == ("meta", (96, 512), torch.float32)


def test_every_dtype_that_is_read_has_its_bits() -> None:
    from lowbit.codec.header import BITS

    assert all(8 * torch.empty(0, dtype=dtype).element_size() == BITS[name] for name, dtype in DTYPES.items())
    assert all(layout in LAYOUTS for name in BITS for layout in coding.candidates(name))


def test_hash_of_the_original_is_in_the_header(plain: Path, coded: Path) -> None:
    with Reader(coded) as reader:
        assert reader.header.sha256 == hashlib.sha256(plain.read_bytes()).hexdigest()
