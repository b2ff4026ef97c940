"""View: a block while it is transformed. What a transform may see of it, and the one place where edits are applied.

Edited parameters are kept in float32 beside the block, so that several edits do not add up roundings; the block
itself gets them in the dtype of its forward passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit.arrays import Matrix, Tensor
from lowbit.errors import RecipeError
from lowbit.formats.format import Format
from lowbit.methods.base import Edit, Entry, FoldScale, Ranges, SetEntry, SetRanges, SetWeight, Weight
from lowbit.models.edges import Edge, Run, find, fold, survives
from lowbit.models.source import Source
from lowbit.pipeline.recipe import Treatment

if TYPE_CHECKING:
    from lowbit.formats.activation import ActivationFormat


class Edges:
    """The edges of blocks, found once for all blocks of one structure and tried again on each."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], list[Edge]] = {}

    def of(self, block: nn.Module, run_block: Callable[[nn.Module], Tensor]) -> list[Edge]:
        # in float32, where factors are told apart and a trial's error is small
        copied = block if _is_float32(block) else copy.deepcopy(block).to(torch.float32)

        def run() -> Tensor:
            return run_block(copied)

        return self._of(copied, run)

    def _of(self, block: nn.Module, run: Run) -> list[Edge]:
        structure = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        known = self._known.get(structure)
        if known is None or not survives(block, run, known):
            known = self._known[structure] = find(block, run)
        return known


class View:
    """One block of a source, and the edits made to it so far. Sites and parameters go by their full names."""

    def __init__(
        self, source: Source, name: str, block: nn.Module, treatments: Mapping[str, Treatment],
        inputs: list[tuple[str, ...]], run: Callable[[nn.Module], Tensor], edges: Edges,
    ) -> None:  # fmt: skip
        self.source, self.name, self.block, self.inputs = source, name, block, inputs
        self._treatments, self._run, self._edges = treatments, run, edges
        self._found: list[Edge] | None = None
        self.edited: dict[str, Tensor] = {}
        self.ranges: dict[str, Ranges] = {}
        self.entries: dict[str, Entry] = {}

    @property
    def edges(self) -> list[Edge]:
        if self._found is None:
            self._found = self._edges.of(self.block, self._run)
        return self._found

    def full(self, name: str) -> str:
        """The full name of a module of the block, as edges name it."""
        return f"{self.name}.{name}"

    def module(self, site: str) -> nn.Module:
        return self.block.get_submodule(site.removeprefix(self.name + "."))

    def parameter(self, name: str) -> Tensor:
        """A parameter in float32: edited, or as the file has it, not as the forward pass rounded it."""
        if name in self.edited:
            return self.edited[name]
        held = self.block.get_parameter(name.removeprefix(self.name + "."))
        return self.source.tensor(name, tuple(held.shape), held.device).to(torch.float32)

    def weight(self, site: str) -> Matrix:
        W = self.original(site)
        entry = self.entries.get(site)
        return W if entry is None else entry.weight(W)

    def original(self, site: str) -> Matrix:
        """A linear's matrix in terms of the inputs that the block gives it."""
        return _as_matrix(self.module(site), self.parameter(f"{site}.weight")).contiguous()

    def to_encode(self, site: str) -> Weight:
        return Weight(site, self.weight(site), self.ranges.get(site))

    def format(self, site: str) -> Format | None:
        treatment = self._treatments.get(site)
        return None if treatment is None else treatment.format

    def activation(self, site: str) -> ActivationFormat | None:
        treatment = self._treatments.get(site)
        return None if treatment is None else treatment.activations

    def apply(self, edit: Edit) -> None:
        """Make an edit; the only place where a transform's result takes effect."""
        match edit:
            case FoldScale(edge, scale):
                changed = fold(self.block, edge, scale, lambda name: self.parameter(self.full(name)))
                for name, value in changed.items():
                    self._set(self.full(name), value)
            case SetWeight(site, W):
                self._set(f"{site}.weight", _as_matrix(self.module(site), W).contiguous())
            case SetRanges(site, ranges):
                self.ranges[site] = ranges
            case SetEntry(sites, entry):
                if taken := next((site for site in sites if site in self.entries), None):
                    raise RecipeError(
                        "two steps change how inputs enter", where=taken, fix="one of them: rotate or qllm, not both"
                    )
                self.entries |= dict.fromkeys(sites, entry)

    def _set(self, name: str, value: Tensor) -> None:
        self.edited[name] = value
        owner, _, leaf = name.removeprefix(self.name + ".").rpartition(".")
        module = self.block.get_submodule(owner)
        held = module._parameters[leaf]
        assert held is not None
        module._parameters[leaf] = nn.Parameter(value.to(held.dtype), requires_grad=False)


def _is_float32(block: nn.Module) -> bool:
    return all(p.dtype == torch.float32 for p in block.parameters())


def _as_matrix(module: nn.Module, stored: Tensor) -> Tensor:
    """A linear's parameter as (out, in), or such a matrix as the module stores it: the same transposition, or none."""
    return stored.t() if isinstance(module, Conv1D) else stored
