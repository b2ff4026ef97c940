"""Allocate: which format each linear gets, so that a whole checkpoint fits a budget of bytes and loses the least.

What an engine fuses keeps one format (:func:`lowbit.pipeline.sensitivity.fused`); all else is free. Bytes are those of
the files, with what stays in 16 bit; losses are predicted (:mod:`lowbit.pipeline.sensitivity`) and add up; the choice
among them is optimal (:mod:`lowbit.pipeline.knapsack`). The outcome is an ordinary recipe with overrides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from lowbit.errors import RecipeError
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import IntGrid
from lowbit.formats.presets import preset
from lowbit.models.source import Source
from lowbit.pipeline.coverage import Coverage, audit
from lowbit.pipeline.knapsack import Choice, optimum
from lowbit.pipeline.recipe import Override, Recipe
from lowbit.pipeline.sensitivity import Sensitivity

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("kmgt", 1)
    for kind, base in (("b", 1000), ("ib", 1024))
}


def size(text: str) -> int:
    """Bytes from ``90MB`` (millions), ``1.5GiB`` (powers of 1024) or a plain number. Raises RecipeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise RecipeError(f"{text!r} is no size", fix="90MB, 1.5GiB, or a number of bytes")
    return int(Fraction(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class Allocation:
    """A budget spent.

    ``formats`` names the choice for every linear that was free; ``nbytes`` is at least what the checkpoint's shards
    will take, at most a few hundred bytes a linear more (their headers are bounded, tensors are exact); ``loss`` is
    what is predicted for the free linears, and no choice that fits is predicted to lose less than ``loss - gap``.
    """

    recipe: Recipe
    formats: dict[str, str]
    budget: int
    nbytes: int
    loss: float
    gap: float
    largest: bool
    """every linear has the best of the formats: a larger budget would change nothing"""


def allocate(source: Source, recipe: Recipe, sensitivity: Sensitivity, budget: int) -> Allocation:
    """Give every linear that the recipe quantizes one of the sensitivity's formats.

    The recipe's own format is replaced; overrides that name a format, or keep sites in 16 bit, are kept and counted.
    Raises RecipeError, with the smallest size that is possible, when the budget cannot be met, CalibrationError when
    the sensitivity is another model's. Loads no weights (but the model's digest reads its files once).
    """
    sensitivity.check(source)
    coverage = audit(source, recipe)
    rows = {row.name: row for row in sensitivity.sites}
    groups: dict[str, list[str]] = {}
    fixed = kept_bytes(source, coverage)
    for name, (site, treatment) in coverage.treated.items():
        rule = rule_of(recipe, name)
        if rule is not None and rule.format is not None:
            fixed += site_bytes(name, site.shape, treatment.format)
        elif name in rows:
            groups.setdefault(rows[name].group, []).append(name)
        else:
            raise RecipeError(
                "nothing is known about its sensitivity", where=name, fix="an override that names its format"
            )
    if not groups:
        raise RecipeError("no linear is free", where=recipe.line, why="overrides name the format of each")
    formats = [preset(name) for name in sensitivity.formats]
    options = [
        [
            Choice(
                sum(site_bytes(name, rows[name].shape, fmt) for name in names),
                sum(rows[name].loss[fmt.name] for name in names),
            )
            for fmt in formats
        ]
        for names in groups.values()
    ]
    found = optimum([*options, [Choice(fixed, 0.0)]], budget)
    chosen = {
        name: formats[k].name for names, k in zip(groups.values(), found.chosen, strict=False) for name in names
    }  # fmt: skip
    largest = found.loss == math.fsum(min(c.loss for c in group) for group in options)
    spelled = overridden(recipe, chosen, [*coverage.treated, *(kept.name for kept in coverage.kept)])
    return Allocation(spelled, chosen, budget, found.nbytes, found.loss, found.gap, largest)


def overridden(recipe: Recipe, formats: Mapping[str, str], names: list[str]) -> Recipe:
    """The recipe in which every site of ``formats`` has its format there, and all others of ``names`` are as before.

    The commonest format becomes the recipe's own. An override covers a kind of linear (``*.down_proj``) where all of
    them agree, all experts of a layer, or one site. Overrides that no longer decide about any site are left out.
    """
    counts = {fmt: sum(1 for f in formats.values() if f == fmt) for fmt in dict.fromkeys(formats.values())}
    common = max(counts, key=lambda fmt: counts[fmt])
    rules = {name: rule_of(recipe, name) for name in names}
    covers: dict[str, list[str]] = {}
    for name in names:
        for pattern in _patterns(name):
            covers.setdefault(pattern, []).append(name)
    wanted = {name: (fmt, rules[name]) for name, fmt in formats.items() if fmt != common}
    new: list[Override] = []
    left = dict(wanted)
    for name in wanted:
        if name not in left:
            continue
        pattern = next(p for p in _patterns(name) if all(wanted.get(n) == wanted[name] for n in covers[p]))
        fmt, rule = wanted[name]
        changes = {"sites": pattern, "format": fmt}
        new.append(Override.model_validate(changes) if rule is None else rule.model_copy(update=changes))
        for covered in covers[pattern]:
            del left[covered]
    deciding = [rule for name, rule in rules.items() if name not in wanted]
    old = [rule for rule in recipe.override if any(rule is held for held in deciding)]
    step = [*recipe.step[:-1], recipe.step[-1].model_copy(update={"format": common})]
    return recipe.model_copy(update={"step": step, "override": [*new, *old]})


def rule_of(recipe: Recipe, site: str) -> Override | None:
    return next((rule for rule in recipe.override if rule.matches(site)), None)


def _patterns(site: str) -> list[str]:
    """Patterns that match a site, from the widest to itself."""
    leaf, experts = f"*.{site.rpartition('.')[2]}", re.sub(r"\.experts\.\d+\.", ".experts.*.", site)
    return list(dict.fromkeys([leaf, experts, site]))


def kept_bytes(source: Source, coverage: Coverage) -> int:
    """What stays in 16 bit, and its entries in headers."""
    names = (name for name, _ in source.skeleton.named_parameters())
    entries = sum(len(name) + 100 for name in names if name.removesuffix(".weight") not in coverage.treated)
    return 2 * (coverage.parameters - coverage.quantized) + entries


def site_bytes(name: str, shape: tuple[int, int], fmt: Format) -> int:
    """A linear's tensors, exactly, and a bound of what the header of its shard says about them.

    A part is named in the list of tensors, with its offsets, and in the site's spec, which spells every node.
    """
    nodes, parts = _tree(fmt)
    return fmt.nbytes(shape) + len(name) + 110 * nodes + parts * (len(name) + 150)


def _tree(fmt: Format) -> tuple[int, int]:
    """Nodes and stored tensors of a linear in this format."""
    zeros = isinstance(fmt.grid, IntGrid) and not fmt.grid.symmetric and fmt.offset is None
    nodes, parts = 1 + 2 * fmt.centred, 1 + zeros + fmt.centred  # centred: a sum, with the mean
    for held in (fmt.scale, fmt.offset):
        if held is not None:
            inner = (1, 1) if isinstance(held, Stored) else _tree(held)
            nodes, parts = nodes + inner[0], parts + inner[1]
    return nodes, parts
