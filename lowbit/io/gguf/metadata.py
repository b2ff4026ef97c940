"""Hyper-parameters of a model as GGUF keys, and back.

One table serves both ways. What llama.cpp computes without being told (an activation, where norms stand) is a
condition: a configuration that says otherwise is refused by name when written, and assumed when read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lowbit.arrays import Float, Tensor
from lowbit.errors import CheckpointError, ExportError
from lowbit.io.gguf.names import FAMILIES, Family, falcon_groups, family_of

Value = int | float | bool | str
_COMMON = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size",
           "attention.head_count": "num_attention_heads"}  # fmt: skip
_GATED = {
    "context_length": "max_position_embeddings", "feed_forward_length": "intermediate_size",
    "attention.head_count_kv": "num_key_value_heads",
}  # fmt: skip
_RMS = _GATED | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_KEYS: dict[str, dict[str, str]] = {
    "llama": _RMS,
    "mistral": _RMS,
    "mixtral": _RMS | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "gemma": _RMS | {"attention.key_length": "head_dim"},
    "stablelm": _GATED
    | {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
    "gpt_neox": {
        "context_length": "max_position_embeddings", "feed_forward_length": "intermediate_size",
        "attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual",
    },
    "falcon": {
        "context_length": "max_position_embeddings", "feed_forward_length": "ffn_hidden_size",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "bloom": {"attention.layer_norm_epsilon": "layer_norm_epsilon"},
    "gpt2": {"context_length": "n_positions", "attention.layer_norm_epsilon": "layer_norm_epsilon"},
}  # fmt: skip
_ASSUMED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu"},
    "mistral": {"hidden_act": "silu"},
    "mixtral": {"hidden_act": "silu"},
    "gemma": {"hidden_act": "gelu_pytorch_tanh"},
    "stablelm": {"hidden_act": "silu", "qk_layernorm": False},
    "gpt_neox": {"hidden_act": "gelu", "attention_bias": True},
    "falcon": {"alibi": False, "parallel_attn": True, "bias": False, "activation": "gelu"},
    "bloom": {"apply_residual_connection_post_layernorm": False},
    "gpt2": {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
}
_SAME = {"gelu_new": "gelu_pytorch_tanh", "gelu": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
_MOST = {"context_length": 1 << 24, "vocab_size": 1 << 24}
_TRUTHS = ("use_parallel_residual",)
_REALS = ("_epsilon", "rope.freq_base", "rope.scaling.factor")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Written(NamedTuple):
    """The keys of a model, without the name of its architecture, and what they cannot say."""

    keys: dict[str, Value]
    rope_factors: Float[Tensor, "n"] | None
    """Divisors of the rotary frequencies, where they are scaled unevenly."""
    warnings: list[str]


def keys_of(config: Any, inverse_frequencies: Float[Tensor, "n"] | None) -> Written:
    """The keys of a configuration of transformers; ``inverse_frequencies`` are those the model computes with.

    Raises ExportError for what llama.cpp computes in another way.
    """
    kind = family_of(config.model_type).model_type
    for name, assumed in _ASSUMED[kind].items():
        found = getattr(config, name, assumed)
        if found != assumed and _SAME.get(str(found), found) != _SAME.get(str(assumed), assumed):
            raise ExportError(f"{name} is {found!r}", where=f"config.json: {kind}", why=f"llama.cpp takes {assumed!r}")
    keys: dict[str, Value] = {key: getattr(config, name) for key, name in (_COMMON | _KEYS[kind]).items()}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "falcon":
        keys["attention.head_count_kv"] = falcon_groups(config)
    elif kind == "bloom":
        keys |= {"context_length": getattr(config, "seq_length", 2048), "feed_forward_length": 4 * config.hidden_size,
                 "attention.head_count_kv": config.num_attention_heads}  # fmt: skip
    elif kind == "gpt2":
        keys["feed_forward_length"] = config.n_inner or 4 * config.n_embd
    elif kind == "gemma" or head != config.hidden_size // config.num_attention_heads:
        keys |= {"attention.key_length": head, "attention.value_length": head}
    keys["vocab_size"] = config.vocab_size
    warnings = []
    if (window := getattr(config, "sliding_window", None)) and window < keys["context_length"]:
        warnings.append(f"llama.cpp attends to all tokens, the model to the last {window}: equal up to that length")
    factors = None
    if rope := getattr(config, "rope_parameters", None):
        keys["rope.freq_base"] = float(rope["rope_theta"])
        keys["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
        match rope.get("rope_type", "default"):
            case "default":
                pass
            case "linear":
                keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
            case "llama3" if inverse_frequencies is not None:
                factors = _frequencies(float(rope["rope_theta"]), 2 * len(inverse_frequencies)) / inverse_frequencies
            case other:
                raise ExportError(f"rotary scaling {other!r}", where="config.json: rope_parameters",
                                  why="its frequencies are written for default, linear and llama3 only")  # fmt: skip
    return Written(keys, factors, warnings)


def config_of(found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]],
              rope_factors: Float[Tensor, "n"] | None) -> dict[str, Any]:  # fmt: skip
    """``config.json`` of an untrusted file: its key-values, the shapes of its tensors (rows first), its rope factors.

    Raises CheckpointError naming the key.
    """
    family = _family(found)
    kind, arch = family.model_type, family.arch
    own = {k.removeprefix(f"{arch}."): v for k, v in found.items() if k.startswith(f"{arch}.")}
    if "token_embd.weight" not in shapes:
        raise CheckpointError("the tensor 'token_embd.weight' is missing", where=arch)
    config: dict[str, Any] = {
        "model_type": kind, "architectures": [family.architecture], "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes, **_ASSUMED[kind],
    }  # fmt: skip
    for key, name in (_COMMON | _KEYS[kind]).items():
        if key == "attention.head_count_kv" and key not in own:
            own[key] = own.get("attention.head_count")
        config[name] = _number(own, key, arch)
    if config["num_hidden_layers"] > len(shapes):
        raise CheckpointError(
            f"{config['num_hidden_layers']} blocks of {len(shapes)} tensors", where=f"{arch}.block_count"
        )
    if config["hidden_size"] != shapes["token_embd.weight"][1] or config["hidden_size"] % config["num_attention_heads"]:
        raise CheckpointError(
            f"is {config['hidden_size']}", where=f"{arch}.embedding_length", why="not what tensors have"
        )
    head = config["hidden_size"] // config["num_attention_heads"]
    if kind == "falcon":
        config |= _falcon(_number(own, "attention.head_count_kv", arch), config["num_attention_heads"], shapes)
    elif kind == "gpt2":
        config["n_inner"] = _number(own, "feed_forward_length", arch)
        if shapes.get("position_embd.weight", (0,))[0] != config["n_positions"]:
            raise CheckpointError("is not the length of position_embd", where=f"{arch}.context_length")
    elif kind == "mixtral" and config["num_local_experts"] != shapes.get("blk.0.ffn_down_exps.weight", (0,))[0]:
        raise CheckpointError("is not what its tensors have", where=f"{arch}.expert_count")
    elif "attention.key_length" in own:
        head = config["head_dim"] = _number(own, "attention.key_length", arch)
    if kind in ("llama", "mistral"):
        config["attention_bias"] = any(".attn_" in name and name.endswith(".bias") for name in shapes)
        config["mlp_bias"] = any(".ffn_" in name and name.endswith(".bias") for name in shapes)
    if kind == "stablelm":
        config["use_qkv_bias"] = "blk.0.attn_q.bias" in shapes
    if kind not in ("bloom", "gpt2"):
        config["rope_parameters"] = _rope(own, head, arch, rope_factors)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = found.get(f"tokenizer.ggml.{key}_token_id")
        config[f"{name}_token_id"] = token if type(token) is int and token < config["vocab_size"] else None
    return config


def _rope(own: Mapping[str, Any], head: int, arch: str, factors: Tensor | None) -> dict[str, Any]:
    theta = _number(own, "rope.freq_base", arch) if "rope.freq_base" in own else 10000.0
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated = _number(own, "rope.dimension_count", arch) if "rope.dimension_count" in own else head
    if rotated % 2 or rotated > head:
        raise CheckpointError(f"is {rotated}", where=f"{arch}.rope.dimension_count", why=f"a head has {head}, in pairs")
    if rotated != head:
        rope["partial_rotary_factor"] = rotated / head
    scaling = own.get("rope.scaling.type", "none")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": _number(own, "rope.scaling.factor", arch)}
    elif scaling != "none":
        raise CheckpointError(f"is {scaling!r}", where=f"{arch}.rope.scaling.type", why="none and linear are read")
    if factors is not None:
        rope |= {"rope_type": "llama3", "factor": float(f"{float(factors.max()):.5g}"), **_LLAMA3}
        if len(factors) != rotated // 2 or not torch.allclose(_llama3(rope, rotated), factors, rtol=1e-4):
            raise CheckpointError(
                "are not those of LLaMA 3", where="rope_freqs.weight", why="no configuration says them"
            )
    return rope


def _llama3(rope: Mapping[str, Any], rotated: int) -> Float[Tensor, "n"]:
    """Divisors of frequencies (transformers, ``llama3``): long waves by ``factor``, short ones not, smooth between."""
    waves = 2 * torch.pi / _frequencies(rope["rope_theta"], rotated)
    low, high, context = (rope[name] for name in _LLAMA3)
    smooth = ((context / waves - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return divisors


def _frequencies(theta: float, rotated: int) -> Float[Tensor, "n"]:
    found: Tensor = theta ** -(torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    return found


def _falcon(groups: int, heads: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Falcon says by two norms, or by groups, that it is the newer of its two layouts."""
    two = "blk.0.attn_norm_2.weight" in shapes
    newer = two or groups not in (1, heads)
    return {"new_decoder_architecture": newer, "multi_query": groups == 1, "num_kv_heads": groups,
            "num_ln_in_parallel_attn": 2 if two else 1 if newer else None}  # fmt: skip


def _family(found: Mapping[str, Any]) -> Family:
    arch = found.get("general.architecture")
    if arch == "llama" and found.get("llama.expert_count"):
        return FAMILIES["mixtral"]
    family = next((f for f in FAMILIES.values() if f.arch == arch), None)
    if family is None:
        known = ", ".join(sorted({f.arch for f in FAMILIES.values()}))
        raise CheckpointError(f"architecture {arch!r} is not read", where="general.architecture", fix=f"one of {known}")
    return family


def _number(own: Mapping[str, Any], key: str, arch: str) -> Any:
    """What a key may hold: a truth value, a positive real number, or else a positive count.

    A float32 comes as the shortest decimal that means it.
    """
    value = own.get(key)
    if key in _TRUTHS:
        if type(value) is bool:
            return value
    elif key.endswith(_REALS):
        if isinstance(value, int | float) and type(value) is not bool and 0 < value < float("inf"):
            return float(str(np.float32(value)))
    elif type(value) is int and 0 < value <= _MOST.get(key, 1 << 20):
        return value
    raise CheckpointError(f"is {str(value)[:50]!r}", where=f"{arch}.{key}", why="no such model", fix="another file")
