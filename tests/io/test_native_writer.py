"""Writing a native checkpoint: it loads, equals its source with decoded weights, resumes after any kill, one writer."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import family_model, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_runs import LINE, quantize

import lowbit
from lowbit.errors import CheckpointError, StorageError
from lowbit.io import native, storage
from lowbit.io.native import Writer, qtensors, verify
from lowbit.models.graph import set_matrix, split_experts
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import parse


def fork(work: Callable[[], object]) -> int:
    """Do some work in a child process; the signal that ended it, 0 when it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def compared(out: Path) -> dict[str, bytes]:
    """The files that two runs of the same work must have byte for byte."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix == ".safetensors" or p.name == "config.json"}


def test_what_every_family_becomes_computes_with_the_decoded_weights(
    family: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(family, out, tokens)
    reference = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()
    split_experts(reference)
    codes = dict(qtensors(out))
    for site, q in codes.items():
        set_matrix(reference.get_submodule(site), q.decode())
    loaded = lowbit.load(out, dtype=torch.float32, kernels="reference")
    by_transformers = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        scale = float(expected.abs().max())
        torch.testing.assert_close(by_transformers(tokens).logits, expected, rtol=0, atol=1e-4 * scale)
    assert (
        AutoTokenizer.from_pretrained(out)("text")["input_ids"]
        == AutoTokenizer.from_pretrained(family)("text")["input_ids"]
    )
    held = json.loads((out / "lowbit.json").read_text())
    assert {r["site"] for r in held["sites"]} == codes.keys()
    assert held["note"] == "test"
    assert held["source"] == of_directory(family).digest
    assert sum(r["nbytes"] for r in held["sites"]) == sum(q.nbytes for q in codes.values())


def test_the_directory_holds_the_documented_files_only(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "generation_config.json", "lowbit.json", "model.safetensors.index.json",
        "lowbit-block-00000.safetensors", "lowbit-block-00001.safetensors", "lowbit-rest.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_the_same_work_again_is_done_already(finished: Path, llama: Path, tokens: torch.Tensor) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}
    assert quantize(llama, finished, tokens)
    with Writer(finished, of_directory(llama), parse(LINE), "the tokens") as sink:
        assert sink.finish({}) == finished
    assert {p.name: p.stat().st_mtime_ns for p in finished.iterdir()} == before


# Nine files make a result of two blocks: the marker, two reports, two shards, the rest, index, manifest, config.json.
KILLS = [*((k, False) for k in range(1, 10)), (2, True), (3, True), (9, True)]


@pytest.mark.parametrize(("commit", "late"), KILLS)
def test_killed_anywhere_the_same_call_goes_on_to_the_same_bytes(
    commit: int, late: bool, finished: Path, llama: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """SIGKILL just before or just after the n-th file gets its name."""
    out, rename, count = tmp_path / "out", Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        count += self.name.endswith(".partial")
        if count == commit and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        moved = rename(self, target)
        if count == commit:
            os.kill(os.getpid(), signal.SIGKILL)
        return moved

    def run() -> None:
        Path.replace = replace  # type: ignore[method-assign]
        quantize(llama, out, tokens)

    assert fork(run) == signal.SIGKILL
    assert not (out / "config.json").exists() or (commit, late) == (9, True)
    assert quantize(llama, out, tokens) == ((commit, late) == (9, True))
    assert compared(out) == compared(finished)
    assert {p.name for p in out.iterdir()} == {p.name for p in finished.iterdir()}
    verify(out)


def test_metadata_is_written_in_one_order(tmp_path: Path) -> None:
    metadata = {f"key {i}": 'ä\x1f\\"\n\u2028' * i for i in range(8)}
    for i in range(6):
        storage.write_tensors(tmp_path / str(i), {"x": torch.arange(3)}, metadata)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(6)}) == 1
    with safe_open(tmp_path / "0", framework="pt") as f:
        assert f.metadata() == metadata
        assert torch.equal(f.get_tensor("x"), torch.arange(3))


def test_a_run_without_statistics_resumes_too(llama: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    quantize(llama, whole, None, "rtn:int4-g32")

    def run() -> None:
        Writer.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
        quantize(llama, out, None, "rtn:int4-g32")

    assert fork(run) == signal.SIGKILL
    quantize(llama, out, None, "rtn:int4-g32")
    assert compared(out) == compared(whole)


def test_two_processes_on_one_output(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    out, source = tmp_path / "out", of_directory(llama)
    ready, ready_end = os.pipe()
    release, release_end = os.pipe()
    child = os.fork()
    if child == 0:
        sink = Writer(out, source, parse(LINE), "the tokens")
        os.write(ready_end, b"1")
        os.read(release, 1)
        sink.close()
        os._exit(0)
    os.read(ready, 1)
    try:
        with pytest.raises(StorageError, match=rf"{out}: another process is writing here"):
            quantize(llama, out, tokens)
    finally:
        os.write(release_end, b"1")
        os.waitpid(child, 0)
        for end in (ready, ready_end, release, release_end):
            os.close(end)
    assert not quantize(llama, out, tokens)  # it has let go


def test_a_lock_file_removed_by_its_last_owner_guards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = storage.Lock(tmp_path)
    plain, opened = storage.fcntl.flock, []

    def flock(file: Any, how: int) -> None:
        opened.append(file)
        if len(opened) == 1:
            first.release()  # between this process's open and its lock
        plain(file, how)

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    second = storage.Lock(tmp_path)
    assert len(opened) == 2
    monkeypatch.setattr(storage.fcntl, "flock", plain)
    with pytest.raises(StorageError, match="another process"):
        storage.Lock(tmp_path)
    second.release()
    second.release()
    assert not list(tmp_path.iterdir())


def test_other_work_is_not_mixed_in(finished: Path, llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    source, recipe = of_directory(llama), parse(LINE)
    out = tmp_path / "out"
    Writer(out, source, recipe, "the tokens").close()
    others = [
        (of_directory(llama.parent / "mistral"), recipe, "the tokens", torch.float32),
        (source, parse("gptq:int3-g32,damp=0.2,clip=0"), "the tokens", torch.float32),
        (source, recipe, "other tokens", torch.float32),
        (source, recipe, "the tokens", torch.bfloat16),
    ]
    for other in others:
        with pytest.raises(StorageError, match="unfinished run of another recipe, model or text"):
            Writer(out, *other)
        with pytest.raises(StorageError, match="holds another model"):
            Writer(finished, *other)
    assert {p.name for p in out.iterdir()} == {native.WORK}
    Writer(out, source, recipe, "the tokens").close()


def test_foreign_directories_are_left_alone(llama: Path, tmp_path: Path) -> None:
    source, recipe = of_directory(llama), parse("rtn:int8-row")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StorageError, match="full: is not empty"):
        Writer(tmp_path / "full", source, recipe, None)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(StorageError, match="file: cannot be written"):
        Writer(tmp_path / "file", source, recipe, None)
    with pytest.raises(StorageError, match="holds another model"):
        Writer(llama, source, recipe, None)
    assert not (llama / storage.LOCK).exists()


@pytest.mark.parametrize("fails", [2, 3])
def test_a_full_disk_keeps_what_is_finished(
    fails: int, finished: Path, llama: Path, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain, calls = tmp_path / "out", storage.save_file, []

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        calls.append(path)
        if len(calls) == fails:
            path.write_bytes(b"half")  # as much as there was room for
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", save)
        with pytest.raises(StorageError, match="the disk is full\nfinished blocks are kept\nTry: make room"):
            quantize(llama, out, tokens)
    assert len(list(out.glob("*.safetensors"))) == fails - 1
    assert not list(out.glob("*.partial"))
    quantize(llama, out, tokens)
    assert compared(out) == compared(finished)


def test_a_finished_block_that_was_damaged_is_named_on_resume(
    llama: Path, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", lambda *_: None)
        quantize(llama, out, tokens)
    block = out / "lowbit-block-00000.safetensors"
    block.write_bytes(block.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"lowbit-block-00000\.safetensors: cannot be read.*\n.*remove it"):
        quantize(llama, out, tokens)


def test_values_too_large_for_float16_become_bfloat16(tmp_path: Path, tokenizer: Any) -> None:
    model = family_model("opt")
    model.model.decoder.layers[0].fc1.bias.data[0] = 1e6
    root, out = save_model(model, tokenizer, tmp_path / "model"), tmp_path / "out"
    quantize(root, out, None, "rtn:int8-row")
    loaded = lowbit.load(out, dtype=torch.float32).state_dict()
    assert loaded["model.decoder.layers.0.fc1.bias"][0] == torch.tensor(1e6).bfloat16().float()
    assert torch.equal(loaded["model.decoder.layers.1.fc1.bias"], model.model.decoder.layers[1].fc1.bias)


def test_stored_buffers_go_along(tmp_path: Path, tokenizer: Any, tokens: torch.Tensor) -> None:
    sizes = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    model = family_model(
        "deepseek_v3", first_k_dense_replace=1, moe_intermediate_size=32, num_key_value_heads=4, **sizes, **experts
    )
    bias = torch.arange(8.0) / 3  # no number of 16 bits
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(bias)
    root, out = save_model(model, tokenizer, tmp_path / "model"), tmp_path / "out"
    quantize(root, out, None, "rtn:int8-row")
    split_experts(model)
    for site, q in qtensors(out):
        set_matrix(model.get_submodule(site), q.decode())
    loaded = lowbit.load(out, dtype=torch.float32, kernels="reference")
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
