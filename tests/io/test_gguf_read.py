"""Reading GGUF files: the model that was written comes back, and hostile files are refused before they are believed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from gguf_models import FORMATS, family, values_of, written

from lowbit.arrays import Tensor
from lowbit.errors import CheckpointError, LowbitError, ModelError
from lowbit.formats.qtensor import QTensor
from lowbit.io.gguf.metadata import config_of
from lowbit.io.gguf.read import GgufModel, read
from lowbit.io.gguf.write import write
from lowbit.io.opening import open_low_bit
from lowbit.models.gguf_header import check_header


def decoded(model: GgufModel) -> dict[str, Tensor]:
    return {n: v.decode() if isinstance(v, QTensor) else v.to(torch.float32) for n, v in model.tensors()}


@pytest.mark.parametrize("model_type", FORMATS)
def test_what_was_written_is_read(model_type: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, path = written(model_type, tmp_path_factory)
    found = read(path)
    expected, got = values_of(model), decoded(found)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key
    assert {n for n, v in found.tensors() if isinstance(v, QTensor)} == {
        f"{site}.weight" for group in model.groups() for site in group.codes
    }
    config = model.source.config
    for key, value in found.config.items():
        if not key.endswith("token_id") and key not in (
            "architectures",
            "model_type",
            "num_kv_heads",
            "n_inner",
            "attention_bias",
            "mlp_bias",
        ):
            assert getattr(config, key, value) == value, key


def test_a_file_goes_through_qtensors_byte_for_byte(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every block type that rows of 64 allow, a coded embedding among them."""
    source = written("llama", tmp_path_factory).path
    write_again(source, tmp_path / "b.gguf", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
    write(open_low_bit(tmp_path / "b.gguf"), tmp_path / "c.gguf")
    before, after = ({t.name: t for t in GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in "bc")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.tensor_type == after[name].tensor_type, name
        assert tensor.data.tobytes() == after[name].data.tobytes(), name


def write_again(source: Path, out: Path, kinds: list[str]) -> None:
    """The same file with its matrices rounded to other types by the gguf package, its embedding to q8_0."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for i, t in enumerate(reader.tensors):
        if len(t.shape) == 1:
            writer.add_tensor(t.name, t.data)
            continue
        kind = GGMLQuantizationType["Q8_0" if "embd" in t.name else kinds[i % len(kinds)].upper()]
        values = quants.dequantize(t.data, t.tensor_type)
        writer.add_tensor(t.name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama3s_rotary_scaling_survives(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    model = family("llama", head_dim=64, num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope)
    write(model, tmp_path / "m.gguf")
    assert read(tmp_path / "m.gguf").config["rope_parameters"] == rope


def test_the_tokenizer_comes_back(llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(family("llama", root=llama), tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    read(tmp_path / "m.gguf").companions(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Three 3's: naïve \n\t x<|end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.bos_token_id, again.eos_token_id) == (0, 0)


# --- hostile files ---------------------------------------------------------------------------------------------------


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(*pairs: bytes, tensors: tuple[bytes, ...] = (), count: int | None = None) -> bytes:
    return (
        b"GGUF"
        + struct.pack("<IQQ", 3, len(tensors) if count is None else count, len(pairs))
        + b"".join(pairs + tensors)
    )


def info(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"GGUX" + bytes(40), "first bytes"),
        (header(count=1 << 60), "tensors and 0 values"),
        (header(string("a") + struct.pack("<IIQ", 9, 4, 1 << 19)), "reach beyond the end"),
        (header(string("a") + struct.pack("<IIQ", 9, 8, 1 << 60)), "an array of 1152921504606846976 entries"),
        (header(string("a") + struct.pack("<IIQ", 9, 0, 2_000_000) + bytes(2_000_000)), "an array of 2000000 entries"),
        (header(*[string(n) + struct.pack("<IIQ", 9, 0, 1 << 20) + bytes(1 << 20) for n in "abcde"]), "5242880 in all"),
        (header(string("a") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1)), "values of type 9"),
        (header(string("a") + struct.pack("<I", 77)), "a value of type 77"),
        (header(struct.pack("<Q", 1 << 40)), "reach beyond the end"),
        (header(string("general.alignment") + struct.pack("<II", 4, 0)), "alignment 0"),
        (header(tensors=(info("t", (1 << 63, 2), 0),)), "of shape"),
        (header(tensors=(info("t", (33,), 2),)), "of shape"),
        (header(tensors=(info("t", (32,), 999),)), "999"),
        (header(tensors=(info("t", (32,), 0, 8),)), "not aligned"),
        (header(tensors=(info("t", (1 << 20,), 0),)), "tensors end at byte"),
        (header(tensors=(info("t", (1,) * 9, 0),)), "of 9 dimensions"),
        (header(tensors=(info("t", (8,), 0), info("t", (8,), 0))) + bytes(64), "there twice"),
    ],
)  # fmt: skip
def test_a_header_is_held_against_the_file_before_it_is_believed(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="is no whole GGUF file") as caught:
        check_header(tmp_path / "m.gguf")
    assert why in str(caught.value)


def test_any_damage_is_refused_or_harmless(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written("llama", tmp_path_factory).path
    whole = path.read_bytes()
    start = GGUFReader(path).data_offset
    generator = np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(16):
        content = bytearray(whole)
        content[generator.integers(0, start)] ^= 1 << generator.integers(0, 8)
        damaged.write_bytes(content[: generator.integers(1, len(whole))] if generator.random() < 0.2 else content)
        try:
            read(damaged)
        except LowbitError:
            refused += 1
    assert refused > 5


def edit(path: Path, key: str, value: Any, out: Path) -> Path:
    """The same file with one number of its header replaced."""
    reader = GGUFReader(path)
    field = reader.fields[key]
    at = field.offset + 8 + len(key) + 4
    content = bytearray(path.read_bytes())
    packed = struct.pack("<f" if isinstance(value, float) else "<I", value)
    content[at : at + 4] = packed
    out.write_bytes(content)
    return out


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("llama.block_count", 1 << 19, "blocks of"),
        ("llama.block_count", 3, "is missing"),
        ("llama.embedding_length", 128, "not what tensors have"),
        ("llama.feed_forward_length", 95, "has shape"),
        ("llama.attention.head_count", 0, "llama.attention.head_count"),
        ("llama.attention.head_count_kv", 3, "blk.0.attn_k.weight: has shape"),
        ("llama.context_length", 1 << 31, "llama.context_length"),
        ("llama.rope.freq_base", float("nan"), "llama.rope.freq_base"),
    ],
)
def test_a_header_that_contradicts_its_tensors_is_refused(
    key: str, value: Any, why: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written("llama", tmp_path_factory).path
    with pytest.raises(CheckpointError, match=why):
        read(edit(path, key, value, tmp_path / "edited.gguf"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count", False),
        ("llama.attention.head_count", 2.0),
        ("llama.block_count", True),
        ("llama.rope.dimension_count", 15),
        ("llama.rope.dimension_count", 64),
        ("llama.rope.dimension_count", 16.0),
        ("llama.rope.freq_base", True),
        ("llama.rope.freq_base", 0.0),
        ("llama.attention.layer_norm_rms_epsilon", True),
        ("stablelm.use_parallel_residual", 1),
    ],
)
def test_a_value_is_of_the_type_that_its_key_has(
    key: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reader = GGUFReader(written(key.partition(".")[0], tmp_path_factory).path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    config_of(fields, shapes, None)
    with pytest.raises(CheckpointError, match=f"{key}: is "):
        config_of(fields | {key: value}, shapes, None)


def test_other_architectures_and_types_are_refused_by_name(tmp_path: Path) -> None:
    for arch, kind, why in (("mamba", "F32", "'mamba' is not read"), ("llama", "IQ2_XXS", "type IQ2_XXS is not read")):
        path = tmp_path / f"{arch}.gguf"
        writer = GGUFWriter(path, arch)
        raw = GGMLQuantizationType[kind]
        data = np.zeros((1, 66), np.uint8) if kind != "F32" else np.zeros((1, 256), np.float32)
        writer.add_tensor("token_embd.weight", data, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(CheckpointError, match=why):
            read(path)
