"""Prepared models: what their own modules give, in 16 bits where nothing is lost, and back again to the bit."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import family_model
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import DynamicCache

import lowbit
from lowbit import _native
from lowbit.errors import EvidenceError
from lowbit.evaluation.scorer import Scorer
from lowbit.runtime.decoding import prepare, restore
from lowbit.runtime.decoding.attention import attended, turned
from lowbit.runtime.decoding.gated import Gated
from lowbit.runtime.decoding.halves import Half, HalfEmbedding
from lowbit.runtime.decoding.norm import Norm
from lowbit.runtime.decoding.products import Products
from lowbit.runtime.decoding.swap import Swapped, swap
from lowbit.runtime.facade import use_kernels
from lowbit.runtime.growing import GrowingLayer, growing_cache
from lowbit.runtime.kernels import packed
from lowbit.runtime.linear import QLinear
from lowbit.runtime.rows import Rows, own_cache

SWAPPED = {
    "llama": {"Norm": 5, "Gated": 2, "Attention": 2, "Half": 15},
    "mistral": {"Norm": 5, "Gated": 2, "Attention": 2, "Half": 15, "HalfEmbedding": 1},
    "gemma": {"Norm": 5, "Attention": 2, "Half": 8},
    "stablelm": {"Gated": 2, "Attention": 2, "Half": 15},
    "mixtral": {"Norm": 5, "Attention": 2, "Half": 9},
    "qwen2": {"Norm": 5, "Gated": 2, "Attention": 2, "Half": 15},  # biases
    "qwen3": {"Norm": 9, "Gated": 2, "Half": 7},  # norms of heads
    "opt": {"Half": 1, "HalfEmbedding": 1},
    "falcon": {"Half": 1, "HalfEmbedding": 1},
}


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LOWBIT_ISA", request.param)
    return str(request.param)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def written(model: Any) -> torch.Tensor:
    """Logits of three tokens of two rows of unlike length, and of one row alone."""
    rows, found = Rows(model.config, None), []
    for length in (30, 5):
        cache = own_cache(model.config, None)
        model(input_ids=torch.arange(1, length + 1)[None], past_key_values=cache, use_cache=True)
        rows.join(cache, length)
    for step in range(4):
        if step == 3:
            rows.leave(0)
        inputs = rows.inputs([3 + step, 9][: len(rows.lengths)], model.device)
        found.append(model(**inputs, past_key_values=rows, use_cache=True).logits[-1:])
        rows.advance()
    return torch.cat(found)


@pytest.mark.parametrize("name", SWAPPED)
def test_a_prepared_model_writes_what_its_own_modules_write(name: str) -> None:
    model = family_model(name)
    before, own = {k: v.clone() for k, v in model.state_dict().items()}, written(model)
    kinds = [type(module) for module in model.modules()]
    prepare(model)
    prepare(model)  # twice is once
    swapped = [module for module in model.modules() if isinstance(module, Swapped)]
    assert Counter(module.kind.__name__ for module in swapped) == SWAPPED[name]
    found = written(model)
    assert float((found - own).abs().max()) < 1e-5 * float(own.abs().max())
    assert {m.same for m in swapped if not isinstance(m, Half | HalfEmbedding)} <= {True}
    assert model.dtype == torch.float32
    restore(model)
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and after[k].dtype == torch.float32 for k in before)
    assert torch.equal(written(model), own)


def test_a_low_bit_model_too_and_what_changes_in_it_is_seen(checkpoint: Path) -> None:
    model = lowbit.load(checkpoint, dtype=torch.float32)
    own = written(model)
    prepare(model)
    assert float((written(model) - own).abs().max()) < 1e-5 * float(own.abs().max())
    attention = model.model.layers[0].self_attn
    assert attention.same
    heard: list[Any] = []
    handle = attention.q_proj.register_forward_hook(lambda *_: heard.append(1))
    written(model)
    handle.remove()
    assert len(heard) == 6  # every pass, when somebody listens
    attention.v_proj.load_state_dict({k: v.clone() for k, v in attention.k_proj.state_dict().items()})
    twin = copy.deepcopy(model)
    restore(twin)
    changed = written(twin)
    assert float((changed - own).abs().max()) > 1e-2
    assert float((written(model) - changed).abs().max()) < 1e-5 * float(own.abs().max())
    use_kernels(model, "dense")
    assert not any(isinstance(module, Swapped) for module in model.modules())


def test_modules_that_only_look_alike_are_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + self.eps) * self.weight

    norm, x = OddRMSNorm(), noise(1, 64)
    with torch.inference_mode():
        own = norm(x)
        swap(norm, Norm)
        assert torch.equal(norm(x), own)
    assert norm.__dict__["same"] is False
    model = family_model("llama")
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda _, __, out: (out[0] * 1, out[1]))  # hooks of the module itself still run
    kind = type(attention)

    class Odd(kind):  # type: ignore[misc, valid-type]
        def forward(
            self, hidden_states: Any, position_embeddings: Any = None, attention_mask: Any = None,
            past_key_values: Any = None, **how: Any,
        ) -> Any:  # fmt: skip
            y, seen = super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **how)
            return 2 * y, seen

    attention.__class__ = Odd
    own = written(model)
    prepare(model)
    assert float((written(model) - own).abs().max()) < 1e-5 * float(own.abs().max())
    assert attention.same is False


def test_gradients_and_many_tokens_go_the_modules_own_way() -> None:
    model = family_model("llama")
    ids = torch.arange(1, 41)[None]
    own = model(ids).logits
    prepare(model)
    found = model(ids).logits
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
    found.sum().backward()
    assert model.model.layers[0].self_attn.same is None
    assert float(model.model.norm.weight.grad.abs().max()) > 0


def test_sixteen_bits_are_kept_where_they_lose_nothing() -> None:
    model = family_model("mistral")  # its head is its embedding
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.mlp.up_proj.weight[3, 5] = 1 + 2.0**-20
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight.bfloat16())
    table = model.lm_head.weight.detach().clone()
    prepare(model)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.weight is embedding.weight
    assert head.weight.dtype == torch.float16
    assert layer.self_attn.o_proj.weight.dtype == torch.bfloat16
    assert isinstance(layer.mlp.up_proj.weight, nn.Parameter)  # one number is neither
    assert torch.equal(embedding(torch.arange(288)), table)
    with torch.inference_mode():
        for tokens in (1, packed.FEW_TOKENS + 1):
            x = noise(tokens, 64)
            torch.testing.assert_close(head(x), linear(x, table))
    x = noise(2, 64)
    for other in (pickle.loads(pickle.dumps(head)), copy.deepcopy(head)):
        assert isinstance(other, Half)
        assert torch.equal(other(x), head(x))
    restore(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, table)


# --- native code -----------------------------------------------------------------------------------------------------


def weights(*shapes: tuple[int, int], bias: bool = False) -> tuple[Products, list[torch.Tensor], list[torch.Tensor]]:
    made = [noise(*shape, seed=i).half() / 8 for i, shape in enumerate(shapes)]
    states = [packed.halves(w, torch.float32) for w in made]
    biases = [noise(len(w), seed=7) if bias else torch.zeros(len(w)) for w in made]
    held = Products(
        (), tuple(states), tuple(biases), tuple(s.native for s in states), tuple(b.data_ptr() for b in biases),
        tuple(len(w) for w in made),
    )  # fmt: skip
    return held, [w.double() for w in made], [b.double() for b in biases]


@pytest.mark.parametrize(("rows", "heads", "group", "size", "width"), [
    (2, 3, 3, 64, 37), (1, 1, 5, 16, 1), (3, 2, 4, 80, 20),
])  # fmt: skip
def test_attention_of_a_token_is_the_textbooks(
    isa: str, rows: int, heads: int, group: int, size: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch in float64; keys in a larger buffer, hidden tokens that are no numbers."""
    out, (w,), (b,) = weights((48, heads * group * size), bias=True)
    q = 3 * noise(rows, heads * group, 1, size)
    held = torch.full((rows + 1, heads, width + 9, size), torch.nan)
    keys, values = held[:rows, :, 4 : width + 4], held.clone()[:rows, :, 4 : width + 4]
    keys.copy_(noise(rows, heads, width, size, seed=2))
    values.copy_(noise(rows, heads, width, size, seed=3))
    mask = torch.ones(rows, 1, 1, width, dtype=torch.bool)
    mask[-1, ..., : width // 2] = False
    exact: Any = scaled_dot_product_attention
    seen = exact(q.double(), keys.double(), values.double(), attn_mask=mask, scale=0.3, enable_gqa=True)
    expected = seen.reshape(rows, 1, -1) @ w.T + b
    keys[-1, :, : width // 2] = torch.inf
    found = attended(out, q, keys, values, mask, 0.3)
    assert float((found - expected).abs().max() / expected.abs().max()) < 3e-6
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(attended(out, q, keys, values, mask, 0.3), found)
    for i in range(rows):
        assert torch.equal(
            attended(out, q[i : i + 1], keys[i : i + 1], values[i : i + 1], mask[i : i + 1], 0.3)[0], found[i]
        )


def test_queries_and_keys_are_turned_to_the_bit(isa: str) -> None:
    qkv, _, _ = weights((96, 40), (32, 40), (32, 40), bias=True)
    x, angles = noise(2, 1, 40), noise(2, 1, 12, seed=4)
    plain = packed.together(x, qkv.states)
    for cos, sin in ((angles.cos(), angles.sin()), (angles[:1].cos(), angles[:1].sin())):
        found = turned(qkv, x, (cos, sin), 16)
        for i, (y, turns) in enumerate(zip(plain, found, strict=True)):
            h = (y + qkv.held[i]).view(2, -1, 1, 16)  # type: ignore[operator]
            turning, rest = h[..., :12], h[..., 12:]
            half = torch.cat((-turning[..., 6:], turning[..., :6]), dim=-1)
            around = turning * cos[:, None] + half * sin[:, None]
            assert torch.equal(turns, h if i == 2 else torch.cat((around, rest), dim=-1))
    with pytest.raises(ValueError, match="angles of"):
        turned(qkv, x, (noise(3, 1, 12), noise(3, 1, 12)), 16)
    with pytest.raises(ValueError, match="no such heads"):
        turned(qkv, x, (noise(2, 1, 18), noise(2, 1, 18)), 16)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_gated_feed_forward_and_a_norm_are_the_textbooks(isa: str, tokens: int) -> None:
    both, (gate, up), (b, c) = weights((70, 40), (70, 40), bias=True)
    down, (w,), (d,) = weights((24, 70), bias=True)
    x, y = 4 * noise(tokens, 40), torch.empty(tokens, 24)
    arguments = both.natives, both.biases, down.natives, down.biases, x.data_ptr(), x.numel(), y.data_ptr()
    _native.gated(*arguments, y.numel(), 1)
    expected = (silu(x.double() @ gate.T + b) * (x.double() @ up.T + c)) @ w.T + d
    assert float((y - expected).abs().max() / expected.abs().max()) < 3e-6
    for wrong in (y.numel() - 1, y.numel() + 24):
        with pytest.raises(ValueError, match=r"gate|y is|x is"):
            _native.gated(*arguments, wrong, 1)
    weight, normed = noise(40, seed=5), torch.empty_like(x)
    _native.norm(x.data_ptr(), weight.data_ptr(), normed.data_ptr(), tokens, 40, 1e-3, 1.0)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + weight.double())
    assert float((normed - exact).abs().max()) < 1e-6 * float(exact.abs().max())


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_growing_cache_holds_what_transformers_own_holds_and_stays_where_it_is() -> None:
    config = family_model("llama").config
    ours: Any = growing_cache(config)
    theirs: Any = DynamicCache(config=config)
    steady = 0
    for step in range(90):
        where = ours.layers[0].keys.data_ptr() if step else 0
        k, v = noise(2, 2, 40 if step == 0 else 1, 16, seed=step), noise(2, 2, 40 if step == 0 else 1, 16, seed=-step)
        found, expected = ours.update(k, v, 0), theirs.update(k, v, 0)
        assert all(map(torch.equal, found, expected)), step
        steady += found[0].data_ptr() == where
        if step in (30, 31):
            for cache in (ours, theirs):
                cache.crop(-7)
        if step == 70:
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor([1, 1]))
    assert steady >= 87
    assert isinstance(ours.layers[0], GrowingLayer)
    assert type(growing_cache(family_model("mistral").config).layers[0]) is not GrowingLayer  # its window is short


def test_streamed_linears_are_left_alone(checkpoint: Path) -> None:
    model = lowbit.load(checkpoint, dtype=torch.float32)
    first = next(module for module in model.modules() if isinstance(module, QLinear))
    first.use_only(packed.PACKED)
    prepare(model)
    assert not any(isinstance(module, Swapped) for module in model.modules())


def test_a_prepared_model_is_neither_scored_nor_filled() -> None:
    """Its last digits are not those that a scorer's identity stands for, and 16 bits would round what is loaded."""
    model = family_model("qwen2")
    held = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model)
    with pytest.raises(EvidenceError, match="prepared for decoding"):
        Scorer(model, "it")
    with pytest.raises(RuntimeError, match="restore"):
        model.load_state_dict(held)
    before = written(model)
    model.double()
    model.float()  # new storage under the same parameters
    assert torch.equal(written(model), before)
    restore(model)
    model.load_state_dict(held)
    Scorer(model, "it")


class Cut(nn.Module):
    """A gated feed-forward but for what cuts off large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down_proj, self.act_fn = nn.Linear(48, 32, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x).clamp(-50, 50)
        found: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * up)
        return found


@torch.inference_mode()
def test_a_limit_that_few_inputs_reach_is_seen() -> None:
    module = Cut()
    for linear_ in (module.gate_proj, module.up_proj, module.down_proj):
        linear_.weight.data = linear_.weight.data.bfloat16().float()
    x = 1000 * noise(1, 32)
    own = module(x)
    swap(module, Gated)
    for linear_ in (module.gate_proj, module.up_proj, module.down_proj):
        swap(linear_, Half)
        half = linear_.weight.data.bfloat16()
        del linear_._parameters["weight"]
        linear_.register_buffer("weight", half)
    torch.testing.assert_close(module(x), own, rtol=1e-4, atol=1e-3)
    assert module.same is False
