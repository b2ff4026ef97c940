"""Shared prefixes and batched generation say what the plain model says of each sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, family_model

from lowbit.evaluation import prefix
from lowbit.evaluation.generation import Limits
from lowbit.evaluation.scorer import Scorer


def ids(seed: int, n: int) -> list[int]:
    return torch.randint(1, 280, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


SHOTS = ids(0, 30)
QUESTIONS = [SHOTS + ids(i, 4 + i % 3) for i in range(1, 6)]
SEQUENCES = [
    *((q, ids(10 * i + k, 1 + (i + k) % 4)) for i, q in enumerate(QUESTIONS) for k in range(3)),
    (QUESTIONS[0], [7]),  # two choices of one token: no branch at all
    (QUESTIONS[0], [8]),
    (SHOTS, [9, 9]),  # a context that the others begin with
    ([3, 4], [5, 6, 7]),
    ([3, 4], [5, 6, 8]),
    ([5], ids(99, 40)),
]


def alone(model: Any, context: list[int], continuation: list[int]) -> tuple[torch.Tensor, bool]:
    with torch.inference_mode():
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].double()
    target = torch.tensor(continuation)
    value = torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
    return value, bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_it_says_of_each_sequence_alone(name: str) -> None:
    """Mistral's attention slides over 24 tokens, BLOOM and Falcon know positions by the mask, OPT counts from 2."""
    model = family_model(name)
    found = Scorer(model, "w", batch=3).log_likelihoods(SEQUENCES)
    for (context, continuation), (values, greedy) in zip(SEQUENCES, found, strict=True):
        expected, said = alone(model, context, continuation)
        torch.testing.assert_close(values.double(), expected, rtol=0, atol=2e-4)
        assert greedy == said


def test_what_is_common_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("llama")
    assert prefix.shareable(model.config)
    assert prefix.paddable(model)
    assert not prefix.paddable(family_model("mistral"))
    run, tokens = prefix._run, []

    def counted(model: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        tokens.append(ids.numel())
        return run(model, ids, *rest)

    monkeypatch.setattr(prefix, "_run", counted)
    pairs = [(q, [k, k + 1]) for q in QUESTIONS for k in (1, 2, 3, 4)]
    Scorer(model, "w", batch=8).log_likelihoods(pairs)
    longest = max(len(q) for q in QUESTIONS)
    assert sum(tokens) == 30 + len(QUESTIONS) * (longest - 30) + len(pairs)  # naively 20 x 36
    (stem,) = prefix.stems(prefix.trunks(pairs))
    assert (stem.length, len(stem.trunks)) == (30, 5)


def test_stems_leave_the_last_token_of_every_context() -> None:
    same = list(range(1, 40))
    found = prefix.stems(prefix.trunks([(same, [1]), ([*same, 50], [1, 2])]))
    assert [s.length for s in found] == [len(same) - 1]
    short = list(range(1, 10))
    assert [s.length for s in prefix.stems(prefix.trunks([(short, [1]), ([*short, 50], [1])]))] == [0]


@pytest.mark.parametrize("name", ["llama", "bloom", "mistral", "opt"])
def test_batched_generation_is_generation_alone(name: str, tokenizer: Any) -> None:
    model = family_model(name)
    prompts = [QUESTIONS[0], [3, 4, 5], QUESTIONS[3], QUESTIONS[0], SHOTS[:5]]
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n

    limits = Limits(8, (), frozenset({0}))
    found = Scorer(model, "w", batch=3).generate(prompts, tokenizer, limits, count)
    assert done == len(prompts)
    for prompt, written in zip(prompts, found, strict=True):
        expected: list[int] = []
        margins = []
        with torch.inference_mode():
            for _ in range(8):
                p = torch.softmax(model(torch.tensor([prompt + expected])).logits[0, -1].double(), -1)
                high, low = p.topk(2).values.tolist()
                margins.append(high - low)
                expected.append(int(p.argmax()))
                if expected[-1] == 0:
                    break
        assert written.tokens == tuple(expected)
        assert written.stop_reason == ("eos" if expected[-1] == 0 else "length")
        assert written.margin == pytest.approx(min(margins), abs=1e-4)


def test_a_stop_text_ends_writing_and_is_left_out(tokenizer: Any) -> None:
    model = family_model("llama")
    scorer = Scorer(model, "w", batch=2)
    (whole,) = scorer.generate([[3, 4, 5]], tokenizer, Limits(12))
    assert whole.stop_reason == "length"
    stop = tokenizer.decode(whole.tokens[5:7])
    (cut,) = scorer.generate([[3, 4, 5]], tokenizer, Limits(12, (stop,)))
    assert cut.stop_reason == "stop"
    assert cut.text == whole.text.partition(stop)[0]
    assert len(cut.tokens) < len(whole.tokens)
