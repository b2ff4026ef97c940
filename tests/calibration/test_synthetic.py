"""Calibration without text, against transformers run without a cache, and what its windows must not hold."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import VOCAB, family_model
from transformers import AutoModelForCausalLM

from lowbit import digest
from lowbit.calibration import synthetic
from lowbit.calibration import text as texts
from lowbit.calibration.synthetic import (
    calibration_tokens,
    continued,
    distinct,
    identity,
    runnable,
    self_written,
    uniform,
    usable,
)
from lowbit.errors import CalibrationError, ModelError
from lowbit.models.resolve import open_model
from lowbit.models.source import of_model

TOKENS = torch.arange(1, 257)  # the bytes: 0 is special, the rows from 257 on have no token


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


def draws_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_writing_is_what_whole_passes_without_a_cache_say(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of a window against the distribution that transformers gives its prefix; any family."""
    monkeypatch.setattr(synthetic, "DISTINCT", 0.0)
    runs = runnable(open_model(str(family)), torch.float32)
    oracle = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()
    first, greedy, draws = torch.tensor([7, 99, 200]), torch.tensor([3, 4, 5]), draws_of(3, 12)
    ids = continued(runs, TOKENS, first, greedy, draws)
    assert torch.equal(ids[:, 0], first)
    with torch.no_grad():
        p = torch.softmax(oracle(input_ids=ids, use_cache=False).logits[..., TOKENS].double(), -1).numpy()
    for row in range(3):
        for t in range(1, 12):
            before, k = p[row, t - 1], int(ids[row, t]) - 1
            if t < greedy[row]:
                assert before[k] == pytest.approx(before.max(), rel=1e-3)
            else:  # the draw lies within the token's part of the cumulated distribution
                assert before[:k].sum() - 1e-4 <= draws[row, t] <= before[: k + 1].sum() + 1e-4


def test_a_runnable_model_holds_tied_weights_once_and_computes_the_same(families: dict[str, Path]) -> None:
    for name in ("mistral", "falcon", "mixtral"):  # the first two are tied
        ours = runnable(open_model(str(families[name])), torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(families[name], dtype=torch.float32).eval()
        assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == (name != "mixtral")
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
        ids = torch.arange(1, 20)[None]
        with torch.no_grad():
            torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_sampled_tokens_have_the_model_s_frequencies(model: Any) -> None:
    rows = 2000
    first = torch.full((rows,), 42)
    found = continued(model, TOKENS, first, torch.ones(rows, dtype=torch.int64), draws_of(rows, 2))[:, 1]
    with torch.no_grad():
        p = torch.softmax(model(input_ids=first[:1, None]).logits[0, -1, TOKENS].double(), -1).numpy()
    counts = np.bincount(found.numpy() - 1, minlength=256)
    rare = p * rows < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(p[~rare], p[rare].sum()) * rows
    assert scipy.stats.chisquare(observed, expected).pvalue > 0.01


def test_windows_depend_on_the_seed_and_not_on_the_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = self_written(model, TOKENS, 5, 12, 3)
    assert ids.shape == (5, 12)
    monkeypatch.setattr(synthetic, "_BATCH", 3)
    told: list[tuple[int, int]] = []
    assert torch.equal(self_written(model, TOKENS, 5, 12, 3, lambda done, total: told.append((done, total))), ids)
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((3, 5 * 12), (5 * 12, 5 * 12))
    assert not torch.equal(self_written(model, TOKENS, 5, 12, 4), ids)
    assert len(set(ids[:, 0].tolist())) == 5  # every window starts from another token
    few = torch.tensor([5, 6])
    assert self_written(model, few, 3, 3, 0)[:, 0].sort().values.tolist() in ([5, 5, 6], [5, 6, 6])


def test_memory_is_bounded_by_fewer_windows_at_a_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = 24 * 2 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, their size, bytes
    monkeypatch.setattr(synthetic, "CACHE_LIMIT", 3 * one + one // 2)
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda m, a, k: sizes.append(len(k["input_ids"])), with_kwargs=True)
    try:
        self_written(model, TOKENS, 5, 24, 0)
    finally:
        handle.remove()
    assert sizes == [1] + 23 * [3] + 23 * [2]


@pytest.fixture(scope="module")
def looping() -> Any:
    """A model whose head is its embedding, and which is therefore rather sure that a token comes again."""
    model = family_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(3)
    return model


def test_the_guard_keeps_windows_from_running_in_circles(looping: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A15.3, against a model whose every window ends in a loop."""
    guarded = self_written(looping, TOKENS, 4, 64, 0)
    for window in guarded:
        assert distinct(window[None]) >= 0.8
    monkeypatch.setattr(synthetic, "DISTINCT", 0.0)
    free = self_written(looping, TOKENS, 4, 64, 0)
    assert distinct(free) < 0.6
    shared = (guarded == free).int().cumprod(1).sum(1)  # nothing changes before the first circle is closed
    assert int(shared.min()) > 4


def test_what_does_not_loop_is_left_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = self_written(model, TOKENS, 3, 32, 0)
    monkeypatch.setattr(synthetic, "DISTINCT", 0.0)
    assert torch.equal(self_written(model, TOKENS, 3, 32, 0), ids)


def test_distinct_ngrams_are_counted_as_by_hand() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])  # 1234 twice, 2345, 2346
    assert distinct(ids) == 3 / 4
    assert distinct(torch.ones(2, 8, dtype=torch.int64)) == 1 / 10
    assert distinct(ids, 2) == 5 / 8


def test_special_unnamed_and_placeholder_tokens_are_not_used(tokenizer: Any) -> None:
    assert torch.equal(usable(tokenizer, VOCAB), TOKENS)
    assert torch.equal(usable(tokenizer, 100), TOKENS[:99])  # no row of the model, no token

    special, plain = SimpleNamespace(special=True), SimpleNamespace(special=False)
    vocab = {"<eos>": 0, "<unused7>": 1, "[unused3]": 2, "<|reserved_special_token_9|>": 3, "<|im_end|>": 4,
             "<br>": 5, "unused": 6, "<0x0A>": 7, "beyond": 8}  # fmt: skip
    other = SimpleNamespace(
        all_special_ids=[0], added_tokens_decoder={4: special, 5: plain}, get_vocab=lambda: vocab
    )  # fmt: skip
    assert usable(other, 8).tolist() == [5, 6, 7]
    with pytest.raises(CalibrationError, match="names no token of text"):
        usable(other, 5)


def test_random_tokens_are_uniform_and_seeded() -> None:
    ids = uniform(TOKENS, 64, 256, 0)
    assert scipy.stats.chisquare(np.bincount(ids.flatten() - 1, minlength=256)).pvalue > 0.001
    assert torch.equal(ids, uniform(TOKENS, 64, 256, 0))
    assert not torch.equal(ids, uniform(TOKENS, 64, 256, 1))


def test_a_recipe_names_its_tokens(llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    source = open_model(str(llama))
    path = tmp_path / "t.txt"
    path.write_text("some text " * 50)
    read = calibration_tokens(source, str(path), samples=3, length=16, seed=0)
    known = texts.sample(texts.read(str(path), "calibration"), tokenizer, 3, 16, 0)
    assert (read.digest, read.text, read.text_digest) == (known.digest, known.text, known.text_digest)
    assert read.text_digest == identity(str(path), source.digest)
    made = {name: calibration_tokens(source, name, samples=3, length=16, seed=0) for name in texts.SYNTHETIC}
    for name, tokens in made.items():
        assert (tokens.text, tokens.seed, tuple(tokens.ids.shape)) == (name, 0, (3, 16))
        assert torch.isin(tokens.ids, TOKENS).all()
        assert tokens.text_digest == identity(name, source.digest) != identity(name, "another model")
    assert made["self"].digest != made["random"].digest
    in_memory = of_model(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))
    again = calibration_tokens(in_memory, "self", samples=3, length=16, seed=0, tokenizer=tokenizer)
    assert torch.equal(again.ids, made["self"].ids)


def test_what_was_written_is_remembered_and_checked(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    source = open_model(str(llama))
    told: list[int] = []

    def ask(seed: int) -> torch.Tensor:
        told.clear()
        return calibration_tokens(
            source, "self", samples=2, length=8, seed=seed, on_tokens=lambda done, total: told.append(done)
        ).ids

    first = ask(0)
    assert told == [2 * t for t in range(1, 9)]
    (memo,) = (tmp_path / "synthetic").iterdir()
    assert torch.equal(ask(0), first)
    assert not told
    memo.write_bytes(memo.read_bytes()[:-1] + b"\x01")  # damaged: written again
    assert torch.equal(ask(0), first)
    assert told
    assert torch.equal(ask(0), first)
    assert not told
    ask(1)
    assert len(list((tmp_path / "synthetic").iterdir())) == 2
    monkeypatch.setenv("LOWBIT_CACHE", str(memo / "no folder"))
    assert torch.equal(ask(0), first)  # a cache that cannot be written costs time, nothing else


def test_what_cannot_be_made(llama: Path, model: Any) -> None:
    source = open_model(str(llama))
    with pytest.raises(CalibrationError, match="self: windows that are drawn need a seed"):
        calibration_tokens(source, "self", samples=1, length=8, seed=None)
    with pytest.raises(CalibrationError, match="windows of 129 tokens, the model reads at most 128"):
        calibration_tokens(source, "random", samples=1, length=129, seed=0)
    with pytest.raises(ModelError, match="has no tokenizer"):
        calibration_tokens(of_model(model), "self", samples=1, length=8, seed=0)
    for name in texts.SYNTHETIC:
        with pytest.raises(CalibrationError, match=f"{name!r} is no text"):
            texts.read(name, "evaluation")
    with pytest.raises(CalibrationError, match="all 1 tokens would repeat"):
        self_written(model, torch.tensor([5]), 1, 32, 0)
    broken = family_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[9, 0] = math.nan
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        self_written(broken, TOKENS, 1, 4, 0)


def test_a_model_that_keeps_nothing_between_tokens_is_refused(model: Any) -> None:
    def forget(module: Any, arguments: Any, out: Any) -> Any:
        return SimpleNamespace(logits=out.logits, past_key_values=None)

    handle = model.register_forward_hook(forget)
    try:
        with pytest.raises(ModelError, match="keeps no keys and values"):
            self_written(model, TOKENS, 1, 8, 0)
    finally:
        handle.remove()


def test_a_file_called_self_is_still_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("words")
    assert texts.read("./self", "calibration").content == "words"
    assert identity("./self", "") == digest.of_bytes(b"words")
