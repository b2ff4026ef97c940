"""What tokens are drawn from, against transformers' own processors; and the text of tokens as they come."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers.generation import logits_process as theirs

from lowbit.errors import ModelError, RecipeError
from lowbit.runtime.detokenize import Stops, TextStream
from lowbit.runtime.sampling import Sampler, Sampling

LOGITS = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 2
PROMPT = (3, 5, 5, 9)


def expected(logits: torch.Tensor, how: Sampling, ids: list[int]) -> torch.Tensor:
    """Probabilities as transformers makes them, all prior tokens being a prompt."""
    chain: list[Any] = [theirs.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)]
    chain.append(theirs.TemperatureLogitsWarper(how.temperature))
    if how.top_k:
        chain.append(theirs.TopKLogitsWarper(how.top_k))
    chain.append(theirs.TopPLogitsWarper(how.top_p))
    chain.append(theirs.MinPLogitsWarper(how.min_p))
    scores = logits[None].clone()
    for step in chain:
        scores = step(torch.tensor([ids]), scores)
    return torch.softmax(scores[0], -1)


@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=0.7), Sampling(temperature=1.5, top_k=7), Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=2.0, top_k=20, top_p=0.5, min_p=0.2, repetition_penalty=1.8),
        Sampling(temperature=1.0, top_p=1e-6), Sampling(temperature=1.0, min_p=1.0, repetition_penalty=0.5),
    ],
)  # fmt: skip
def test_what_is_left_is_what_transformers_leaves(how: Sampling) -> None:
    sampler = Sampler(how, PROMPT)
    found = torch.zeros(60)
    ids, weights = sampler.candidates(sampler.adjusted(LOGITS))
    found[ids] = weights / weights.sum()
    torch.testing.assert_close(found, expected(LOGITS, how, list(PROMPT)), rtol=1e-5, atol=1e-7)


def test_draws_have_these_frequencies_and_follow_the_seed() -> None:
    how = Sampling(temperature=1.0, top_k=6, seed=11)
    sampler = Sampler(how)
    draws = [sampler.draw(LOGITS) for _ in range(1000)]
    p = expected(LOGITS, how, [0]).numpy().astype(np.float64)
    at = np.flatnonzero(p)
    counts = Counter(draws)
    assert set(counts) <= set(at.tolist())
    assert chisquare([counts[i] for i in at.tolist()], p[at] / p.sum() * len(draws)).pvalue > 1e-3
    again, other, unseeded = Sampler(how), Sampler(Sampling(1.0, top_k=6, seed=12)), Sampler(Sampling(1.0, top_k=6))
    assert [again.draw(LOGITS) for _ in range(40)] == draws[:40]
    assert [other.draw(LOGITS) for _ in range(40)] != draws[:40]
    assert [unseeded.draw(LOGITS) for _ in range(40)] != draws[:40]


def test_penalties_count_what_was_written() -> None:
    """OpenAI's formula: logit - count x frequency - (count > 0) x presence; and a bias comes first."""
    sampler = Sampler(Sampling(frequency_penalty=0.75, presence_penalty=0.5, logit_bias=((4, 9.0),)), PROMPT)
    first = int((LOGITS + torch.eye(60)[4] * 9).argmax())
    assert [sampler.draw(LOGITS) for _ in range(2)] == [first, first] == [4, 4]
    wanted = LOGITS.clone()
    wanted[4] += 9.0 - 2 * 0.75 - 0.5
    torch.testing.assert_close(sampler.adjusted(LOGITS), wanted)


def test_what_means_nothing_is_refused() -> None:
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": float("nan")},
                {"logit_bias": ((1, float("inf")),)}):  # fmt: skip
        with pytest.raises(RecipeError):
            Sampling(**bad)
    for how in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(ModelError, match="not finite"):
            Sampler(how).draw(LOGITS * float("nan"))
    with pytest.raises(RecipeError, match="names token 60 of 60"):
        Sampler(Sampling(logit_bias=((60, 1.0),))).draw(LOGITS)


def best_seconds(work: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(5))


def test_a_token_is_cheap_whatever_was_asked_for() -> None:
    """The engine's thread does this for every request at every token."""
    sampler = Sampler(Sampling(logit_bias=((3, 2.0), *((i % 60, 1.0) for i in range(20_000)), (3, -2.0))))
    assert best_seconds(lambda: sampler.adjusted(LOGITS)) < 0.01
    torch.testing.assert_close(sampler.adjusted(LOGITS), LOGITS + torch.tensor([334.0] * 20 + [333.0] * 40))
    stops = Stops(["a" * 900, *("b" * i for i in range(740, 804))])
    stops.push("a" * 800)
    assert best_seconds(lambda: stops.push("a")) < 0.004


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.text(max_size=12) | st.text("aé€𝄞\N{REPLACEMENT CHARACTER}", max_size=12), st.integers(0, 8))
def test_bytes_become_whole_characters(tokenizer: Any, text: str, prompt: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, ids[:prompt])
    pieces = [stream.push(i) for i in ids[prompt:]]
    whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:prompt]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert "".join(pieces) + stream.finish() == whole[len(before) :]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_bytes_that_are_no_text_come_out_in_the_end(tokenizer: Any) -> None:
    """An endless run of broken characters is not held back for ever."""
    broken = [i for i in range(1, 257) if tokenizer.decode([i]) == "\N{REPLACEMENT CHARACTER}"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(broken[0]) for _ in range(50)]
    assert sum(map(len, pieces)) >= 30
    assert len("".join(pieces) + stream.finish()) == 50


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text("ab", max_size=14), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_string_ends_the_text_however_it_is_cut(text: str, strings: list[str], data: Any) -> None:
    whole = text
    for end in range(1, len(text) + 1):  # the first to be complete; of several, the longest
        if found := [s for s in strings if text[:end].endswith(s)]:
            whole = text[: end - max(map(len, found))]
            break
    stops, out = Stops(strings), ""
    rest = text
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        out += stops.push(rest[:n])
        rest = rest[n:]
        assert whole.startswith(out)
    assert stops.found == (whole != text or any(text.endswith(s) for s in strings if s))
    assert (out + stops.finish()) == whole
