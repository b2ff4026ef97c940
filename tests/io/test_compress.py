"""Compressed files and directories: the same bytes back, the same model and identity meanwhile."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize as gguf_quantize
from safetensors import safe_open
from safetensors.torch import save_file

import lowbit
from lowbit import digest
from lowbit.codec.container import Reader, is_coded
from lowbit.codec.identity import of_decoded
from lowbit.errors import CheckpointError, ModelError, StorageError
from lowbit.io import native
from lowbit.io.compress import compress, decompress, execution_order
from lowbit.io.entropies import entropies
from lowbit.io.layout import read_shard
from lowbit.models import gguf
from lowbit.models.pretrained import from_directory
from lowbit.models.source import of_directory


def same_files(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A tiny model's directory in bfloat16."""
    from tiny import family_model

    model = family_model("llama", hidden_size=128, intermediate_size=256).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def test_a_model_directory_stays_the_model(half: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    told: list[tuple[str, int, int, str]] = []
    done = compress(half, out, lambda *update: told.append(update))
    assert sum(d.after for d in done) == sum(p.stat().st_size for p in out.iterdir())
    assert sum(d.after for d in done) < 0.72 * sum(d.before for d in done)
    assert told
    assert all(update[1] <= update[2] for update in told)
    before, after = of_directory(half), of_directory(out)
    assert after.digest == before.digest  # compressing a model does not change what it is
    assert after.store.nbytes() < 0.71 * before.store.nbytes()
    for name in before.store.names():
        assert torch.equal(before.store.get(name), after.store.get(name))
        assert before.store.shape(name) == after.store.shape(name)
        assert torch.equal(before.store.get(name, 1), after.store.get(name, 1))
    tokens = torch.arange(12)[None]
    models = [from_directory(root, torch.float32) for root in (half, out)]
    assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)
    assert models[0].generation_config == models[1].generation_config
    decompress(out, tmp_path / "back")
    assert same_files(half, tmp_path / "back")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint whose parts are large enough to shrink; read only."""
    from tiny import family_model
    from whole_runs import quantize

    folder = tmp_path_factory.mktemp("native")
    family_model("llama", hidden_size=128, intermediate_size=512, num_hidden_layers=2).save_pretrained(folder / "model")
    quantize(folder / "model", folder / "out", None, "rtn:int8-row")
    return folder / "out"


def test_a_native_checkpoint_stays_the_checkpoint(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    compress(finished, out)
    assert is_coded(out / "lowbit-block-00000.safetensors")
    assert (out / "lowbit.json").read_bytes() == (finished / "lowbit.json").read_bytes()
    native.verify(out)
    for shard in sorted(finished.glob("*.safetensors")):
        ours, theirs = read_shard(out / shard.name), read_shard(shard)
        assert {site: q.spec() for site, q in ours.codes.items()} == {
            site: q.spec() for site, q in theirs.codes.items()
        }
        for site, q in theirs.codes.items():
            assert torch.equal(q.decode(), ours.codes[site].decode())
    tokens = torch.arange(12)[None]
    expected = lowbit.load(finished, dtype=torch.float32)(tokens).logits
    assert torch.equal(from_directory(out, torch.float32)(tokens).logits, expected)
    decompress(out, tmp_path / "back")
    assert same_files(finished, tmp_path / "back")


def test_a_damaged_shard_of_a_compressed_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    compress(finished, tmp_path / "small")
    shard = tmp_path / "small" / "lowbit-block-00001.safetensors"
    with Reader(shard) as reader:
        name, entry = next((name, e) for name, e in reader.entries.items() if e.layout is not None)
        at = reader.begin + entry.begin + 9
    data = bytearray(shard.read_bytes())
    data[at] ^= 1
    shard.write_bytes(data)
    native.verify(tmp_path / "small", contents=False)
    for read in (native.verify, lambda root: read_shard(root / shard.name)):
        with pytest.raises(CheckpointError, match=rf"{shard.name}: {name}"):
            read(tmp_path / "small")


def test_another_shard_in_its_place_is_refused(finished: Path, tmp_path: Path) -> None:
    """A whole coded file, but not of what the manifest says."""
    out = tmp_path / "small"
    compress(finished, out)
    shard = finished / "lowbit-block-00001.safetensors"
    with safe_open(shard, framework="pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    codes = next(name for name in tensors if name.endswith("codes"))
    tensors[codes] = tensors[codes].flip(0)
    save_file(tensors, tmp_path / "other.safetensors", metadata=metadata)
    (out / shard.name).unlink()
    compress(tmp_path / "other.safetensors", out / shard.name)
    with pytest.raises(CheckpointError, match=r"its bytes do not have files\..*\.sha256|has \d+ bytes, files"):
        native.verify(out)


def gguf_file(path: Path) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    rng = np.random.default_rng(0)
    for name, kind in (("blk.0.attn_q.weight", "Q8_0"), ("blk.0.ffn_up.weight", "Q4_1"),
                       ("blk.1.attn_q.weight", "Q4_0"),
                       ("token_embd.weight", "Q5_1"), ("blk.1.ffn_up.weight", "Q5_0")):  # fmt: skip
        kind_of = GGMLQuantizationType[kind]
        data = gguf_quantize(rng.standard_normal((128, 256)).astype(np.float32), kind_of)
        writer.add_tensor(name, data, raw_dtype=kind_of)
    writer.add_tensor("output_norm.weight", np.ones(77, np.float32))
    for kind in ("Q4_K", "Q6_K", "Q2_K", "IQ4_XS"):  # the package cannot make these: any bytes will do
        size = {"Q4_K": 144, "Q6_K": 210, "Q2_K": 84, "IQ4_XS": 136}[kind]
        data = np.clip(rng.normal(100, 9, (64, size)), 0, 255).astype(np.uint8)
        writer.add_tensor(f"blk.2.{kind}.weight", data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_comes_back_whole(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "a.gguf")
    (done,) = compress(path, tmp_path / "b.gguf")
    assert {entry.dtype for entry in done.entries} == {
        "Q8_0", "Q4_1", "Q4_0", "Q5_1", "Q5_0", "F32", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS"
    }  # fmt: skip
    layouts = {entry.dtype: entry.layout for entry in done.entries}
    assert all(layouts[kind] == kind.lower() for kind in ("Q8_0", "Q4_K", "Q4_1")), layouts
    assert layouts["IQ4_XS"] == "bytes"
    assert done.after < done.before
    decompress(tmp_path / "b.gguf", tmp_path / "c.gguf")
    assert (tmp_path / "c.gguf").read_bytes() == path.read_bytes()
    assert of_decoded(tmp_path / "b.gguf") == digest.of_file(path)
    assert gguf.plain(tmp_path / "b.gguf").read_bytes() == path.read_bytes()
    assert gguf.plain(path) == path


def test_entropies_are_told_before_and_after(half: Path, tmp_path: Path) -> None:
    compress(half, tmp_path / "small")
    would, does = list(entropies(half)), list(entropies(tmp_path / "small"))
    assert [(t.name, t.layout) for t in would] == [(t.name, t.layout) for t in does]
    assert sum(t.stored for t in would) == pytest.approx(sum(t.stored for t in does), rel=0.01)
    name = "model.layers.0.mlp.up_proj.weight"
    exponent, noise = next(t.fields for t in does if t.name == name)
    weight = of_directory(half).store.get(name)
    _, exponents = torch.frexp(weight.float())
    counts = torch.unique(exponents[weight != 0], return_counts=True)[1].double()
    expected = float(-(counts / counts.sum() * (counts / counts.sum()).log2()).sum())
    assert exponent.entropy == pytest.approx(expected, abs=0.01)
    assert exponent.entropy < exponent.stored_bits < 1.1 * exponent.entropy
    assert (noise.codec, noise.stored_bits) == ("raw", 8.0)


def test_what_cannot_be_compressed(half: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing: does not exist"):
        compress(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("words")
    with pytest.raises(ModelError, match="holds nothing that could be compressed"):
        compress(tmp_path / "text", tmp_path / "out")
    (tmp_path / "a.safetensors").write_bytes(b"no such file")
    with pytest.raises(ModelError, match="is no safetensors or GGUF file"):
        compress(tmp_path / "a.safetensors", tmp_path / "out")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(30))
    with pytest.raises(ModelError, match="is no whole GGUF file"):
        compress(tmp_path / "a.gguf", tmp_path / "out")
    with pytest.raises(ModelError, match="holds nothing that could be decompressed"):
        decompress(half, tmp_path / "out")
    compress(half, tmp_path / "small")
    with pytest.raises(ModelError, match="is compressed already"):
        compress(tmp_path / "small", tmp_path / "out")
    with pytest.raises(StorageError, match="exists already"):
        compress(half, tmp_path / "small")
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name or "spool" in p.name]


def test_what_a_killed_run_left_is_cleared(half: Path, tmp_path: Path) -> None:
    left = tmp_path / "small.partial"
    (left / "deeper").mkdir(parents=True)
    (left / "model.safetensors.spool").write_bytes(bytes(100))
    compress(half, tmp_path / "small")
    decompress(tmp_path / "small", tmp_path / "back")
    assert same_files(half, tmp_path / "back")
    assert not left.exists()


def test_order_of_use() -> None:
    names = ["lm_head.weight", "model.norm.weight", "model.layers.10.self_attn.q_proj.weight",
             "model.layers.2.mlp.down_proj.weight", "model.layers.2.self_attn.v_proj.weight",
             "model.layers.2.self_attn.o_proj.weight", "model.layers.2.input_layernorm.weight",
             "model.layers.2.block_sparse_moe.experts.1.w1.weight",
             "model.layers.2.block_sparse_moe.experts.0.w2.weight",
             "model.layers.2.block_sparse_moe.gate.weight", "model.embed_tokens.weight"]  # fmt: skip
    short = [name.removesuffix(".weight").rpartition("layers.")[2] for name in execution_order(names)]
    assert short == [
        "model.embed_tokens", "2.input_layernorm", "2.self_attn.v_proj", "2.self_attn.o_proj",
        "2.block_sparse_moe.gate", "2.mlp.down_proj", "2.block_sparse_moe.experts.0.w2",
        "2.block_sparse_moe.experts.1.w1", "10.self_attn.q_proj", "model.norm", "lm_head",
    ]  # fmt: skip
    gguf_names = [
        "output.weight",
        "blk.1.ffn_norm.weight",
        "blk.1.attn_norm.weight",
        "blk.0.ffn_down.weight",
        "token_embd.weight",
    ]
    assert execution_order(gguf_names) == [gguf_names[i] for i in (4, 3, 2, 1, 0)]
