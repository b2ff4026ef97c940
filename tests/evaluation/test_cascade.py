"""Cascades: the token gate against generation without any cache, thresholds against brute force and fresh items."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import family_model

from lowbit.cli import main
from lowbit.errors import EvidenceError, ModelError, RecipeError
from lowbit.evaluation import cascade as gate
from lowbit.evaluation.cascade import Gated
from lowbit.evaluation.metrics.base import Tokens
from lowbit.formats.heads import CacheFormat
from lowbit.runtime.cascade import Decided, Reader, cascade, kept
from lowbit.runtime.kvcache import KVCache

PROMPT = [5, 9, 200, 31, 77]


def noisy(model: Any, scale: float = 0.3) -> Any:
    """A stand-in for a low-bit version: every matrix moved at random."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in twin.parameters():
            if p.ndim == 2:
                p.add_(scale * p.std() * torch.randn(p.shape, generator=generator))
    return twin


@torch.inference_mode()
def by_hand(low: Any, high: Any, margin: float, steps: int) -> list[Decided]:
    """The cascade without caches: both models read the whole text at every token."""
    text, found = list(PROMPT), []
    for _ in range(steps):
        logits = [m(input_ids=torch.tensor([text])).logits[0, -1].float() for m in (low, high)]
        first, second = torch.softmax(logits[0], -1).sort(descending=True).values[:2].tolist()
        escalated = first - second < margin
        token = int(logits[1 if escalated else 0].argmax())
        found.append(Decided(token, first - second, escalated))
        text.append(token)
        if token == 0:
            break
    return found


@pytest.mark.parametrize("kind", ["bloom", "mistral"])
def test_the_gate_writes_what_it_would_without_caches(kind: str) -> None:
    high = family_model(kind)
    low = noisy(high)
    steps = 30  # beyond mistral's window of 24
    expected = by_hand(low, high, 0.05, steps)
    found = list(cascade(low, high, PROMPT, margin=0.05, max_new_tokens=steps))
    assert [(d.token, d.escalated) for d in found] == [(d.token, d.escalated) for d in expected]
    assert [d.margin for d in found] == pytest.approx([d.margin for d in expected], abs=1e-5)
    assert 0 < sum(d.escalated for d in found) < len(found)


def test_thresholds_at_the_ends_are_the_two_models_alone() -> None:
    high = family_model("llama")
    low = noisy(high)
    ids = torch.tensor([PROMPT])
    for margin, alone in ((0.0, low), (1.1, high)):
        tokens = [d.token for d in cascade(low, high, PROMPT, margin=margin, max_new_tokens=20)]
        expected = alone.generate(ids, max_new_tokens=20, do_sample=False)[0, len(PROMPT) :].tolist()
        assert tokens == expected
    by_high = kept(high, PROMPT, tokens)
    assert all(by_high)
    changed = [*tokens[:3], (tokens[3] + 1) % 288, *tokens[4:]]
    assert kept(high, PROMPT, changed)[:4] == [True, True, True, False]


def test_the_original_reads_what_it_missed_in_one_pass() -> None:
    model = family_model("llama")
    reader = Reader(model)
    text = list(PROMPT)
    reader.next(text)
    text += [3, 4, 5, 6, 7]
    with torch.inference_mode():
        whole = model(input_ids=torch.tensor([text])).logits[0, -1]
    torch.testing.assert_close(reader.next(text), whole, atol=1e-5, rtol=0)
    assert (reader.passes, reader.read, reader.cache.get_seq_length()) == (2, 10, 10)


def test_a_low_bit_cache_is_the_low_bit_models_alone() -> None:
    model = family_model("llama")
    cache = KVCache(model.config, CacheFormat.parse("int2-head"))
    alone = KVCache(model.config, CacheFormat.parse("int2-head"))
    tokens = [d.token for d in cascade(model, model, PROMPT, margin=0.0, max_new_tokens=6, low_cache=cache)]
    expected = model.generate(torch.tensor([PROMPT]), past_key_values=alone, max_new_tokens=6, do_sample=False)
    assert tokens == expected[0, len(PROMPT) :].tolist()
    asked = list(cascade(model, model, PROMPT, margin=1.1, max_new_tokens=6, low_cache=alone.__class__(
        model.config, CacheFormat.parse("int2-head"))))  # fmt: skip
    plain = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False)[0, len(PROMPT) :].tolist()
    assert [d.token for d in asked] == plain  # the original's own cache is not rounded


def test_what_cannot_be_a_cascade_is_refused() -> None:
    model = family_model("llama")
    with pytest.raises(RecipeError, match="empty prompt"):
        next(cascade(model, model, [], margin=0.1, max_new_tokens=1))
    with pytest.raises(RecipeError, match="a margin of -1"):
        next(cascade(model, model, PROMPT, margin=-1.0, max_new_tokens=1))
    with pytest.raises(ModelError, match="288 and 300 tokens"):
        next(cascade(model, family_model("llama", vocab_size=300), PROMPT, margin=0.1, max_new_tokens=1))


def simulated(n: int, seed: int) -> Gated:
    """Items that change where the margin is small."""
    rng = np.random.default_rng(seed)
    margin = rng.random(n)
    return Gated(margin, (rng.random(n) > 0.5 * (1 - margin) ** 4).astype(float), np.ones(n), np.arange(n))


def test_the_curve_and_the_choice_equal_brute_force() -> None:
    g = simulated(400, 0)
    for point in gate.curve(g, (0.0, 0.1, 0.5, 1.0)):
        escalated = g.margin < point.margin
        assert point.escalated.estimate == pytest.approx(escalated.mean())
        assert point.outcome.estimate == pytest.approx(np.where(escalated, 1, g.low).mean())
    assert point.outcome.estimate == 1
    assert point.cost(0.25, 1.0) == 1.25
    chosen = gate.choose(g, 0.97).chosen
    half = np.isin(g.cluster, np.random.default_rng(0).permutation(np.unique(g.cluster))[:200])
    margin, low = g.margin[half], g.low[half]
    least = min(t for t in [0.0, *np.nextafter(margin, 2)] if np.where(margin < t, 1, low).mean() >= 0.97)
    assert (margin < chosen.margin).sum() == (margin < least).sum()
    with pytest.raises(EvidenceError, match="no margin reaches"):
        gate.choose(g._replace(high=np.zeros(400)), 0.97)


def test_tokens_go_by_the_candidates_own_margin() -> None:
    n, rng = 600, np.random.default_rng(0)
    margin, kept = rng.random(n).astype(np.float32), rng.random(n) < 0.8
    zero, chunk = np.zeros(n), np.repeat(np.arange(30), 20)
    columns = dict.fromkeys(("nll", "nll_ref", "kl", "top1_p", "entropy_ref", "margin_ref", "token"), zero)
    columns |= {"doc": zero, "chunk": chunk, "pos": np.tile(np.arange(20), 30), "top1": kept, "top1_ref": np.ones(n)}
    gated = gate.of_tokens(Tokens.of(columns | {"margin": margin}))
    point = gate.at(gated, 0.3)
    assert point.escalated.estimate == pytest.approx((margin < np.float32(0.3)).mean())
    assert point.outcome.estimate == pytest.approx(((margin < np.float32(0.3)) | kept).mean())
    assert point.outcome.clusters == 30
    with pytest.raises(EvidenceError, match="own margin"):
        gate.of_tokens(Tokens.of(columns))


def test_the_half_that_chose_is_flattered_and_the_other_is_not() -> None:
    own, fresh, truth = [], [], []
    big = simulated(20_000, 99)
    for seed in range(100):
        found = gate.choose(simulated(300, seed), 0.97, seed=seed)
        real = np.where(big.margin < found.chosen.margin, 1, big.low).mean()
        own.append(found.chosen.outcome.estimate - real)
        fresh.append(found.reported.outcome.estimate - real)
        truth.append(found.reported.outcome.low <= real <= found.reported.outcome.high)
    assert np.mean(own) > 0.003
    assert abs(np.mean(fresh)) < 3 * np.std(fresh) / 10
    assert np.mean(truth) > 0.9


def test_the_command_writes_through_the_gate_and_refuses_what_is_none(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: str) -> tuple[int, str, str]:
        common = ["lowbit", "generate", str(llama), "-p", "Bird", "-n", "5", "--raw", "--dtype", "float32", "--json"]
        monkeypatch.setattr(sys, "argv", [*common, *args])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capsys.readouterr()

    code, plain, _ = run()
    code, gated, _ = run("--cascade", f"{llama},margin=1")
    found = json.loads(gated)
    assert code == 0
    assert found["text"] == json.loads(plain)["text"]  # both are the one model
    assert found["cascade"] == {
        "reference": str(llama), "margin": 1.0, "escalated": 1.0, "kept": 1.0, "first_change": None
    }  # fmt: skip
    code, _, err = run("--cascade", "x,limit=3")
    assert code == 1
    assert "no cascade 'x,limit=3'" in err
    code, _, err = run("--cascade", str(llama), "--temperature", "0.5")
    assert code == 1
    assert "--cascade goes with greedy text" in err
