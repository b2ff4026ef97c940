"""A model in another basis: the same logits for every family that can be rotated, else what is in the way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import family_model
from torch import nn

from lowbit.errors import ModelError, WeightError
from lowbit.models.residual import roles
from lowbit.models.rotated import Basis, rotated
from lowbit.models.source import Source, of_directory, of_model
from lowbit.models.stream import Stream


def whole(source: Source) -> Any:
    """The model of a source with all its weights."""
    model = copy.deepcopy(source.skeleton)
    for name, p in list(source.skeleton.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = source.tensor(name, tuple(p.shape)).float()
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    return model


def logits(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return whole(source)(input_ids=tokens[:2]).logits


@pytest.mark.parametrize("d", [64, 96, 24, 7])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_a_basis_is_orthogonal_and_spreads_every_channel(d: int, keeps_mean: bool) -> None:
    R = Basis.random(d, 3, keeps_mean).apply(torch.eye(d))
    torch.testing.assert_close(R @ R.t(), torch.eye(d), atol=1e-5, rtol=0)
    if keeps_mean:
        torch.testing.assert_close(R @ torch.ones(d), torch.ones(d), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.ones(d) @ R, torch.ones(d), atol=1e-5, rtol=0)
    # the signed Hadamard and cosine transforms reach sqrt(2 / d) at most; the other sums random signs
    limit = 5.0 if keeps_mean else 2**0.5 + 1e-5
    assert float(R.abs().max()) <= limit / d**0.5 or d == 7
    other = Basis.random(d, 4, keeps_mean).apply(torch.eye(d))
    assert not torch.equal(R, other)


def test_a_power_of_two_is_scipys_hadamard_matrix() -> None:
    import scipy.linalg

    basis = Basis.random(32, 0, False)
    R = torch.diag(basis.signs) @ torch.tensor(scipy.linalg.hadamard(32)).float() / 32**0.5
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(basis.apply(x), x @ R, atol=1e-6, rtol=1e-5)


def test_every_family_computes_the_same_or_says_what_is_in_the_way(family: Path, tokens: torch.Tensor) -> None:
    source = of_directory(family)
    if family.name == "bloom":
        with pytest.raises(ModelError, match="word_embeddings_layernorm"):
            rotated(source)
        return
    other = rotated(source, seed=5)
    expected, found = logits(source, tokens), logits(other, tokens)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    block = f"{source.blocks[1]}."
    name = next(n for n, p in source.skeleton.named_parameters() if n.startswith(block) and p.ndim == 2)
    shape = tuple(source.skeleton.get_parameter(name).shape)
    assert not torch.allclose(other.tensor(name, shape), source.tensor(name, shape), atol=0.01)


@pytest.mark.parametrize(
    ("model_type", "what"),
    [("gemma2", r"layers\.0\.self_attn\.o_proj.*not simply added"), ("olmo", "no norm with a gain"),
     ("xglm", "embed_tokens.*computes something else"), ("olmo2", r"layers\.0\.self_attn\.o_proj")],
)  # fmt: skip
def test_what_is_in_the_way_is_named(model_type: str, what: str) -> None:
    changes = {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96} if model_type == "xglm" else {}
    with pytest.raises(ModelError, match=what) as error:
        rotated(of_model(family_model(model_type, num_hidden_layers=1, **changes)))
    assert "fused" in error.value.fix


def test_roles_of_a_block_with_experts(families: dict[str, Path]) -> None:
    source = of_directory(families["mixtral"])
    found = roles(source, Stream(source, torch.float32))
    block = "model.layers.1"
    assert {w for w in found.writers if w.startswith(block)} == {
        f"{block}.self_attn.o_proj", *(f"{block}.mlp.experts.{e}.down_proj" for e in range(4))
    }  # fmt: skip
    assert {r: n for r, n in found.readers.items() if r.startswith(f"{block}.mlp")} == dict.fromkeys(
        [f"{block}.mlp.gate", *(f"{block}.mlp.experts.{e}.gate_up_proj" for e in range(4))],
        f"{block}.post_attention_layernorm",
    )
    assert found.norms["model.norm"] == (0.0, False)


def test_a_channel_that_sticks_out_does_so_no_more(tokens: torch.Tensor) -> None:
    model = family_model("llama")
    model.model.embed_tokens.weight.data[:, 5] += 30
    source = of_model(model)
    other = rotated(source)

    def largest(s: Source) -> float:
        peaks = Stream(s, torch.float32).embed(tokens).abs().amax((0, 1))
        return float(peaks.max() / peaks.median())

    assert largest(source) > 6
    assert largest(other) < 1.5


def test_a_head_of_its_own_is_counted(families: dict[str, Path]) -> None:
    tied = of_directory(families["mistral"])
    other = rotated(tied)
    assert tied.tied
    assert not other.tied
    assert not other.config.tie_word_embeddings
    assert tied.config.tie_word_embeddings
    assert other.store.nbytes() == tied.store.nbytes() + 4 * 288 * 64
    assert [s.name for s in other.head_sites()] == ["lm_head"]


def test_identity_is_that_of_weights_and_seed(llama: Path) -> None:
    source = of_directory(llama)
    one, two = rotated(source, 0), rotated(source, 1)
    assert len({source.digest, one.digest, two.digest}) == 3
    again = Source(two.name, two.config, two.store, two.root)
    assert again.digest == two.digest
    assert two.root == source.root


def test_a_bias_behind_a_gain_of_zero_cannot_be_moved() -> None:
    model = family_model("gpt2", n_layer=1)
    model.transformer.h[0].ln_2.weight.data[3] = 0
    with pytest.raises(ModelError, match=r"h\.0\.ln_2.*gain of zero"):
        rotated(of_model(model))


def test_a_missing_weight_is_named(llama: Path) -> None:
    store = rotated(of_directory(llama)).store
    with pytest.raises(WeightError, match=r"'model\.nothing'"):
        store.get("model.nothing")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(store.get(name, 3), store.get(name)[3])
