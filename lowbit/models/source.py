"""Source: a model whose weights are visited block by block and never all at once.

source = open_model("path/to/model")      # a directory, a .gguf file, a hub id, or the demo's name
source.sites("model.layers.0")            # without loading anything
block = source.load("model.layers.0", torch.bfloat16)
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lowbit import digest
from lowbit.arrays import Tensor
from lowbit.errors import LowbitError, ModelError, WeightError
from lowbit.models.graph import Site, block_names, outside_blocks, sites_of, split_experts, stored
from lowbit.models.store import Files, Memory, TensorStore, read_json, require_counts


class Source:
    """A causal language model: its structure on the meta device, its weights behind a store."""

    def __init__(self, name: str, config: Any, store: TensorStore, root: Path | None) -> None:
        self.name, self.config, self.store, self.root = name, config, store, root
        self.skeleton = _skeleton(config)
        split_experts(self.skeleton)
        self.blocks = block_names(self.skeleton)
        self._known = set(store.names())

    @functools.cached_property
    def digest(self) -> str:
        """Identity of the model: its configuration and every byte of its weights."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _VOLATILE}
        return digest.of_value([_jsonable(config), self.store.digest()])

    @functools.cached_property
    def tokenizer(self) -> Any:
        if self.root is None:
            raise ModelError("has no tokenizer", where=self.name, fix="pass tokens, or a model directory")
        try:
            return AutoTokenizer.from_pretrained(self.root, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"the tokenizer cannot be read: {error}", where=str(self.root)) from error

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.config.get_text_config(decoder=True).tie_word_embeddings)

    def sites(self, block: str) -> list[Site]:
        return sites_of(self.skeleton.get_submodule(block), block)

    def head_sites(self) -> list[Site]:
        """Linears outside the blocks: the head, unless it is the embedding."""
        names = {name for name, _ in outside_blocks(self.skeleton, self.blocks)}
        return [site for site in sites_of(self.skeleton, "") if f"{site.name}.weight" in names]

    def load(self, prefix: str, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
        """A copy of the module ``prefix`` with its weights in ``dtype``; the caller drops it when done."""
        return self.fill(copy.deepcopy(self.skeleton.get_submodule(prefix)), prefix, dtype, device).eval()

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
        """Give a module of the skeleton its weights in ``dtype``, in place; buffers keep their own dtype."""
        for name, held in list(stored(module)):
            full, (parent, _, leaf) = f"{prefix}.{name}", name.rpartition(".")
            owner = module.get_submodule(parent)
            if isinstance(held, nn.Parameter):
                tensor = self.tensor(full, tuple(held.shape), device).to(dtype)
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            elif self.has(full):
                owner._buffers[leaf] = self.tensor(full, tuple(held.shape)).to(held.dtype)
        return module

    def has(self, name: str) -> bool:
        """Whether the file holds a weight of this very name (a buffer that it lacks is computed)."""
        return any(spelling in self._known for spelling in _spellings(name, self.skeleton.base_model_prefix))

    def tensor(self, name: str, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        """The weight that the model calls ``name``, whatever its file calls it, checked for shape and finiteness."""
        tensor = self._find(name)
        if tuple(tensor.shape) != shape:
            raise WeightError(f"has shape {tuple(tensor.shape)}, the configuration says {shape}", where=name)
        if device is not None:
            tensor = tensor.to(device)  # before anything else: a GPU checks and converts faster
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightError(
                f"{bad} of {tensor.numel()} values are NaN or infinite", where=name,
                why="a quantized layer would spread them over whole blocks", fix="another copy of the model",
            )  # fmt: skip
        return tensor

    def _find(self, name: str) -> Tensor:
        for candidate in _spellings(name, self.skeleton.base_model_prefix):
            if candidate in self._known:
                return self.store.get(candidate)
            if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate_up_proj|down_proj)\.weight", candidate):
                experts, e, leaf = match[1], int(match[2]), match[3]
                if f"{experts}.{leaf}" in self._known:  # fused in the file: (experts, out, in)
                    return self.store.get(f"{experts}.{leaf}", e)
                for parts in _EXPERT_PARTS[leaf]:  # one by one in the file
                    names = [f"{experts}.{e}.{part}.weight" for part in parts]
                    if all(n in self._known for n in names):
                        return torch.cat([self.store.get(n) for n in names])
        return self.store.get(name)  # raises, naming it


_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache"}
_EXPERT_PARTS = {"gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")), "down_proj": (("w2",), ("down_proj",))}


def _spellings(name: str, base: str) -> list[str]:
    """How files spell a parameter: as the model does, by older names, or without the model's base prefix."""
    spellings = [name, "embed_out.weight"] if name == "lm_head.weight" else [name]
    if base and name.startswith(base + "."):
        spellings.append(name.removeprefix(base + "."))
    return spellings + [s.replace(".mlp.", ".block_sparse_moe.") for s in spellings]


def _skeleton(config: Any) -> PreTrainedModel:
    """The model with parameters on the meta device and real (computed) buffers."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model.eval()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters are put on the meta device the moment a module registers them; buffers stay real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def of_directory(root: Path, name: str | None = None) -> Source:
    """A Hugging Face directory with safetensors. No code from it is run."""
    if not root.is_dir():
        raise ModelError("is no directory", where=str(root), fix="a model directory, a .gguf file or 'smollm2'")
    raw = read_json(root / "config.json")
    if "auto_map" in raw and raw.get("model_type") not in _known_model_types():
        raise ModelError(
            f"model type {raw.get('model_type')!r} needs code from its folder", where=str(root),
            why="code from model folders is never run", fix="a model that transformers supports itself",
        )  # fmt: skip
    if (raw.get("quantization_config") or {}).get("quant_method") == "lowbit":
        raise ModelError("is already a low-bit checkpoint", where=str(root), fix="the original model")
    try:
        config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        files = Files(root)
        require_counts(raw, files, str(root))
        return Source(name or root.resolve().name, config, files, root)
    except LowbitError:
        raise
    except Exception as error:  # an untrusted configuration can make transformers and torch raise anything
        raise ModelError(f"is no model that transformers knows: {error}", where=str(root)) from error


def of_model(model: PreTrainedModel) -> Source:
    """A model in memory; its weights are read, never changed."""
    return Source(type(model).__name__, model.config, Memory(model.state_dict()), None)


def _known_model_types() -> set[str]:
    from transformers import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())
