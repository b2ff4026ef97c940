"""Coverage: which share of a model a recipe really quantizes. Nothing is skipped in silence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit.errors import CoverageError, RecipeError
from lowbit.models.graph import Site, is_linear, other_matrices, outside_blocks
from lowbit.models.source import Source
from lowbit.pipeline.recipe import Recipe, Treatment


@dataclass(frozen=True)
class Kept:
    """Parameters that stay as they are, and why."""

    name: str
    parameters: int
    why: str


@dataclass(frozen=True)
class Coverage:
    """How every matrix of a model is treated by a recipe."""

    treated: dict[str, tuple[Site, Treatment]]
    kept: tuple[Kept, ...]
    parameters: int

    @property
    def quantized(self) -> int:
        return sum(math.prod(site.shape) for site, _ in self.treated.values())

    @property
    def share(self) -> float:
        """Share of all parameters that become codes."""
        return self.quantized / self.parameters

    def in_block(self, block: str) -> dict[str, tuple[Site, Treatment]]:
        return {name: value for name, value in self.treated.items() if name.startswith(block + ".")}


def audit(source: Source, recipe: Recipe) -> Coverage:
    """The treatment of every site, checked before any work is done.

    Raises CoverageError for matrices inside the blocks that the recipe neither quantizes nor keeps with a reason,
    RecipeError for an override that matches nothing or names what cannot be quantized, and FormatError for a shape
    that a format cannot take.
    """
    in_blocks = [site for block in source.blocks for site in source.sites(block)]
    heads = source.head_sites()
    recipe.check([site.name for site in [*in_blocks, *heads]])
    treated: dict[str, tuple[Site, Treatment]] = {}
    kept: list[Kept] = []
    for site in in_blocks:
        _decide(recipe, site, treated, kept)
    named = [rule.sites for rule in recipe.override if rule.keep is None]
    for site in heads:
        if site.name in named:
            raise RecipeError(
                "the head cannot be quantized yet", where=site.name, fix="leave it out: it stays in 16 bit",
            )  # fmt: skip
    unknown = []
    for block in source.blocks:
        for name, shape in other_matrices(source.skeleton.get_submodule(block), block):
            if _is_router(source, name):
                kept.append(Kept(name, math.prod(shape), "router"))
            else:
                unknown.append((name, shape))
    if unknown:
        name, shape = unknown[0]
        raise CoverageError(
            f"{len(unknown)} matrices in the blocks belong to no linear that lowbit knows; the first is {tuple(shape)}",
            where=name, why="leaving them in 16 bit in silence would make sizes and quality look better than they are",
            fix="an architecture whose experts are plain or gate_up_proj/down_proj",
        )  # fmt: skip
    for name, parameter in outside_blocks(source.skeleton, source.blocks):
        if parameter.ndim >= 2:
            kept.append(Kept(name, parameter.numel(), "embedding or head: 16 bit unless a recipe names it"))
    if not treated:
        raise CoverageError("the recipe quantizes nothing", where=recipe.line, fix="fewer overrides with keep")
    total = sum(p.numel() for p in source.skeleton.parameters())
    return Coverage(treated, tuple(kept), total)


def _decide(recipe: Recipe, site: Site, treated: dict[str, tuple[Site, Treatment]], kept: list[Kept]) -> None:
    decision = recipe.treatment(site.name)
    if isinstance(decision, str):
        kept.append(Kept(site.name, math.prod(site.shape), decision))
    else:
        decision.format.check(site.shape)
        treated[site.name] = (site, decision)


def _is_router(source: Source, name: str) -> bool:
    """A matrix of as many rows as there are experts, held by a module that is no linear."""
    module = source.skeleton.get_submodule(name.rpartition(".")[0])
    return not is_linear(module) and getattr(module, "num_experts", None) == module.weight.shape[0]  # type: ignore[union-attr, index]
