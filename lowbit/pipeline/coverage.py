"""Coverage: which share of a model a recipe really quantizes. Nothing is skipped in silence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lowbit.errors import CoverageError, FormatError, RecipeError
from lowbit.models.graph import Site, other_matrices, outside_blocks, routers
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

    @property
    def nbytes(self) -> int:
        """What the codes of all of them take; a lower bound where a method decides by the inputs (llmint8)."""
        return sum(code_bytes(treatment, site.shape) for site, treatment in self.treated.values())

    @property
    def kept_nbytes(self) -> int:
        """What stays in 16 bits takes."""
        return 2 * (self.parameters - self.quantized)

    def in_block(self, block: str) -> dict[str, tuple[Site, Treatment]]:
        return {name: value for name, value in self.treated.items() if name.startswith(block + ".")}


def code_bytes(treatment: Treatment, shape: tuple[int, int]) -> int:
    """What one linear will take: its format's bytes, and what its method adds to them."""
    method: Any = treatment.encoder
    if hasattr(method, "nbytes"):
        return int(method.nbytes(treatment.format, shape))
    extra = int(method.extra_nbytes(shape)) if hasattr(method, "extra_nbytes") else 0
    return treatment.format.nbytes(shape) + extra


def audit(source: Source, recipe: Recipe) -> Coverage:
    """The treatment of every site, checked before any work is done.

    Raises CoverageError for matrices inside the blocks that the recipe neither quantizes nor keeps with a reason,
    RecipeError for an override that matches nothing or names what cannot be quantized, and FormatError for a shape
    that a format cannot take.
    """
    modules = {block: source.skeleton.get_submodule(block) for block in source.blocks}
    choosers = {name for block, module in modules.items() for name in routers(module, block)}
    in_blocks = [site for block in source.blocks for site in source.sites(block)]
    heads = [site.name for site in source.head_sites()]
    apart = {site.name for site in in_blocks if f"{site.name}.weight" in choosers}  # 16 bit unless named
    recipe.check([*(site.name for site in in_blocks), *heads])
    named = _named_apart(recipe, apart, heads, [site.name for site in in_blocks if site.name not in apart])
    treated: dict[str, tuple[Site, Treatment]] = {}
    kept: list[Kept] = []
    for site in in_blocks:
        decision = recipe.treatment(site.name) if site.name not in apart - named else ROUTER
        if isinstance(decision, str):
            kept.append(Kept(site.name, math.prod(site.shape), decision))
        else:
            _takes(decision, site)
            treated[site.name] = (site, decision)
    unknown = []
    for block, module in modules.items():
        for name, shape in other_matrices(module, block):
            if name in choosers:
                kept.append(Kept(name, math.prod(shape), ROUTER))
            else:
                unknown.append((name, shape))
    if unknown:
        name, shape = max(unknown, key=lambda matrix: math.prod(matrix[1]))
        raise CoverageError(
            f"{len(unknown)} matrices in the blocks belong to no linear that lowbit knows; the largest is {shape}",
            where=name, why="leaving them in 16 bit in silence would make sizes and quality look better than they are",
            fix="an architecture whose experts are plain linears or the common fused gate_up_proj and down_proj",
        )  # fmt: skip
    for name, tensor in outside_blocks(source.skeleton, source.blocks):
        if tensor.ndim >= 2:
            why = recipe.treatment(name.removesuffix(".weight"))
            kept.append(Kept(name, tensor.numel(), why if isinstance(why, str) else OUTSIDE))
    if not treated and recipe.encoder is not None:
        raise CoverageError("the recipe quantizes nothing", where=recipe.line, fix="fewer overrides with keep")
    total = sum(p.numel() for p in source.skeleton.parameters())
    return Coverage(treated, tuple(kept), total)


ROUTER = "router: 16 bit unless a recipe names it"
OUTSIDE = "embedding or head: 16 bit"


def _named_apart(recipe: Recipe, apart: set[str], heads: list[str], ordinary: list[str]) -> set[str]:
    """Routers that an override names: a pattern that matches some of them and no ordinary linear.

    Raises RecipeError when such a pattern asks for codes in the head.
    """
    named: set[str] = set()
    for rule in recipe.override:
        if rule.keep is not None or any(rule.matches(name) for name in ordinary):
            continue
        named |= {name for name in apart if rule.matches(name)}
        if head := next((name for name in heads if rule.matches(name)), None):
            raise RecipeError("the head cannot be quantized yet", where=head, fix="leave it out: it stays in 16 bit")
    return named


def _takes(treatment: Treatment, site: Site) -> None:
    try:
        treatment.format.check(site.shape)
    except FormatError as error:
        raise FormatError(error.what, where=site.name, why=error.why, fix=error.fix) from error
