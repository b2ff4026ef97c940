"""Random LLaMAs of two sizes: low-bit checkpoint, the same codes as GGUF, and the small one in bf16; see streaming.py.

Every block has the same weights under its own names: values do not change speed, and so only one block is ever in
memory. Disk, in q4_0: 1b 6.5 GB (bf16 4.1), 7b 8.2 GB and 4 more while the GGUF file is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2560, "intermediate_size": 7680, "num_attention_heads": 20, "num_key_value_heads": 20,
        "num_hidden_layers": 24, "vocab_size": 8192, "max_position_embeddings": 1024,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "num_hidden_layers": 32, "vocab_size": 32000, "max_position_embeddings": 1024,
    },
}  # fmt: skip
LOW, DENSE, GGUF = "low", "bf16", "model.gguf"
"""What a folder holds."""


def make(folder: Path, shape: str, fmt: str, gguf: bool = True) -> None:
    """All files of a shape; the bf16 original for ``1b`` only."""
    import torch
    from transformers import LlamaConfig

    torch.manual_seed(0)
    sizes = SHAPES[shape]
    config: Any = LlamaConfig(**sizes, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    linears = {f"self_attn.{n}_proj": (d, d) for n in "qkvo"} | {
        "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    weights = {name: (torch.randn(size) * size[1] ** -0.5).bfloat16() for name, size in linears.items()}
    norms = {f"{name}_layernorm.weight": torch.ones(d).bfloat16() for name in ("input", "post_attention")}
    ends = {
        "model.embed_tokens.weight": torch.randn(v, d).bfloat16(), "model.norm.weight": torch.ones(d).bfloat16(),
        "lm_head.weight": (torch.randn(v, d) * d**-0.5).bfloat16(),
    }  # fmt: skip
    dense = folder / DENSE
    dense.mkdir(parents=True)
    config.save_pretrained(dense)
    _bytes_as_tokens().save_pretrained(dense)
    if shape == "1b":
        _write_dense(dense, config.num_hidden_layers, weights, norms, ends)
    _write_low(folder, config, fmt, weights, norms, ends)
    if gguf:
        from lowbit.io.gguf.write import write
        from lowbit.io.opening import open_low_bit

        write(open_low_bit(folder / LOW), folder / GGUF)


def _write_dense(
    folder: Path, blocks: int, weights: dict[str, Any], norms: dict[str, Any], ends: dict[str, Any]
) -> None:
    """A file a block, which is also how AirLLM wants them; see streaming_subjects.py."""
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    parts = {name.removesuffix(".weight"): {name: tensor} for name, tensor in ends.items()}
    for i in range(blocks):
        block = {f"{name}.weight": tensor for name, tensor in weights.items()} | norms
        parts[f"model.layers.{i}"] = {f"model.layers.{i}.{name}": tensor for name, tensor in block.items()}
    for name, tensors in parts.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _write_low(
    folder: Path, config: Any, fmt: str, weights: dict[str, Any], norms: dict[str, Any], ends: dict[str, Any]
) -> None:
    from lowbit.calibration.stats import Stats
    from lowbit.formats.presets import preset
    from lowbit.io.native import Writer
    from lowbit.methods.base import Weight, method
    from lowbit.models.source import Source
    from lowbit.models.store import Memory
    from lowbit.pipeline.recipe import parse
    from lowbit.pipeline.result import Finished

    blocks = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    held = {f"{block}.{name}": tensor for block in blocks for name, tensor in norms.items()}
    source = Source("random", config, Memory(ends | held), folder / DENSE)
    codes = {n: method("rtn")(Weight(n, w.float()), Stats(n, {}), preset(fmt)) for n, w in weights.items()}
    with Writer(folder / LOW, source, parse(f"rtn:{fmt}"), None, identity="random") as sink:
        for block in blocks:
            named = {f"{block}.{name}": q for name, q in codes.items()}
            sink.write(block, source.skeleton.get_submodule(block), Finished(named, {}, {}))
        sink.finish({"seconds": 0.0, "cpu_seconds": 0.0, "resumed": False})


def _bytes_as_tokens() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner)
