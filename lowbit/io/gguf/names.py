"""Where each tensor of a model lies in a GGUF file: its name there, and which of its rows go where.

llama.cpp wants some rows in another order than transformers: halves of rotary heads interleaved (LLaMA), queries, keys
and values of all heads one after another (BLOOM, GPT-NeoX, Falcon), all experts of a layer in one tensor. All of that
moves whole rows, so it works on packed rows and loses nothing. Names are those of ``gguf``'s own tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from lowbit.arrays import Int, Tensor
from lowbit.errors import ExportError, nearest
from lowbit.formats.blocks import ALL
from lowbit.models.graph import is_linear, stored
from lowbit.models.source import Source

Order = Int[Tensor, "rows"]


class Place(NamedTuple):
    """A tensor of a file, or one expert of it, as rows of a tensor of the model."""

    name: str
    rows: slice = ALL
    """Which rows of the model's tensor."""
    order: Order | None = None
    """Row i of the file is row ``order[i]`` of the model's."""
    expert: int | None = None


@dataclass(frozen=True)
class Family:
    """A family of models that llama.cpp runs."""

    model_type: str
    arch: str
    architecture: str
    """The class in ``architectures``."""
    orders: tuple[tuple[str, Callable[[Any, int], Order]], ...] = ()
    """By the end of a module's name: the order of its rows, from the configuration and their number."""
    norm_plus_one: bool = False
    """Norms multiply by one more than what transformers stores."""
    drop: str = ""
    """A prefix of names that ``gguf``'s tables do not have."""
    biases: bool = False
    """Whether its linears may have biases that the family usually lacks."""


def _halves(heads: int, rows: int) -> Order:
    """Rotary pairs (j, j + d/2) side by side."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _thirds(config: Any, rows: int) -> Order:
    """From queries, keys and values of each head to those of all."""
    return torch.arange(rows).view(config.num_attention_heads, 3, -1).transpose(0, 1).reshape(-1)


def falcon_groups(config: Any) -> int:
    """Heads of keys and values: one for all, one each, or one a group."""
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _falcon(config: Any, rows: int) -> Order:
    """From the queries of a group, its key and its value, to those of all groups."""
    groups = falcon_groups(config)
    grouped = torch.arange(rows).view(groups, config.num_attention_heads // groups + 2, -1)
    return torch.cat([grouped[:, :-2].reshape(-1), grouped[:, -2].reshape(-1), grouped[:, -1].reshape(-1)])


_ROTARY = (
    ("self_attn.q_proj", lambda config, rows: _halves(config.num_attention_heads, rows)),
    ("self_attn.k_proj", lambda config, rows: _halves(config.num_key_value_heads, rows)),
)

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "llama", "LlamaForCausalLM", _ROTARY, biases=True),
        Family("mistral", "llama", "MistralForCausalLM", _ROTARY, biases=True),
        Family("mixtral", "llama", "MixtralForCausalLM", _ROTARY),
        Family("falcon", "falcon", "FalconForCausalLM", (("query_key_value", _falcon),)),
        Family("bloom", "bloom", "BloomForCausalLM", (("query_key_value", _thirds),), drop="transformer."),
        Family("gpt2", "gpt2", "GPT2LMHeadModel"),
        Family("gpt_neox", "gptneox", "GPTNeoXForCausalLM", (("query_key_value", _thirds),)),
        Family("stablelm", "stablelm", "StableLmForCausalLM"),
        Family("gemma", "gemma", "GemmaForCausalLM", norm_plus_one=True),
    )
}
"""By transformers' model type."""


def family_of(model_type: str) -> Family:
    """Raises ExportError for a family that llama.cpp does not run, or that is not written yet."""
    if model_type not in FAMILIES:
        raise ExportError(
            f"models of type {model_type!r} are not written as GGUF", where="gguf",
            why="llama.cpp does not run them" if model_type == "opt" else "their tensors have no names in this table",
            fix=nearest(model_type, FAMILIES) if model_type != "opt" else "--to compressed-tensors, gptq or bf16",
        )  # fmt: skip
    return FAMILIES[model_type]


class Names:
    """Every tensor of a model and where it lies."""

    def __init__(self, source: Source) -> None:
        """Raises ExportError for a family, or a parameter, that has no name in GGUF files."""
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        self.family = family_of(source.config.model_type)
        self._config = source.config
        arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == self.family.arch)
        self._table = get_tensor_name_map(arch, len(source.blocks))
        linears = {f"{name}.weight": m for name, m in source.skeleton.named_modules() if is_linear(m)}
        self.linears = frozenset(linears)
        """Names of the weights of linears."""
        self.transposed = frozenset(name for name, m in linears.items() if isinstance(m, Conv1D))
        """Weights that the model itself stores as (in, out)."""
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(tensor.shape[::-1] if name in self.transposed else tensor.shape)
            for name, tensor in stored(source.skeleton)
        }
        """Of parameters by the model's names, weights of linears as (out, in)."""
        self.places = {name: self.find(name, shape[0]) for name, shape in self.shapes.items()}

    def find(self, name: str, rows: int) -> list[Place]:
        """Where a tensor of so many rows lies; biases that the model lacks have a place, too. Raises ExportError."""
        if found := _expert(name, rows):
            return found
        spelled: str | None = self._table.get_name(name.removeprefix(self.family.drop), (".weight", ".bias"))
        if spelled is None:
            raise ExportError("has no name in GGUF files of this family", where=name, why=f"family {self.family.arch}")
        return [Place(spelled, order=_order(self.family, self._config, name, rows))]


def _order(family: Family, config: Any, name: str, rows: int) -> Order | None:
    module = name.rpartition(".")[0]
    return next((order(config, rows) for end, order in family.orders if module.endswith(end)), None)


_EXPERT = re.compile(r".*\.layers\.(?P<layer>\d+)\..*\.experts\.(?P<e>\d+)\.(?P<leaf>gate_up_proj|down_proj)\.weight")


def _expert(name: str, rows: int) -> list[Place]:
    """The places of an expert's matrix: gate and up projections are one in the model and two in the file."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return []
    block, e = f"blk.{match['layer']}", int(match["e"])
    if match["leaf"] == "down_proj":
        return [Place(f"{block}.ffn_down_exps.weight", expert=e)]
    return [
        Place(f"{block}.ffn_gate_exps.weight", slice(0, rows // 2), expert=e),
        Place(f"{block}.ffn_up_exps.weight", slice(rows // 2, rows), expert=e),
    ]
