"""Block by block, a model computes what transformers computes with all of it in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import family_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowbit.models.graph import routers
from lowbit.models.source import of_directory, of_model
from lowbit.models.stream import Stream


def whole(root: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()


def block_outputs(model: nn.Module, blocks: list[str], tokens: torch.Tensor) -> list[torch.Tensor]:
    """What every block of a whole model returns for ``tokens``."""
    seen: list[torch.Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _x, y: seen.append(y[0] if isinstance(y, tuple) else y)
        )
        for name in blocks
    ]
    with torch.inference_mode():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def test_every_family_streams_to_the_hidden_states_of_transformers(family: Path, tokens: torch.Tensor) -> None:
    source = of_directory(family)
    expected = block_outputs(whole(family), source.blocks, tokens)
    stream = Stream(source, torch.float32)
    hidden = stream.embed(tokens)
    stream.close()
    assert len(expected) == len(source.blocks) == 2
    for i, want in enumerate(expected):
        hidden = stream.run(i, stream.load(i), hidden)
        torch.testing.assert_close(hidden, want, rtol=1e-5, atol=1e-5)


def test_every_matrix_of_the_blocks_is_a_site(family: Path) -> None:
    source = of_directory(family)
    model = whole(family)
    names = {site.name for block in source.blocks for site in source.sites(block)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(tuple(b + "." for b in source.blocks)):
            assert name in names
    experts = 2 * 4 * 2 if model.config.model_type == "mixtral" else 0
    assert sum(".experts." in name for name in names) == experts


def test_of_model_and_of_directory_load_the_same_blocks(family: Path) -> None:
    on_disk, in_memory = of_directory(family), of_model(whole(family))
    assert on_disk.blocks == in_memory.blocks
    for name in on_disk.blocks:
        a, b = on_disk.load(name, torch.float32).state_dict(), in_memory.load(name, torch.float32).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_every_batch_shape_may_differ(llama: Path, tokens: torch.Tensor) -> None:
    stream = Stream(of_directory(llama), torch.float32)
    block = stream.load(0)
    all_at_once = stream.run(0, block, stream.embed(tokens))
    one = stream.run(0, block, stream.embed(tokens[2:3]))
    torch.testing.assert_close(one, all_at_once[2:3], rtol=1e-5, atol=1e-5)


def test_the_final_norm_gives_what_the_head_reads(family: Path, tokens: torch.Tensor) -> None:
    model = whole(family)
    stream = Stream(of_directory(family), torch.float32)
    hidden = stream.embed(tokens)
    for i in range(2):
        hidden = stream.run(i, stream.load(i), hidden)
    with torch.inference_mode():
        expected = model.base_model(tokens).last_hidden_state
    torch.testing.assert_close(stream.finish(hidden), expected, rtol=1e-5, atol=1e-5)


def test_buffers_of_a_checkpoint_are_loaded(tokens: torch.Tensor) -> None:
    """DeepSeek-V3's router adds a stored buffer to its scores; blocks differ, some experts are shared."""
    sizes = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    model = family_model(
        "deepseek_v3", first_k_dense_replace=1, moe_intermediate_size=32, num_key_value_heads=4, **sizes, **experts
    )
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.arange(8.0))
    source = of_model(model)
    expected = block_outputs(model, source.blocks, tokens)
    stream = Stream(source, torch.float32)
    hidden = stream.embed(tokens)
    for i, want in enumerate(expected):
        hidden = stream.run(i, stream.load(i), hidden)
        torch.testing.assert_close(hidden, want, rtol=1e-5, atol=1e-5)
    assert routers(source.skeleton.get_submodule(source.blocks[1]), source.blocks[1]) == {
        "model.layers.1.mlp.gate.weight"
    }
