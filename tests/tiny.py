"""Tiny random models of many families.

They have float16-exact weights of a seeded, sensible scale, so that a checkpoint's 16-bit leftovers lose nothing and
results can be compared to float32 rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 288
_WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
_GATED = {**_WIDE, "intermediate_size": 96, "max_position_embeddings": 128, "num_key_value_heads": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_GATED, "tie_word_embeddings": False},
    "opt": {**_WIDE, "ffn_dim": 96, "max_position_embeddings": 128, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB},
    "falcon": {**_WIDE, "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False,
               "max_position_embeddings": 128},
    "gpt_neox": {**_WIDE, "intermediate_size": 96, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCAB},
    "mistral": {**_GATED, "sliding_window": 24, "tie_word_embeddings": True},
    "gemma": {**_GATED, "head_dim": 16},
    "stablelm": _GATED,
    "mixtral": {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def family_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family in float32; ``changes`` replace entries of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = FAMILIES.get(model_type, _GATED)
    config = AutoConfig.for_model(
        model_type, **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **known, **changes}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                value = noise * 1.5 * parameter.shape[-1] ** -0.5
            else:
                value = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(value.half())
    return model


def save_model(model: Any, tokenizer: Any, root: Path) -> Path:
    """The model's directory in float32 safetensors, with its tokenizer."""
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root
