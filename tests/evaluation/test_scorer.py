"""The Scorer against full logits in float64; what it refuses; what its identity knows."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, VOCAB, family_model

import lowbit
from lowbit.errors import EvidenceError, ModelError
from lowbit.evaluation import scorer as scoring
from lowbit.evaluation.head import Head
from lowbit.evaluation.metrics.perplexity import log_perplexity
from lowbit.evaluation.protocol import Windows, parse
from lowbit.evaluation.scorer import Scorer
from lowbit.formats.heads import CacheFormat
from lowbit.runtime.facade import use_kernels
from lowbit.runtime.kvcache import KVCache
from tests.evaluation.conftest import KINDS, log_probs, tiny_model


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def low_bit(kind: str) -> Any:
    return lowbit.quantize(tiny_model(kind), "rtn:int4-g32")


def scored(values: torch.Tensor, windows: Windows) -> np.ndarray:
    """What belongs to the predictions of scored tokens, in order: (windows, length, ...) to (tokens, ...)."""
    rows = [v[first - 1 : -1] for v, first in zip(values, windows.first.tolist(), strict=True)]
    return torch.cat(rows).numpy()


def near(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("protocol", ["windows-40", "llamacpp-40", "sliding-40-15"])
def test_every_column_is_what_full_logits_say(
    kind: str, protocol: str, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "ROWS", 16)  # several pieces a window, the last one ragged
    windows = parse(protocol).cut(windows.ids.flatten(), 4, "random", "digest")
    original, candidate = tiny_model(kind), low_bit(kind)
    reference = Scorer(original, "original").reference(windows)
    tokens, _ = Scorer(candidate, "candidate", batch=3).score(windows, reference)

    log_p, log_q = log_probs(original, windows.ids), log_probs(candidate, windows.ids)
    p, q = scored(log_p, windows), scored(log_q, windows)
    target = np.concatenate([row[f:].numpy() for row, f in zip(windows.ids, windows.first.tolist(), strict=True)])
    n = np.arange(len(target))
    near(tokens.nll_ref, -p[n, target])
    near(tokens.nll, -q[n, target])
    near(tokens.kl, (np.exp(p) * (p - q)).sum(-1))
    near(tokens.top1_p, np.exp(q.max(-1)))
    two = np.exp(np.sort(p, axis=-1)[:, -2:])
    near(tokens.margin_ref, two[:, 1] - two[:, 0])
    own = np.exp(np.sort(q, axis=-1)[:, -2:])
    assert tokens.margin is not None
    near(tokens.margin, own[:, 1] - own[:, 0])
    near(tokens.entropy_ref, -(np.exp(p) * p).sum(-1))
    np.testing.assert_array_equal(tokens.top1_ref, p.argmax(-1))
    np.testing.assert_array_equal(tokens.top1, q.argmax(-1))
    np.testing.assert_array_equal(tokens.token, target)
    assert tokens.kl.min() >= 0
    assert tokens.kl.mean() > 1e-4
    near(np.array(log_perplexity(tokens).estimate), np.array(-q[n, target].mean()))
    near(reference.tokens.nll, -p[n, target])
    near(reference.tokens.top1_p, two[:, 1])


def test_places_say_where_every_token_was() -> None:
    windows = parse("sliding-8-3").cut(torch.arange(20), None, "text", "digest")
    tokens = Scorer(tiny_model("llama"), "w").reference(windows).tokens
    assert tokens.pos.tolist() == [1, 2, 3, 4, 5, 6, 7] + 4 * [5, 6, 7]
    assert tokens.chunk.tolist() == [0] * 7 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert tokens.token.tolist() == list(range(1, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_beside_itself_differs_by_exactly_nothing(kind: str, dtype: torch.dtype, windows: Windows) -> None:
    scorer = Scorer(tiny_model(kind).to(dtype), "w", batch=2)
    reference = scorer.reference(windows)
    tokens, provenance = scorer.score(windows, reference)
    assert not reference.tokens.kl.any()
    assert tokens.identical
    np.testing.assert_array_equal(tokens.margin, tokens.margin_ref)  # type: ignore[arg-type]
    np.testing.assert_array_equal(reference.tokens.margin, tokens.margin_ref)  # type: ignore[arg-type]
    assert provenance == reference.provenance
    assert provenance.dtype == str(dtype).removeprefix("torch.")


def test_batches_of_one_and_three_agree(windows: Windows) -> None:
    original, candidate = tiny_model("llama"), low_bit("llama")
    reference = Scorer(original, "original").reference(windows)
    one, _ = Scorer(candidate, "candidate").score(windows, reference)
    three, _ = Scorer(candidate, "candidate", batch=3).score(windows, reference)
    for name, column in one.columns().items():
        np.testing.assert_allclose(three.columns()[name], column, rtol=1e-5, atol=1e-6, err_msg=name)


def test_progress_counts_every_token(windows: Windows) -> None:
    scorer, seen = Scorer(tiny_model("llama"), "w"), []
    reference = scorer.reference(windows, seen.append)
    assert sum(seen) == windows.scored
    scorer.score(windows, reference, seen.append)
    assert sum(seen) == 2 * windows.scored


def test_a_failure_in_between_leaves_autograd_as_it_was(windows: Windows) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Scorer(tiny_model("llama"), "w").reference(windows, stop)
    assert not torch.is_inference_mode_enabled()


def test_a_wrong_reference_is_refused(windows: Windows) -> None:
    scorer = Scorer(tiny_model("llama"), "w")
    reference = scorer.reference(windows)
    others = [
        parse("llamacpp-40").cut(windows.ids.flatten(), None, "random", "digest of random"),
        replace(windows, ids=windows.ids.flip(0)),
        replace(windows, ids=windows.ids[:3], first=windows.first[:3]),
    ]
    for other in others:
        with pytest.raises(EvidenceError, match="other tokens"):
            scorer.score(other, reference)
    smaller = replace(reference, head=replace(reference.head, weight=reference.head.weight[:-1]))
    with pytest.raises(EvidenceError, match=f"{VOCAB} and {VOCAB - 1}"):
        scorer.score(windows, smaller)


class Doubled(torch.nn.Module):
    """An output layer that is no linear map of what it reads."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, self.inner = inner.weight, inner.bias, inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).square()  # type: ignore[no-any-return]


def test_a_model_whose_logits_are_made_otherwise_is_refused(windows: Windows) -> None:
    model = tiny_model("llama")
    model.lm_head = Doubled(model.lm_head)
    for work in (lambda s: s.reference(windows), lambda s: s.log_likelihoods([([1, 2], [3])])):
        with pytest.raises(ModelError, match="LlamaForCausalLM"):
            work(Scorer(model, "w"))


def test_the_head_computes_the_models_own_logits(kind: str, windows: Windows) -> None:
    model = tiny_model(kind)
    head = Head.of(model, windows.ids[:1])
    assert (head.cap, head.scale) == {"gemma2": (3.0, 1.0), "granite": (None, 0.25)}.get(kind, (None, 1.0))


def test_the_identity_knows_everything_that_changes_a_number() -> None:
    model = low_bit("llama")
    same = Scorer(model, "w").identity
    assert Scorer(copy.deepcopy(model), "w").identity == same
    other_kernels, other_attention = copy.deepcopy(model), copy.deepcopy(model)
    use_kernels(other_kernels, "reference")
    other_attention.set_attn_implementation("eager")
    identities = [
        same, Scorer(model, "v").identity, Scorer(model, "w", batch=2).identity,
        Scorer(copy.deepcopy(model).bfloat16(), "w").identity, Scorer(other_kernels, "w").identity,
        Scorer(other_attention, "w").identity, *(Scorer(model, "w", chunk=n).identity for n in (4, 5)),
        *(Scorer(model, "w", chunk=4, kv=kv).identity for kv in (INT4, CacheFormat("int4-head", "int8-head"))),
        Scorer(lowbit.quantize(tiny_model("llama"), "rtn:int4-g32+a:int8-token"), "w").identity,
    ]  # fmt: skip
    assert len(set(identities)) == len(identities)


SEQUENCES = [
    ([5, 6, 7], [8, 9]),
    ([5, 6, 7], [8, 10]),  # the same input, another last token
    ([5], [6]),
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], [10]),
    ([1, 2, 3, 4, 5, 6, 7, 8], [9, 10]),  # the same input, split elsewhere
    ([11], list(range(12, 60))),
]


@pytest.mark.parametrize("batch", [1, 4])
def test_log_likelihoods_are_those_of_full_logits(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "ROWS", 16)
    model = tiny_model(kind)
    said = int(log_probs(model, torch.tensor([[5, 6, 7]]))[0, -1].argmax())
    sequences = [*SEQUENCES, ([5, 6, 7], [said])]
    found = Scorer(model, "w", batch=batch).log_likelihoods(sequences)
    for (context, continuation), (values, greedy) in zip(sequences, found, strict=True):
        log_p = log_probs(model, torch.tensor([context + continuation]))[0, len(context) - 1 : -1]
        near(values.numpy(), log_p[torch.arange(len(continuation)), continuation].numpy())
        assert greedy == (log_p.argmax(-1).tolist() == continuation)
    assert found[-1][1]
    assert not all(greedy for _, greedy in found)


def test_log_likelihoods_of_nothing() -> None:
    scorer = Scorer(tiny_model("llama"), "w")
    assert scorer.log_likelihoods([]) == []
    for sequence in (([], [1]), ([1], [])):
        with pytest.raises(EvidenceError, match="no tokens"):
            scorer.log_likelihoods([([1], [2]), sequence])


# --- through the cache -----------------------------------------------------------------------------------------------

INT4 = CacheFormat.parse("int4-head")
BY_PARTS = CacheFormat.parse("int2-channel4:int4-head,sink=1,window=3")


@pytest.mark.parametrize("name", FAMILIES)
def test_in_chunks_every_family_says_what_it_says_in_one_pass(name: str, windows: Windows) -> None:
    """Windows of 40 tokens; Mistral's attention slides over 24."""
    model, three = family_model(name), replace(windows, ids=windows.ids[:3], first=windows.first[:3])
    reference = Scorer(model, "w").reference(three)
    for chunk, batch in ((1, 3), (7, 2), (64, 1)):
        tokens, provenance = Scorer(model, "w", batch=batch, chunk=chunk).score(three, reference)
        np.testing.assert_allclose(tokens.nll, reference.tokens.nll, rtol=0, atol=1e-4)
        assert tokens.kl.max() < 1e-4
        assert provenance.protocol == f"windows-40/chunk-{chunk}"
    assert reference.provenance.protocol == "windows-40"


@pytest.mark.parametrize(("kv", "chunk"), [(INT4, 16), (BY_PARTS, 16), (BY_PARTS, 3)])
def test_a_kv_format_is_what_the_models_own_logits_say_through_it(
    kv: CacheFormat, chunk: int, windows: Windows
) -> None:
    model, windows = tiny_model("llama"), replace(windows, ids=windows.ids[:2], first=windows.first[:2])
    reference = Scorer(model, "w").reference(windows)
    tokens, _ = Scorer(model, "w", batch=2, kv=kv, chunk=chunk).score(windows, reference)
    found = []
    for row in windows.ids:
        cache = KVCache(model.config, kv)
        with torch.inference_mode():
            parts = [model(part[None], past_key_values=cache).logits for part in row.split(chunk)]
        found.append(torch.log_softmax(torch.cat(parts, dim=1).double(), dim=-1))
    q, p = scored(torch.cat(found), windows), scored(log_probs(model, windows.ids), windows)
    np.testing.assert_allclose(tokens.nll, -q[np.arange(len(q)), tokens.token], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tokens.kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-3, atol=1e-4)
    assert tokens.kl.mean() > 1e-2


def test_a_chunk_matters_only_to_formats_that_keep_recent_tokens_raw(windows: Windows) -> None:
    model, windows = tiny_model("llama"), replace(windows, ids=windows.ids[:, :24])
    reference = Scorer(model, "w").reference(windows)

    def kl(kv: CacheFormat, chunk: int) -> float:
        return float(Scorer(model, "w", batch=5, kv=kv, chunk=chunk).score(windows, reference)[0].kl.mean())

    assert kl(INT4, 2) == pytest.approx(kl(INT4, 24), rel=1e-3)
    assert kl(BY_PARTS, 1) < 0.9 * kl(BY_PARTS, 24)


def test_log_likelihoods_go_through_the_cache_too() -> None:
    model = tiny_model("llama")
    plain, rounded = Scorer(model, "w", batch=4, chunk=2), Scorer(model, "w", batch=4, kv=INT4, chunk=2)
    for (whole, _), (found, _) in zip(
        Scorer(model, "w").log_likelihoods(SEQUENCES), plain.log_likelihoods(SEQUENCES), strict=True
    ):
        near(found.numpy(), whole.numpy())
    changed = torch.cat([values for values, _ in rounded.log_likelihoods(SEQUENCES)])
    assert float((changed - torch.cat([v for v, _ in plain.log_likelihoods(SEQUENCES)])).abs().max()) > 1e-2


def test_a_kv_format_needs_a_chunk() -> None:
    with pytest.raises(EvidenceError, match=r"no cache is ever read[\s\S]*chunk-64"):
        Scorer(tiny_model("llama"), "w", kv=INT4)
    with pytest.raises(EvidenceError, match="a chunk of 0 tokens"):
        Scorer(tiny_model("llama"), "w", chunk=0)
