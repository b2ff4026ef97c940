"""What the parts of a decoder are: its blocks, the linears in them, experts, embedding and head.

Nothing here knows a family by name. Blocks are the module list that the configuration counts; a linear is a
``torch.nn.Linear`` or a transformers ``Conv1D``; fused experts (three-dimensional parameters) are turned into
modules of ordinary linears, so that every matrix of a mixture of experts is a site like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowbit.arrays import Float, Int, Matrix, Tensor
from lowbit.errors import ModelError


@dataclass(frozen=True)
class Site:
    """A linear that may be quantized: its full name in the model and its shape as ``y = x @ W.T`` uses it."""

    name: str
    shape: tuple[int, int]
    bias: bool

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def matrix(module: nn.Module) -> Matrix:
    """The weight of a linear as (out, in); a view. GPT-2's ``Conv1D`` stores the transpose."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight


def set_matrix(module: nn.Module, w: Matrix) -> None:
    """Replace the weight of a linear by ``w`` (out, in), keeping the module's own layout and dtype."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    data = w.t() if isinstance(module, Conv1D) else w
    module.weight = nn.Parameter(data.to(weight.dtype).contiguous(), requires_grad=False)


def block_names(model: PreTrainedModel) -> list[str]:
    """Full names of the decoder blocks, in order.

    Raises ModelError when no module list has as many entries as the configuration has layers.
    """
    config = model.config.get_text_config(decoder=True)
    depth = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and depth:
            return [f"{name}.{i}" for i in range(depth)]
    raise ModelError(
        f"found no list of {depth} decoder blocks", where=type(model).__name__,
        why="lowbit works on decoder models block by block", fix="a causal language model of transformers",
    )  # fmt: skip


def sites_of(module: nn.Module, prefix: str) -> list[Site]:
    """Every linear below ``module``, in the order of its definition."""
    found = []
    for name, child in module.named_modules():
        if is_linear(child):
            rows, columns = matrix(child).shape
            found.append(Site(_join(prefix, name), (rows, columns), child.bias is not None))
    return found


def stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of a module: its parameters (tied ones once) and persistent buffers, by their names."""
    yield from module.named_parameters()
    kept = module.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def other_matrices(module: nn.Module, prefix: str) -> list[tuple[str, tuple[int, ...]]]:
    """Parameters of two or more dimensions that belong to no linear (routers, fused experts, embeddings)."""
    owned = {id(child.weight) for child in module.modules() if is_linear(child)}
    return [
        (_join(prefix, name), tuple(p.shape))
        for name, p in module.named_parameters()
        if p.ndim >= 2 and id(p) not in owned
    ]


def routers(module: nn.Module, prefix: str) -> set[str]:
    """Names of the matrices that choose experts: one row an expert, held beside the list of experts."""
    found = set()
    for name, parent in module.named_modules():
        experts = parent._modules.get("experts")
        if isinstance(experts, nn.ModuleList):
            found |= {
                _join(prefix, _join(name, leaf))
                for leaf, p in parent.named_parameters()
                if p.ndim == 2 and len(p) == len(experts) and not leaf.startswith("experts.")
            }
    return found


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


class Experts(nn.ModuleList):
    """The experts of one mixture layer as separate linears; computes what the fused module computes."""

    def __init__(self, fused: nn.Module) -> None:
        gate_up: Tensor = fused.gate_up_proj  # type: ignore[assignment]  # (experts, 2 * ffn, hidden)
        down: Tensor = fused.down_proj  # type: ignore[assignment]  # (experts, hidden, ffn)
        super().__init__(Expert(gate_up[e], down[e], fused.act_fn) for e in range(gate_up.shape[0]))  # type: ignore[arg-type]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Float[Tensor, "tokens d"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens d"]:
        out = torch.zeros_like(hidden_states)
        for e, expert in enumerate(self):
            token, slot = torch.where(top_k_index == e)
            if token.numel():
                mixed = expert(hidden_states[token]) * top_k_weights[token, slot, None]
                out.index_add_(0, token, mixed.to(out.dtype))
        return out


class Expert(nn.Module):
    """One gated feed-forward expert over views of the fused parameters."""

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = _linear_over(gate_up)
        self.down_proj = _linear_over(down)
        self.act_fn = act_fn

    def forward(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.act_fn(gate) * up)
        return out


def _linear_over(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds gated experts as transformers 5 fuses them, computed its common way, and nothing else.

    Experts with biases, transposed or interleaved weights, a norm or a gate of their own are not: :class:`Expert`
    would compute something else.
    """
    names = {name for name, _ in module.named_parameters()}
    if names != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return False
    gate_up, down = tuple(module.gate_up_proj.shape), tuple(module.down_proj.shape)  # type: ignore[union-attr, arg-type]
    if len(down) != 3 or gate_up != (down[0], 2 * down[2], down[1]):
        return False
    own_gate = getattr(getattr(module, "_apply_gate", None), "__module__", None) != "transformers.integrations.moe"
    common = all(getattr(module, key, None) is value for key, value in _COMMON.items())
    return common and not own_gate and all(getattr(module, key, value) is value for key, value in _LATER.items())


_COMMON = {"has_gate": True, "has_bias": False, "is_transposed": False}
_LATER = {"has_post_expert_norm": False, "is_concatenated": True}
"""What later versions of transformers 5 can say; earlier ones know nothing else."""


def split_experts(model: nn.Module) -> int:
    """Replace every fused experts module by :class:`Experts`, in place; returns how many."""
    fused = [(name, module) for name, module in model.named_modules() if is_fused_experts(module)]
    for name, module in fused:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Experts(module))
    return len(fused)


def outside_blocks(model: PreTrainedModel, blocks: list[str]) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds beside the blocks: embeddings, final norm, head (tied ones once)."""
    prefix = blocks[0].rpartition(".")[0] + "."
    return ((name, tensor) for name, tensor in stored(model) if not name.startswith(prefix))
