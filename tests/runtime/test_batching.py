"""What a batch tells each request is what the model tells it alone, whatever joins and leaves."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB, family_model

from lowbit.errors import FormatError, ModelError, RecipeError
from lowbit.formats.heads import CacheFormat
from lowbit.runtime.batching import Batcher
from lowbit.runtime.engine import Engine
from lowbit.runtime.kvcache import KVCache
from lowbit.runtime.requests import Busy, Done, Event, Failed, Progress, Request, Scored
from lowbit.runtime.rows import Rows
from lowbit.runtime.sampling import Sampling

KV = "int2-channel4:int3-head,sink=1,window=3"


class Letters:
    """A tokenizer of one letter a token."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(chr(0x4E00 + i) for i in ids)


@cache
def model(name: str) -> Any:
    found = family_model(name)
    found.generation_config.eos_token_id = None
    return found


@cache
def prompts() -> list[tuple[int, ...]]:
    g = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(1, VOCAB, (n,), generator=g).tolist()) for n in (5, 1, 30, 12)]


def alone(name: str, prompt: tuple[int, ...], new: int, kv: str | None = None) -> list[int]:
    """What transformers writes by itself."""
    ids = torch.tensor([prompt])
    past = None if kv is None else KVCache(model(name).config, CacheFormat.parse(kv))
    out = model(name).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0,
        past_key_values=past,
    )  # fmt: skip
    return [int(i) for i in out[0, len(prompt) :]]


class Heard:
    """All that a request was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def tokens(self) -> list[int]:
        return [t.id for e in self.events if isinstance(e, Progress) for t in e.tokens]

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Progress))

    @property
    def end(self) -> Event | None:
        return self.events[-1] if self.events and isinstance(self.events[-1], Done | Failed) else None


def asked(batcher: Batcher, prompt: tuple[int, ...], **how: Any) -> tuple[Heard, int]:
    heard = Heard()
    return heard, batcher.submit(Request(prompt, heard, **how))


def run(batcher: Batcher) -> None:
    while batcher.step():
        pass


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_writes_in_a_batch_what_it_writes_alone(name: str) -> None:
    """Short prompts are read together, a long one in pieces; one is cancelled; a window of 24 slides over it."""
    batcher = Batcher(model(name), Letters(), slots=3, chunk=16)
    news = (6, 5, 3, 4)
    heard = [asked(batcher, prompt, max_tokens=new)[0] for prompt, new in zip(prompts(), news, strict=True)]
    lost, number = asked(batcher, prompts()[3], max_tokens=40)
    for _ in range(5):
        batcher.step()
    batcher.cancel(number)
    late, _ = asked(batcher, prompts()[0], max_tokens=4)
    run(batcher)
    for prompt, new, found in zip(prompts(), news, heard, strict=True):
        assert found.tokens == alone(name, prompt, new)
        assert found.end == Done("length", len(prompt), new)
    assert late.tokens == heard[0].tokens[:4]
    assert lost.end is None
    assert batcher.load()[:2] == (0, 0)
    assert batcher.load().kv_bytes == 0


def test_with_a_low_bit_cache_too() -> None:
    """Raw, packed and forgotten tokens differ from row to row."""
    batcher = Batcher(model("mistral"), Letters(), kv=CacheFormat.parse(KV), slots=3)
    heard = [asked(batcher, prompt, max_tokens=4)[0] for prompt in prompts()[:3]]
    run(batcher)
    for prompt, found in zip(prompts(), heard, strict=False):
        assert found.tokens == alone("mistral", prompt, 4, KV)
    assert heard[2].tokens != alone("mistral", prompts()[2], 4)


@pytest.mark.parametrize(("text", "sliding"), [
    ("int4-head-hadamard:raw,sink=2", 10), ("int2-channel4:int3-g8,sink=2,window=3", 10),
    ("int2-channel4:int3-head-sym,window=5", None), ("int2-head,sink=12,window=20", None),
])  # fmt: skip
def test_rows_hold_to_the_bit_what_each_holds_alone(text: str, sliding: int | None) -> None:
    """Rows join and leave, the longest too; 36 steps outgrow the buffers."""
    how = {} if sliding is None else {"sliding_window": sliding}
    config = family_model("llama" if sliding is None else "mistral", num_hidden_layers=1, **how).config
    kv, g = CacheFormat.parse(text), torch.Generator().manual_seed(4)
    rows: Any = Rows(config, kv)
    twins: list[Any] = []

    def tokens(batch: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = torch.randn(2, batch, 2, n, 16, generator=g)
        return keys, values

    def join(length: int) -> None:
        own: Any = KVCache(config, kv)
        for layer in own.layers:
            layer.update(*tokens(1, length))
        twins.append(deepcopy(own))
        rows.join(own, length)

    joins, leaves = {0: (5, 1), 1: (20,), 30: (12,)}, {4: 2, 6: 0}
    for step in range(36):
        for length in joins.get(step, ()):
            join(length)
        if step in leaves:
            rows.leave(leaves[step])
            twins[leaves[step]] = twins[-1]
            twins.pop()
        for i, layer in enumerate(rows.layers):
            new = tokens(len(twins), 1)
            found = layer.update(*new)
            for r, twin in enumerate(twins):
                for part, wanted in zip(found, twin.layers[i].update(*(x[r : r + 1] for x in new)), strict=True):
                    assert torch.equal(part[r, :, part.shape[2] - wanted.shape[2] :], wanted[0])
                    assert not part[r, :, : part.shape[2] - wanted.shape[2]].isnan().any()
        rows.advance()
    rows.clear()
    assert rows.nbytes == 0


def test_the_memory_of_the_caches_is_counted() -> None:
    """Two requests of 5 and 30 tokens: two rows of the longer one with room to grow, packed and in full."""
    kv = CacheFormat.parse("int4-head")
    rows, columns = 4, 30 + 32  # room for four rows, and for the longest to grow
    batcher = Batcher(model("llama"), Letters(), kv=kv, slots=2)
    for prompt in (prompts()[0], prompts()[2]):
        asked(batcher, prompt, max_tokens=3)
    batcher.step()  # both are read, and each has written two tokens, one of which is in the cache
    a_token = 2 * 2 * 2 * 11  # layers, heads, keys and values; 8 bytes of codes, 2 of scale, 1 of zero
    assert batcher.load().kv_bytes == rows * columns * a_token
    plain = Batcher(model("llama"), Letters(), slots=2)
    for prompt in (prompts()[0], prompts()[2]):
        asked(plain, prompt, max_tokens=3)
    plain.step()
    assert plain.load().kv_bytes == 2 * 2 * rows * 2 * columns * 16 * 4


def drawn(prompt: tuple[int, ...], seed: int) -> dict[str, Any]:
    how = Sampling(temperature=1.2, top_p=0.9, min_p=0.01, frequency_penalty=0.5, repetition_penalty=1.1, seed=seed)
    return {"prompt": prompt, "sampling": how, "max_tokens": 3 + seed % 4}


@cache
def drawn_alone(which: int) -> list[int]:
    batcher = Batcher(model("llama"), Letters(), slots=1, chunk=8)
    found, _ = asked(batcher, **drawn(prompts()[which % 4], which))
    run(batcher)
    return found.tokens


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3), st.booleans()), min_size=2, max_size=5), st.integers(2, 4)
)
def test_a_seeded_text_does_not_depend_on_the_others(plan: list[tuple[int, int, bool]], slots: int) -> None:
    """``plan``: which request comes, after how many steps, and whether it goes away early."""
    batcher = Batcher(model("llama"), Letters(), slots=slots, chunk=8)
    kept: list[tuple[int, Heard, int]] = []
    cancelled: list[tuple[int, Heard, int]] = []
    for which, steps, leaves in plan:
        found, number = asked(batcher, **drawn(prompts()[which % 4], which))
        (cancelled if leaves else kept).append((which, found, number))
        for _ in range(steps):
            batcher.step()
        for _, _, gone in cancelled:
            batcher.cancel(gone)
    run(batcher)
    for which, found, _ in kept:
        assert found.tokens == drawn_alone(which)
    assert len({tuple(drawn_alone(i)) for i in range(4)}) == 4


def test_a_prompt_is_scored_piece_by_piece() -> None:
    batcher, prompt = Batcher(model("llama"), Letters(), chunk=8), prompts()[2]
    found, _ = asked(batcher, prompt, max_tokens=0, score=True, logprobs=2)
    run(batcher)
    with torch.inference_mode():
        table = torch.log_softmax(model("llama")(torch.tensor([prompt])).logits[0], -1)
    scored = found.events[0]
    assert isinstance(scored, Scored)
    assert [t.id for t in scored.tokens] == list(prompt)
    assert scored.tokens[0].logprob is None
    for i, token in enumerate(scored.tokens[1:]):
        assert token.logprob == pytest.approx(float(table[i, prompt[i + 1]]), abs=1e-4)
        assert [t for t, _ in token.top] == table[i].topk(2).indices.tolist()
    assert found.end == Done("length", 30, 0)


def test_a_long_prompt_holds_nobody_up_for_longer_than_a_piece() -> None:
    batcher = Batcher(model("llama"), Letters(), slots=2, chunk=4)
    first, _ = asked(batcher, prompts()[1], max_tokens=20)
    batcher.step()
    second, _ = asked(batcher, prompts()[2], max_tokens=2)  # 30 tokens: eight pieces
    counts = []
    while not second.events:
        batcher.step()
        counts.append(len(first.tokens))
    assert counts == list(range(3, 11))


def test_ends_and_stop_strings_end_a_text() -> None:
    free = alone("llama", prompts()[0], 9)
    letter = Letters().decode
    batcher = Batcher(model("llama"), Letters(), chunk=8)
    cases: list[tuple[dict[str, Any], str, int]] = [
        ({"ends": frozenset({free[4]})}, letter(free[:4]), 5),
        ({"stop": (letter(free[3:5]),)}, letter(free[:3]), 5),
        ({"stop": (letter([free[8], 1]),)}, letter(free[:9]), 9),  # half of it at the very end
    ]
    for how, text, written in cases:
        found, _ = asked(batcher, prompts()[0], max_tokens=9, **how)
        run(batcher)
        assert found.text == text
        assert found.tokens == free[:written]
        assert found.end == Done("length" if written == 9 else "stop", 5, written)
    held = [e.text for e in found.events if isinstance(e, Progress)]
    assert held[-1] == letter(free[8:9])  # held back until it was no stop string


def test_the_queue_is_bounded_and_the_late_are_told() -> None:
    batcher = Batcher(model("llama"), Letters(), slots=1, queue=1)
    running, _ = asked(batcher, prompts()[0], max_tokens=50)
    batcher.step()
    waiting, _ = asked(batcher, prompts()[1], max_tokens=5, deadline=0.0)
    with pytest.raises(Busy, match="1 requests wait"):
        asked(batcher, prompts()[1])
    assert batcher.load()[:3] == (1, 1, 1)
    batcher.step()
    assert waiting.end == Failed("timeout", "the time for this request is over")
    asked(batcher, prompts()[1])
    batcher.fail_all("shutdown", "bye")
    assert running.end == Failed("shutdown", "bye")
    assert batcher.load()[:2] == (0, 0)
    with pytest.raises(RecipeError, match="0 tokens"):
        Request(())


def test_a_pass_that_fails_ends_its_requests_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(model("llama"), Letters())
    engine = Engine(batcher)
    forward = model("llama").forward
    ends: list[Heard] = []

    def ask() -> Heard:
        heard, over = Heard(), threading.Event()

        def listen(event: Event) -> None:
            heard(event)
            if isinstance(event, Done | Failed):
                over.set()

        engine.submit(Request(prompts()[0], listen))
        assert over.wait(20)
        return heard

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(model("llama"), "forward", broken)
    ends.append(ask())
    monkeypatch.setattr(model("llama"), "forward", forward)
    ends.append(ask())
    engine.close()
    assert ends[0].end == Failed("model", "the model failed: RuntimeError: no memory left")
    assert ends[1].tokens == alone("llama", prompts()[0], 16)
    assert not engine.alive


def test_models_that_cannot_be_batched_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes a padded place for a real one, one that keeps a state, heads that a format cannot take."""
    blind = family_model("gpt2")
    inner = blind.transformer.forward
    monkeypatch.setattr(
        blind.transformer, "forward", lambda *a, **k: inner(*a, **(k | {"position_ids": None, "attention_mask": None}))
    )
    with pytest.raises(ModelError, match="positions do not follow padding"):
        Batcher(blind, Letters())
    mamba = family_model("mamba", num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="only plain and sliding attention"):
        Batcher(mamba, Letters())
    with pytest.raises(FormatError, match="no Hadamard matrix"):
        Batcher(family_model("gemma", head_dim=12), Letters(), kv=CacheFormat.parse("int4-head-hadamard"))
