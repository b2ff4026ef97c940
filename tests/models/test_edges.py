"""Edges: what is found in every family, and that a scale moved along them changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.models.edges import Edge, find, fold, survives
from lowbit.models.source import of_directory
from lowbit.models.stream import Stream

ATTENTION = {"input_layernorm -> q_proj k_proj v_proj", "v_proj -> o_proj"}
GATED = {"post_attention_layernorm -> gate_proj up_proj", "up_proj -> down_proj"}
EXPECTED = {
    "llama": ATTENTION | GATED,
    "mistral": ATTENTION | GATED,
    "gemma": ATTENTION | GATED,
    "stablelm": ATTENTION | GATED,
    # a ReLU lets a positive scale through, a GELU does not
    "opt": {"self_attn_layer_norm -> q_proj k_proj v_proj", "final_layer_norm -> fc1", "v_proj -> out_proj",
            "fc1 -> fc2"},
    "bloom": {"input_layernorm -> query_key_value", "post_attention_layernorm -> dense_h_to_4h"},
    "falcon": {"input_layernorm -> query_key_value dense_h_to_4h"},
    "gpt_neox": {"input_layernorm -> query_key_value", "post_attention_layernorm -> dense_h_to_4h"},
    "gpt2": {"ln_1 -> c_attn", "ln_2 -> c_fc"},
    "mixtral": ATTENTION | {"post_attention_layernorm -> gate gate_up_proj gate_up_proj gate_up_proj gate_up_proj",
                            "gate_up_proj -> down_proj"},
}  # fmt: skip


def _block(root: Path, tokens: torch.Tensor) -> tuple[nn.Module, object, list[Edge]]:
    source = of_directory(root)
    stream = Stream(source, torch.float32)
    hidden = stream.embed(tokens[:1])
    block = stream.load(0)
    run = lambda: stream.run(0, block, hidden)  # noqa: E731
    return block, run, find(block, run)


def _spelled(edge: Edge) -> str:
    return f"{edge.producer.split('.')[-1]} -> {' '.join(c.split('.')[-1] for c in edge.consumers)}"


def test_the_edges_of_every_family(family: Path, tokens: torch.Tensor) -> None:
    block, run, edges = _block(family, tokens)
    assert {_spelled(edge) for edge in edges} == EXPECTED[family.name]
    assert {edge.offset for edge in edges if edge.norm} == ({1.0} if family.name == "gemma" else {0.0})
    assert survives(block, run, edges)  # all at once  # type: ignore[arg-type]


def test_grouped_heads_share_a_value_channel(llama: Path, tokens: torch.Tensor) -> None:
    _, _, edges = _block(llama, tokens)
    (edge,) = [edge for edge in edges if edge.producer.endswith("v_proj")]
    heads = torch.arange(2 * 16).view(2, 16)  # four query heads of 16 over two value heads
    assert torch.equal(edge.channel, heads.repeat_interleave(2, 0).flatten())
    wanted = torch.arange(1.0, 65.0)
    pairs = wanted.view(2, 2, 16)
    assert torch.allclose(edge.fewest(wanted), (pairs[:, 0] * pairs[:, 1]).sqrt().flatten())


def test_an_edge_that_is_none_does_not_survive(llama: Path, tokens: torch.Tensor) -> None:
    block, run, edges = _block(llama, tokens)
    norm = next(edge for edge in edges if edge.norm)
    without_v = Edge(norm.producer, norm.consumers[:2], norm.channel, norm=True)
    assert survives(block, run, [norm])  # type: ignore[arg-type]
    assert not survives(block, run, [without_v])  # type: ignore[arg-type]


@pytest.mark.parametrize("leaf", ["input_layernorm", "v_proj", "up_proj"])
def test_a_fold_divides_the_producer_and_multiplies_the_consumers(llama: Path, tokens: torch.Tensor, leaf: str) -> None:
    block, _, edges = _block(llama, tokens)
    (edge,) = [edge for edge in edges if edge.producer.endswith(leaf)]
    scale = torch.rand(edge.width) + 0.5
    changed = fold(block, edge, scale)
    produced = changed[f"{edge.producer}.weight"]
    before = block.get_parameter(f"{edge.producer}.weight")
    assert torch.allclose(produced * (scale if edge.norm else scale[:, None]), before)
    for consumer in edge.consumers:
        ratio = changed[f"{consumer}.weight"] / block.get_parameter(f"{consumer}.weight")
        assert torch.allclose(ratio, scale[edge.channel].expand_as(ratio))


class _Gated(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def test_a_wide_linear_is_not_taken_for_the_producer_of_what_it_does_not_change() -> None:
    """With 11008 factors one lies within the tolerance of any number; none may lie near one."""
    torch.manual_seed(0)
    block, x = _Gated(8, 11008), torch.randn(1, 4, 8)
    with torch.no_grad():
        edges = find(block, lambda: block(x))
    assert [(edge.producer, edge.consumers) for edge in edges] == [("up_proj", ("down_proj",))]
