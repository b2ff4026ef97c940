"""Whole GGUF files: read by transformers, by the gguf package, and by definition; and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType, dequantize
from gguf_models import family, values_of, written
from huggingface_hub import metadata_load, metadata_save

from lowbit.errors import ExportError, StorageError
from lowbit.formats.qtensor import Affine, Raw
from lowbit.io.gguf.card import write_card
from lowbit.io.gguf.tokenizer import write_tokenizer
from lowbit.io.gguf.write import unfit, write
from lowbit.io.importing import import_low_bit
from lowbit.io.opening import Group, open_low_bit
from lowbit.io.storage import partial_file

Arrays = dict[str, np.ndarray]


def tensors(path: Path) -> Arrays:
    """Every tensor as the gguf package decodes it."""
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize("model_type", ["llama", "bloom", "falcon"])
def test_transformers_reads_the_same_model_from_the_file(
    model_type: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoModelForCausalLM

    model, path = written(model_type, tmp_path_factory)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state, expected = loaded.state_dict(), values_of(model)
    assert expected.keys() <= state.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    for key in ("num_attention_heads", "hidden_size", "rope_parameters", "tie_word_embeddings"):
        assert getattr(loaded.config, key, None) == getattr(model.source.config, key, None)


def test_heads_of_gpt_neox_lie_as_queries_then_keys_then_values(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, path = written("gpt_neox", tmp_path_factory)
    held, values = tensors(path), values_of(model)
    for kind in ("weight", "bias"):
        fused = values[f"gpt_neox.layers.1.attention.query_key_value.{kind}"].numpy().reshape(4, 3, 16, -1)
        expected = np.concatenate([fused[:, i].reshape(64, -1) for i in range(3)])
        assert np.array_equal(held[f"blk.1.attn_qkv.{kind}"].reshape(192, -1), expected)


def test_gpt2s_transposed_weights_and_gemmas_norms(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, path = written("gpt2", tmp_path_factory)
    held, values = tensors(path), values_of(model)
    assert held["blk.0.ffn_up.weight"].shape == (256, 64)
    assert np.array_equal(held["blk.0.ffn_up.weight"], values["transformer.h.0.mlp.c_fc.weight"].numpy())
    assert np.array_equal(held["position_embd.weight"], values["transformer.wpe.weight"].numpy())
    model, path = written("gemma", tmp_path_factory)
    held, values = tensors(path), values_of(model)
    assert np.array_equal(held["blk.1.attn_norm.weight"], 1 + values["model.layers.1.input_layernorm.weight"].numpy())


def test_experts_of_a_layer_are_one_tensor(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, path = written("mixtral", tmp_path_factory)
    reader = GGUFReader(path)
    held, values = tensors(path), values_of(model)
    for e in range(4):
        both = values[f"model.layers.1.mlp.experts.{e}.gate_up_proj.weight"].numpy()
        assert np.array_equal(held["blk.1.ffn_gate_exps.weight"][e], both[:96])
        assert np.array_equal(held["blk.1.ffn_up_exps.weight"][e], both[96:])
        assert np.array_equal(
            held["blk.1.ffn_down_exps.weight"][e], values[f"model.layers.1.mlp.experts.{e}.down_proj.weight"].numpy()
        )
    assert {t.tensor_type.name for t in reader.tensors if "exps" in t.name} == {"Q4_0"}
    assert {t.tensor_type.name for t in reader.tensors if "gate_inp" in t.name} == {"F32"}
    assert reader.fields["llama.expert_count"].contents() == 4


def test_a_checkpoint_becomes_a_file_and_says_what_the_file_cannot(finished: Path, tmp_path: Path) -> None:
    model = open_low_bit(finished)
    write(model, tmp_path / "m.gguf")
    held = tensors(tmp_path / "m.gguf")
    expected = values_of(model)["model.layers.0.mlp.down_proj.weight"].numpy()
    assert np.array_equal(held["blk.0.ffn_down.weight"], expected)
    reader = GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    with pytest.raises(StorageError, match="exists"):
        write(model, tmp_path / "m.gguf")
    windowed = family("mistral")
    assert "to the last 24" in write(windowed, tmp_path / "w.gguf")[0]


def test_license_and_languages_survive_the_way_there_and_back(finished: Path, tmp_path: Path) -> None:
    said = {
        "name": "Tiny", "license": "other", "license_name": "tiny-1.0", "license_link": "LICENSE", "size_label": "1M",
        "language": ["en", "de"], "tags": ["birds"],
    }  # fmt: skip

    def companions(folder: Path) -> None:
        metadata_save(folder / "README.md", {**said, "model-index": [{"name": "x"}], "version": 1.5})

    write(replace(open_low_bit(finished), companions=companions), tmp_path / "m.gguf")
    import_low_bit(open_low_bit(tmp_path / "m.gguf"), tmp_path / "i")
    assert metadata_load(tmp_path / "i" / "README.md") == {**said, "version": "1.5"}
    write(open_low_bit(tmp_path / "i"), tmp_path / "n.gguf")
    one, other = (
        {k: f.contents() for k, f in GGUFReader(tmp_path / name).fields.items() if k.startswith("general.")}
        for name in ("m.gguf", "n.gguf")
    )
    assert one == other
    assert one["general.license.name"] == "tiny-1.0"
    assert one["general.languages"] == ["en", "de"]
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    told = Recorder()
    assert "does not say the model's license" in write_card(told, tmp_path, "m")[0]
    assert told.told == {"string": "m"}


def test_what_a_killed_export_left_is_removed(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    child = os.fork()
    if child == 0:
        with partial_file(out, shared=True) as partial:
            partial.write_bytes(b"GGUF")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left, writing, other = (tmp_path / f"m.gguf.{name}.partial" for name in (child, 1, "x"))
    assert left.read_bytes() == b"GGUF"
    other.touch()
    with writing.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write(open_low_bit(finished), out)
    assert sorted(tmp_path.iterdir()) == sorted([out, writing, other])


def test_only_linears_that_no_block_type_has_are_unfit() -> None:
    model = family("mixtral")
    site = "model.layers.1.mlp.experts.2.down_proj"

    def groups() -> Iterator[Group]:
        for group in model.groups():
            codes = {s: replace(q, scale=Raw.of(q.scale.decode() * 1.0001)) if s == site else q
                     for s, q in group.codes.items() if isinstance(q, Affine)}  # fmt: skip
            yield replace(group, codes=codes)

    expected = {f"model.layers.1.mlp.experts.{e}.down_proj" for e in range(4)}  # one tensor, one type
    assert unfit(replace(model, groups=groups)) == expected


def test_kinds_choose_the_type_and_dense_ones_decode(tmp_path: Path) -> None:
    model = family("llama", "nf4")
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.q_proj: Lookup .*no ggml block type") as caught:
        write(model, tmp_path / "m.gguf")
    assert "gguf:f16" in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()
    write(model, tmp_path / "m.gguf", "f32")
    expected = values_of(model)["model.layers.0.mlp.up_proj.weight"].numpy()
    assert np.array_equal(tensors(tmp_path / "m.gguf")["blk.0.ffn_up.weight"], expected)
    with pytest.raises(ExportError, match="did you mean 'q4_0'"):
        write(model, tmp_path / "n.gguf", "q40")


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("opt", {}, "llama.cpp does not run them"),
        ("qwen2", {}, "have no names in this table"),
        ("falcon", {"alibi": True}, "alibi is True"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    model_type: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=why):
        write(family(model_type, **changes), tmp_path / "m.gguf")


class Recorder:
    """What a GGUFWriter is told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.told.__setitem__(name.removeprefix("add_"), values[-1])


def test_sentencepieces_order_of_merges_is_that_of_scores(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {"<unk>": 0, "<s>": 1, "<0x41>": 2, "▁": 3, "a": 4, "b": 5, "ab": 6, "▁a": 7, "▁ab": 8}
    inner = Tokenizer(models.BPE(vocab, [("a", "b"), ("▁", "a"), ("▁", "ab")], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens([AddedToken("<s>", special=True)])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    recorder = Recorder()
    assert write_tokenizer(recorder, tmp_path, 10) == []
    told = recorder.told
    assert (told["tokenizer_model"], told["add_space_prefix"], told["bos_token_id"]) == ("llama", True, 1)
    scores = dict(zip(told["token_list"], told["token_scores"], strict=True))
    assert scores["ab"] > scores["▁a"] > scores["▁ab"] > scores["a"]
    types = dict(zip(told["token_list"], told["token_types"], strict=True))
    assert (types["<s>"], types["<0x41>"], types["[PAD9]"]) == (TokenType.CONTROL, TokenType.BYTE, TokenType.UNUSED)


def test_a_pre_tokenizer_without_a_name_is_a_warning(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.BPE({"a": 0}, []))
    for pre, name, warns in (
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)], "smollm", 1),
        ([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)], "default", 2),
    ):
        inner.pre_tokenizer = pre_tokenizers.Sequence(pre)
        inner.save(str(tmp_path / "tokenizer.json"))
        recorder = Recorder()
        assert len(write_tokenizer(recorder, tmp_path, 1)) == warns  # one is that it has no merges
        assert recorder.told["tokenizer_pre"] == name
    inner.model = models.WordLevel({"a": 0}, "a")
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ExportError, match="type WordLevel"):
        write_tokenizer(Recorder(), tmp_path, 1)
