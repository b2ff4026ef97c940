"""Fisher information of every linear's outputs: how sharply the predictions answer to a change of them.

One backward pass through the whole model with memory for one block: every block is replaced by a stand-in that loads
its weights when it is called, and is checkpointed (Chen et al., arXiv 1604.06174), so that the backward pass loads
it again. What is held for the whole depth is one hidden state a block.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowbit.arrays import Float, Int, Tensor
from lowbit.models.source import Source


class Fisher(NamedTuple):
    """Squared gradients of a linear's outputs: their mean over tokens, and each token's share of them."""

    outputs: Float[Tensor, "out"]
    """``E[(d log p / d y_o)²]`` over the tokens that reach the linear"""
    tokens: Float[Tensor, "tokens"]
    """the sum over outputs for every such token in order, relative to its mean"""


def output_fisher(
    source: Source, tokens: Int[Tensor, "windows length"], sites: Set[str], dtype: torch.dtype, batch: int,
    on_block: Callable[[], object] = lambda: None,
) -> dict[str, Fisher]:  # fmt: skip
    """The Fisher information of each site's outputs, margins over tokens and over outputs.

    ``log p`` is the log-likelihood of labels drawn from the model's own predictions (seeded), one a position, summed
    over a window; so the expectation is the diagonal of the Fisher information, not of its empirical version. Sites
    that no token reaches are left out. ``on_block`` is called twice a block for every batch of windows. Cost: three
    forward passes and what a backward pass through the activations takes; weights get no gradient.
    """
    seen = _Seen(sites)
    model = _shell(source, dtype, seen, on_block)
    draw = torch.Generator().manual_seed(0)
    for windows in tokens.split(batch):
        logits = model(input_ids=windows, use_cache=False).logits.flatten(0, 1).to(torch.float32)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw).squeeze(1)
        cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    return {site: _margins(total, torch.cat(seen.tokens[site])) for site, total in seen.outputs.items()}


def _margins(outputs: Float[Tensor, "out"], tokens: Float[Tensor, "tokens"]) -> Fisher:
    mean = tokens.mean()
    return Fisher(outputs / tokens.shape[0], tokens / mean if mean > 0 else torch.ones_like(tokens))


class _Seen:
    """Squared gradients of outputs by site: summed over tokens, and over outputs."""

    def __init__(self, sites: Set[str]) -> None:
        self.sites = sites
        self.outputs: dict[str, Tensor] = {}
        self.tokens: defaultdict[str, list[Tensor]] = defaultdict(list)

    def watch(self, site: str, module: nn.Module) -> None:
        def forward(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            out.register_hook(lambda gradient: self.add(site, gradient))

        module.register_forward_hook(forward)

    def add(self, site: str, gradient: Tensor) -> None:
        square = gradient.reshape(-1, gradient.shape[-1]).to(torch.float32).square()
        self.outputs[site] = self.outputs.get(site, 0.0) + square.sum(0)
        self.tokens[site].append(square.sum(1))


class _Lazy(nn.Module):
    """Stands for a block: has its weights only while it runs, forward and once more backward."""

    def __init__(
        self, source: Source, name: str, dtype: torch.dtype, seen: _Seen, on_block: Callable[[], object]
    ) -> None:
        super().__init__()
        self.source, self.name, self.dtype, self.seen, self.on_block = source, name, dtype, seen, on_block
        self._block = [source.skeleton.get_submodule(name)]  # in a list: not a submodule, only asked for its attributes

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hidden.requires_grad:  # the first block: the embedding gets no gradient
            hidden = hidden.detach().requires_grad_()
        return checkpoint(self._run, hidden, *args, use_reentrant=False, **kwargs)

    def _run(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = self.source.load(self.name, self.dtype)
        for name, module in block.named_modules():
            if (site := f"{self.name}.{name}") in self.seen.sites:
                self.seen.watch(site, module)  # the gradient comes to what the first call computed, and only once
        self.on_block()
        return block(hidden, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)


def _shell(source: Source, dtype: torch.dtype, seen: _Seen, on_block: Callable[[], object]) -> PreTrainedModel:
    """The model with everything loaded but its blocks."""
    model: PreTrainedModel = copy.deepcopy(source.skeleton)
    path, _, _ = source.blocks[0].rpartition(".")
    parent, _, leaf = path.rpartition(".")
    stands = nn.ModuleList([_Lazy(source, name, dtype, seen, on_block) for name in source.blocks])
    setattr(model.get_submodule(parent), leaf, stands)
    head = model.get_output_embeddings()
    for name, child in model.named_children():
        if child is not head or not source.tied:
            source.fill(child, name, dtype)
    if source.tied:
        head.weight = model.get_input_embeddings().weight
    return model
