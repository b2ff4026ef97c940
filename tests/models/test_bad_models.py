"""Models that cannot be read: each is one clear error that names the file or layer, and no code of theirs runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import LowbitError, ModelError, WeightError
from lowbit.models import store
from lowbit.models.gguf import check
from lowbit.models.resolve import locate, open_model
from lowbit.models.source import of_directory
from lowbit.models.store import INDEX, Files, Memory, TensorStore, read_json, require_counts

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A model directory that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def shard(root: Path) -> None:
    """Split the weights of a directory into two shards with an index."""
    tensors = load_file(root / WEIGHTS)
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, root / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (root / WEIGHTS).unlink()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(root: Path) -> None:
    (root / WEIGHTS).rename(root / "pytorch_model.bin")


def cut(root: Path) -> None:
    data = (root / WEIGHTS).read_bytes()
    (root / WEIGHTS).write_bytes(data[: len(data) // 2])


def absurd_header(root: Path) -> None:
    (root / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def missing_shard(root: Path) -> None:
    shard(root)
    (root / "b.safetensors").unlink()


def index_leaves(root: Path) -> None:
    shard(root)
    edit(root / INDEX, weight_map={"x": "../model/a.safetensors"})


def index_hidden(root: Path) -> None:
    shard(root)
    edit(root / INDEX, weight_map={"x": ".."})


def index_without_map(root: Path) -> None:
    (root / INDEX).write_text("{}")


def config(text: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / "config.json").write_text(text)

    return damage


def pipe(name: str) -> Callable[[Path], None]:
    """A named pipe, which a reader would wait for."""

    def damage(root: Path) -> None:
        (root / name).unlink()
        os.mkfifo(root / name)

    return damage


def index_of_a_long_name(root: Path) -> None:
    (root / INDEX).write_text(json.dumps({"weight_map": {"x": "a" * 300}}))


def config_with(**changes: Any) -> Callable[[Path], None]:
    return lambda root: edit(root / "config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is no directory"),
        (lambda root: (root / "config.json").unlink(), r"config\.json: does not exist"),
        (lambda root: (root / WEIGHTS).unlink(), r"holds no model\.safetensors"),
        (pickled, "holds pickled weights only\nunpickling runs code"),
        (cut, r"model\.safetensors: cannot be read"),
        (absurd_header, r"model\.safetensors: cannot be read"),
        (missing_shard, r"the shard 'b\.safetensors' is missing"),
        (index_leaves, r"index\.json: names a file outside its directory: '\.\./model/a\.safetensors'"),
        (index_hidden, r"names a file outside its directory: '\.\.'"),
        (index_of_a_long_name, "the shard 'a+' is missing"),
        (pipe(WEIGHTS), r"holds no model\.safetensors"),
        (pipe("config.json"), r"config\.json: is no regular file"),
        (config('{"a": NaN}'), r"config\.json: is not JSON: NaN is no finite number"),
        (config('{"a": -Infinity}'), "is not JSON: -Infinity is no finite"),
        (config('{"a": 1e999}'), "is not JSON: 1e999 is no finite"),
        (config('{"a": "\\ud800"}'), "is not JSON: 'utf-8' codec"),
        (config(f'{{"a": {"1" * 5000}}}'), "is not JSON"),
        (index_without_map, r"index\.json: has no weight_map"),
        (config("{"), r"config\.json: is not JSON"),
        (config("[" * 100_000), r"config\.json: is not JSON"),
        (config("[]"), r"config\.json: is not a JSON object"),
        (config('{"model_type": "no-such"}'), "is no model that transformers knows"),
        (config('{"model_type": "t5"}'), "is no model that transformers knows"),
        (config_with(hidden_size="many"), "is no model that transformers knows"),
        (config_with(hidden_size=1 << 50), "is no model that transformers knows"),
        (config_with(auto_map={"AutoConfig": "evil.Config"}, model_type="own"), "code from model folders is never run"),
        (config_with(quantization_config={"quant_method": "lowbit"}), "is already a low-bit checkpoint"),
    ],
)
def test_a_directory_that_is_no_readable_model(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=message) as caught:
        of_directory(copy)
    assert "model" in str(caught.value)  # the directory is named


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776, the files hold 2 tensors"),
        ({"n_layer": 1e30}, r"n_layer is '1e\+30'"),
        ({"n_layers": True}, "n_layers is 'True'"),
        ({"num_layers": -1}, "num_layers is '-1'"),
        ({"text_config": {"num_hidden_layers": 3}}, "num_hidden_layers is 3"),
        ({"n_routed_experts": 9}, "n_routed_experts is 9"),
        ({"num_hidden_layers": 2, "num_experts": 8, "num_local_experts": None}, ""),  # eight slices of one tensor
    ],
)
def test_a_configuration_counts_no_more_than_its_files_hold(said: dict[str, Any], why: str) -> None:
    files = Memory({"experts": torch.zeros(8, 2), "norm": torch.zeros(2)})
    with pytest.raises(ModelError, match=why) if why else nullcontext():
        require_counts(said, files, "config.json")


def test_emoji_in_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": "\U0001f600"}))
    assert "ud83d" in (tmp_path / "a.json").read_text()
    assert read_json(tmp_path / "a.json") == {"a": "\U0001f600"}


def test_code_in_a_model_folder_is_not_run(copy: Path) -> None:
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Config: pass\n")
    edit(copy / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"})
    of_directory(copy)  # LLaMA is known without it
    assert not (copy / "ran").exists()


def test_shards_hold_the_same_model(copy: Path, llama: Path) -> None:
    shard(copy)
    a, b = of_directory(copy), of_directory(llama)
    for name in a.blocks:
        x, y = a.load(name, torch.float32).state_dict(), b.load(name, torch.float32).state_dict()
        assert all(torch.equal(x[key], y[key]) for key in x | y)
    assert a.digest != b.digest  # identity is that of bytes, and these are other files
    assert a.digest == of_directory(copy).digest


def test_a_missing_and_a_misshapen_weight_are_named(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    gone = tensors.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(tensors, copy / WEIGHTS)
    source = of_directory(copy)
    source.load(source.blocks[0], torch.float32)
    with pytest.raises(WeightError, match=r"'model\.layers\.1\.self_attn\.k_proj\.weight' is missing"):
        source.load(source.blocks[1], torch.float32)
    save_file(tensors | {"model.layers.1.self_attn.k_proj.weight": gone[:5].contiguous()}, copy / WEIGHTS)
    with pytest.raises(WeightError, match=r"k_proj\.weight: has shape \(5, 64\), the configuration says \(32, 64\)"):
        of_directory(copy).load(source.blocks[1], torch.float32)


def test_names(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ModelError, match="does not exist\nTry: a model directory"):
        locate(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="neither a directory nor a"):
        locate(str(llama / "config.json"))
    with pytest.raises(ModelError, match="neither here nor reachable on the hub"):
        locate("no-such-owner/no-such-model")
    assert open_model(str(llama)).name == "llama"


def test_a_directory_without_tokenizer_says_so(copy: Path) -> None:
    for path in copy.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        _ = of_directory(copy).tokenizer


def test_large_json_is_refused_before_it_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="is no regular file"):
        read_json(copy)
    monkeypatch.setattr(store, "_MAX_JSON", 100)
    with pytest.raises(ModelError, match="larger than"):
        read_json(copy / "config.json")


def test_stores_read_slices_and_name_what_is_missing(llama: Path) -> None:
    files = Files(llama)
    memory = Memory({name: files.get(name) for name in files.names()})
    name = "model.layers.0.mlp.up_proj.weight"
    stores: list[TensorStore] = [files, memory]
    for held in stores:
        assert held.shape(name) == (96, 64)
        assert torch.equal(held.get(name, 7), files.get(name)[7])
        with pytest.raises(WeightError, match="'nothing' is missing"):
            held.get("nothing")
    assert memory.nbytes() == sum(memory.get(n).numel() * 4 for n in memory.names())
    assert files.nbytes() == (llama / WEIGHTS).stat().st_size


def test_gguf_files_cut_short_are_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "whole.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((16, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check(path)
    data = path.read_bytes()
    for end in (0, 3, 10, 23, 30, 60, 120, 200, len(data) - 128, len(data) - 1):
        short = tmp_path / f"short-{end}.gguf"
        short.write_bytes(data[:end])
        with pytest.raises(ModelError, match=rf"short-{end}\.gguf: is no whole GGUF file") as caught:
            locate(str(short))
        assert isinstance(caught.value, LowbitError)
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"GGUF" + bytes(np.random.default_rng(0).integers(0, 256, 500, np.uint8)))
    with pytest.raises(ModelError, match=r"noise\.gguf: is no whole GGUF file"):
        locate(str(noise))
    with pytest.raises(ModelError, match="does not exist"):
        locate(str(tmp_path / "nowhere.gguf"))
