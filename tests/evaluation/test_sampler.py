"""The sampler study: draws against their distribution, common random numbers, likelihoods, gaps and verdicts."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import family_model

from lowbit.errors import EvidenceError
from lowbit.evaluation import hypotheses as hyp
from lowbit.evaluation import sampler
from lowbit.evaluation.metrics import generations as gen
from lowbit.evaluation.sampler import Grid, Setting
from lowbit.evaluation.statistics import paired_mean
from lowbit.formats.heads import CacheFormat
from lowbit.runtime.kvcache import KVCache

PROMPTS = [[5, 9, 200], [31, 77, 4, 8]]


def noisy(model: Any, scale: float) -> Any:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(twin.parameters()):
            p.add_(scale * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return twin


def test_draws_follow_the_distribution_and_top_k_keeps_k() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    u = torch.from_numpy(sampler.uniforms(0, 0, 20_000))
    p = sampler.warped(logits, Setting(0.7, 5))
    expected = torch.softmax(logits.double() / 0.7, -1)[0]
    best = expected.topk(5).indices
    assert torch.allclose(p[0, best], expected[best] / expected[best].sum())
    drawn = sampler.draw(p.expand(len(u), -1), u).numpy()
    counts = np.bincount(drawn, minlength=12)
    assert not counts[p[0].numpy() == 0].any()
    kept = counts > 0
    assert stats.chisquare(counts[kept], p[0].numpy()[kept] * len(u)).pvalue > 1e-3
    assert sampler.draw(p, torch.ones(1, dtype=torch.float64)).item() == int(p[0].nonzero().max())
    assert sampler.warped(logits, Setting(0.0))[0].argmax() == logits.argmax()


def test_a_cell_is_what_a_loop_without_cache_or_batch_writes() -> None:
    model = family_model("llama")
    grid = Grid.of([0.0, 0.8], [None, 7], [3, 4], 9)
    written = sampler.write(model, model, PROMPTS, grid)
    setting, row = Setting(0.8, 7), 3  # prompt 1, seed 4
    texts, u = written[setting], sampler.uniforms(1, 4, 9)
    text, nll = list(PROMPTS[1]), []
    with torch.inference_mode():
        for j in range(int(texts.length[row])):
            logits = model(input_ids=torch.tensor([text])).logits[:, -1]
            p = sampler.warped(logits, setting)[0].numpy()
            token = int(np.searchsorted(p.cumsum(), u[j], side="right"))
            nll.append(-float(torch.log_softmax(logits.double(), -1)[0, token]))
            text.append(token)
    assert texts.token[row][: len(nll)].tolist() == text[4:]
    assert texts.nll[row][: len(nll)] == pytest.approx(nll, abs=1e-4)
    assert (texts.prompt.tolist(), texts.seed.tolist()) == ([0, 0, 1, 1], [3, 4, 3, 4])
    greedy = written[Setting(0.0)].token
    expected = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=9, do_sample=False)[0, 3:].tolist()
    assert greedy[0][greedy[0] != gen.END].tolist() == expected
    assert list(written) == [Setting(0.0), Setting(0.8), Setting(0.8, 7)]  # at 0 there is one top-k


def test_costs_count_what_was_run_and_only_that() -> None:
    model = family_model("llama")
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: passes.append(kwargs["input_ids"].shape[1]),
                                             with_kwargs=True)  # fmt: skip
    started = time.perf_counter()
    cost = sampler.timed(model, PROMPTS[1], 8)
    seconds = time.perf_counter() - started
    handle.remove()
    assert passes == [4] + [1] * 8
    assert (cost.prompt_tokens, cost.decode_tokens) == (4, 8)
    assert cost.cache_bytes == 2 * 2 * 2 * 16 * 12 * 4  # layers, k and v, heads, head, tokens, float32
    assert 0 < cost.prefill_seconds < seconds - cost.decode_seconds < seconds
    assert cost.decode_rate == pytest.approx(8 / cost.decode_seconds)
    assert cost.peak_bytes > sampler.static_bytes(model)
    with pytest.raises(EvidenceError, match="nothing to time"):
        sampler.timed(model, PROMPTS[1], 0)


def test_shared_numbers_keep_texts_together_until_the_models_part() -> None:
    model = family_model("llama")
    near, far, grid = noisy(model, 0.001), noisy(model, 0.3), Grid.of([0.7], [None], range(8), 12)
    ours, close, other = (sampler.write(m, model, PROMPTS, grid)[Setting(0.7)] for m in (model, near, far))
    agree = [float((gen.divergence(ours, t).position - 1).mean()) for t in (close, other)]
    assert agree[0] > agree[1] + 3
    longer = sampler.write(model, model, PROMPTS, Grid.of([0.7], [None], range(8), 16))[Setting(0.7)]
    assert np.array_equal(longer.first(12).token, ours.token)
    with torch.inference_mode():  # what the reference makes of another's text
        text = torch.tensor([[*PROMPTS[0], *other.token[0][: other.length[0]].tolist()]])
        log_p = torch.log_softmax(model(input_ids=text).logits[0].double(), -1)
    expected = [-float(log_p[2 + j, text[0, 3 + j]]) for j in range(int(other.length[0]))]
    assert other.nll_ref[0][: len(expected)] == pytest.approx(expected, abs=1e-4)


def test_gaps_are_scipys_and_vanish_for_a_model_and_itself() -> None:
    model = family_model("llama")
    low, text = noisy(model, 0.1), [5, 9, 200, 31]
    settings = [Setting(0.0), Setting(0.5), Setting(1.0), Setting(1.0, 10)]
    found = sampler.gaps(model, low, text, settings)
    with torch.inference_mode():
        a, b = (m(input_ids=torch.tensor([text])).logits[0].double() for m in (model, low))
    p, q = (torch.softmax(x / 0.5, -1).numpy() for x in (a, b))
    assert found[Setting(0.5)].kl == pytest.approx([stats.entropy(x, y) for x, y in zip(p, q, strict=True)])
    assert found[Setting(0.5)].total_variation == pytest.approx(0.5 * np.abs(p - q).sum(1))
    assert found[Setting(0.0)].total_variation.tolist() == (a.argmax(-1) != b.argmax(-1)).double().tolist()
    assert np.isfinite(found[Setting(1.0, 10)].kl).all()
    later = sampler.gaps(model, low, text, settings, start=2)
    assert np.array_equal(later[Setting(0.5)].kl, found[Setting(0.5)].kl[2:])
    same = sampler.gaps(model, model, text, settings)
    assert not any(g.kl.any() or g.total_variation.any() for g in same.values())


def test_a_low_bit_cache_is_written_through_and_counted() -> None:
    model = family_model("llama")
    grid = Grid.of([0.0], [None], [0], 8)
    kv = CacheFormat.parse("int4-head")
    written = sampler.write(model, model, PROMPTS[:1], grid, make_cache=lambda m: KVCache(m.config, kv))
    cache = KVCache(model.config, kv)
    ids = model.generate(torch.tensor(PROMPTS[:1]), past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert written[Setting(0.0)].token[0].tolist() == ids[0, 3:].tolist()
    assert sampler.timed(model, PROMPTS[0], 7, lambda m: KVCache(m.config, kv)).cache_bytes == cache.nbytes
    assert sampler.static_bytes(model) == sum(p.nbytes for p in [*model.parameters(), *model.buffers()])


def test_grids_that_mean_nothing_are_refused() -> None:
    for bad in (([-1.0], [None], [0], 4), ([1.0], [0], [0], 4), ([1.0], [None], [], 4), ([1.0], [None], [0], 0)):
        with pytest.raises(EvidenceError, match="no sampler grid"):
            Grid.of(*bad)
    with pytest.raises(EvidenceError, match="empty prompt"):
        sampler.write(family_model("llama"), family_model("llama"), [[]], Grid.of([0.0], [None], [0], 1))


def test_verdicts_say_what_the_evidence_shows_and_no_more() -> None:
    rng = np.random.default_rng(0)

    def measured(mean: float, n: int = 40) -> Any:
        return paired_mean(mean + rng.normal(0, 1, n), np.arange(n))

    within = hyp.Hypothesis("alike", "", "within", 0.5)
    above = hyp.Hypothesis("more", "", "above")
    cases = [(within, 0.0, "supported"), (within, 2.0, "contradicted"), (above, 1.0, "supported"),
             (above, -1.0, "contradicted"), (above, 0.0, "undecided")]  # fmt: skip
    judged = hyp.judge([hyp.Measured(h, measured(mean)) for h, mean, _ in cases])
    assert [j.verdict for j in judged] == [verdict for _, _, verdict in cases]
    with pytest.raises(EvidenceError, match="within what"):
        hyp.judge([hyp.Measured(hyp.Hypothesis("same", "", "within"), measured(0))])


def test_slowest_is_judged_by_its_nearest_rival_and_a_band_by_its_prompts() -> None:
    rng = np.random.default_rng(1)
    rates = {"int8": 5 + rng.random(8), "nf4": 20 + rng.random(8), "fp4": 21 + rng.random(8)}
    found = hyp.extremal(rates, "int8")
    nearest = hyp.worst(found, "below")
    expected = np.log(rates["int8"]) - np.log(rates["nf4"])
    assert nearest.estimate == pytest.approx(expected.mean())
    assert hyp.judge([hyp.Measured(hyp.CLAIMS.slowest, nearest, 2)])[0].verdict == "supported"
    values = {t: rng.normal(0.1 * (0.5 <= t <= 0.8), 0.05, 30) for t in (0.2, 0.5, 0.8, 1.2)}
    inside = (values[0.5] + values[0.8]) / 2 - (values[0.2] + values[1.2]) / 2
    assert hyp.sensitivity(values, (0.5, 0.8)).estimate == pytest.approx(inside.mean())
    with pytest.raises(EvidenceError, match="outside"):
        hyp.sensitivity({0.5: values[0.5]}, (0.5, 0.8))


def test_independent_means_compare_as_welch_or_wider() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(1, 1, 8), rng.normal(0, 2, 6)
    found = hyp.unpaired(*(paired_mean(x, np.arange(len(x))) for x in (a, b)))
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert found.estimate / found.se == pytest.approx(welch.statistic)
    interval = welch.confidence_interval()
    assert found.low < interval.low < interval.high < found.high
    assert found.high == pytest.approx(found.estimate + stats.t.ppf(0.975, 5) * found.se)
