"""A family of models in their low-bit versions: what each version is, what it takes, and its losses on one text.

Sizes are counted twice: everything stored, and the linears of the blocks alone. Embeddings and heads stay in 16 bit
unless a recipe names them, and are most of a tiny model, which hides what the bits of its linears do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.statistics import Interval
from lowbit.formats.activation import activation
from lowbit.formats.ec import Entropy
from lowbit.formats.format import Format
from lowbit.formats.grids import IntGrid, Table
from lowbit.formats.heads import head_format
from lowbit.formats.presets import preset
from lowbit.models.source import Source, of_directory
from lowbit.pipeline.coverage import audit
from lowbit.pipeline.recipe import Recipe
from lowbit.study.laws import Point, Weights
from lowbit.study.losses import Shared
from lowbit.study.view import Model, View

SIXTEEN = "16 bit"
Count = Literal["total", "linears"]


class Form(NamedTuple):
    """What a recipe makes low-bit, and how far; 16 where it leaves a kind as it is."""

    weights: float
    inputs: float
    cache: float
    type: str = ""
    """Of the weights' codes: int, int-sym, fp, nf, quantile, dynamic, ec ..."""
    block: str = ""
    """Which weights share a scale: g64, row, tensor."""
    method: str = ""
    outliers: float = 0.0
    """Percent of weights or columns that stay in 16 bit."""

    @property
    def kind(self) -> str:
        """W, WA or KV, or empty where it is several of them, or nothing."""
        low = (self.weights < 16, self.inputs < 16, self.cache < 16)
        return {(True, False, False): "W", (True, True, False): "WA", (False, False, True): "KV"}.get(low, "")

    @property
    def name(self) -> str:
        """W4, W4A8, KV4; by all three where it is several."""
        parts = [f"W{self.weights:g}", f"A{self.inputs:g}", f"KV{self.cache:g}"]
        shown = {"W": parts[:1], "WA": parts[:2], "KV": parts[2:]}.get(self.kind, parts)
        return "".join(shown)


def form(recipe: Recipe) -> Form:
    """What a recipe does where no override says otherwise."""
    weights, inputs, cache = 16.0, 16.0, 16.0
    kind = block = method = ""
    outliers = 0.0
    if (step := recipe.encoder) is not None and step.format is not None:
        fmt = preset(step.format)
        weights, kind, block, method = bits(fmt), _type(fmt), _block(fmt), step.method
        share = step.options.get("share", 1.0) if step.method == "outliers" else 0.0
        outliers = float(share)
    if recipe.activations is not None and recipe.activations.format != "none":
        inputs = bits(activation(recipe.activations.format).format)
    if recipe.kv is not None:
        halves = [head_format(name) for name in (recipe.kv.key, recipe.kv.value)]
        cache = sum(16.0 if half is None else bits(half.format) for half in halves) / 2
    return Form(weights, inputs, cache, kind, block, method, outliers)


def bits(fmt: Format) -> float:
    """Of a code, scales apart; of an entropy-coded format its rate."""
    if isinstance(fmt, Entropy) and fmt.bits is not None:
        return fmt.bits
    return float(math.ceil(math.log2(fmt.grid.levels)))


def _type(fmt: Format) -> str:
    if isinstance(fmt, Entropy):
        return "ec"
    if isinstance(fmt.grid, IntGrid):
        return "int-sym" if fmt.grid.symmetric else "int"
    if isinstance(fmt.grid, Table):
        name = fmt.grid.name
        return "fp" if name.startswith("e") else name.rstrip("0123456789") if name != "fp4" else "fp4 (bitsandbytes)"
    return "quantile"


def _block(fmt: Format) -> str:
    return "g" + "x".join(map(str, fmt.block.size)) if fmt.block.size else fmt.block.kind


class Version(NamedTuple):
    """One version of one model; the original is a version of 16 bit."""

    model: str
    parameters: int
    label: str
    form: Form
    total: int
    """Bytes of everything stored."""
    linears: int
    """Bytes of the blocks' linears alone, scales included."""

    def nbytes(self, count: Count) -> int:
        return self.total if count == "total" else self.linears


@dataclass(frozen=True)
class Family:
    """Versions of one or several models and their losses on the same tokens, in one order."""

    versions: tuple[Version, ...]
    losses: Shared
    tokens: int
    clusters: int
    text: str

    @property
    def models(self) -> list[str]:
        """By size."""
        return [name for _, name in sorted({(v.parameters, v.model) for v in self.versions})]

    def points(self, count: Count = "total") -> list[Point]:
        """The versions as points over bytes, those with low-bit inputs or cache too."""
        found = []
        for v, loss in zip(self.versions, map(self.loss, range(len(self.versions))), strict=True):
            found.append(Point(v.model, v.parameters, v.label, v.nbytes(count), loss.estimate, loss.se))
        return found

    def loss(self, i: int) -> Interval:
        """Mean negative log-likelihood of a version, in nats a token."""
        return self.losses.weighted(self.weights(plus=[i]))

    def change(self, i: int) -> Interval:
        """Loss of a version less that of its model's original."""
        mine = next(j for j, v in enumerate(self.versions) if (v.model, v.label) == (self.versions[i].model, SIXTEEN))
        return self.losses.weighted(self.weights(plus=[i], minus=[mine]))

    def weights(self, plus: Sequence[int] = (), minus: Sequence[int] = ()) -> Weights:
        """A mean of versions less a mean of others."""
        w = np.zeros(len(self.versions))
        for chosen, sign in ((plus, 1), (minus, -1)):
            for i in chosen:
                w[i] += sign / len(chosen)
        return w

    def where(self, keep: Sequence[int]) -> Family:
        """Of these versions alone."""
        chosen = Shared(self.losses.sums[list(keep)], self.losses.tokens)
        return Family(tuple(self.versions[i] for i in keep), chosen, self.tokens, self.clusters, self.text)

    @property
    def span(self) -> str:
        """What was scored, in words."""
        return f"{self.tokens:,} tokens of {self.text} in {self.clusters} clusters"


def of_view(view: View) -> Family | None:
    """The family of a study; None where no candidate is scored yet.

    Raises EvidenceError where its models were not scored on the same tokens: by another tokenizer, losses a token do
    not compare.
    """
    versions: list[Version] = []
    tokens: list[Tokens] = []
    for model in view.models:
        original = model.tokens(model.grid.reference)
        source = of_directory(Path(model.grid.reference.params["model"]))
        if original is None:
            continue
        versions.append(_original(model, source))
        tokens.append(original)
        for version, held in _versions(model, source):
            versions.append(version)
            tokens.append(held)
    if len(versions) <= len({v.model for v in versions}):
        return None
    try:
        losses = Shared.of(tokens)
    except EvidenceError as error:
        raise EvidenceError(
            "the models were not scored on the same tokens", where=f"study {view.name!r}", why=str(error.what),
            fix="models of one tokenizer, or a study of each without laws and scale",
        ) from error  # fmt: skip
    protocol = view.models[0].report.protocol
    return Family(tuple(versions), losses, int(losses.tokens.sum()), len(losses.tokens), protocol.text)


def _original(model: Model, source: Source) -> Version:
    sixteen = Form(16.0, 16.0, 16.0)
    return Version(model.name, model.parameters, SIXTEEN, sixteen, model.report.reference.bytes_total,
                   2 * _in_blocks(source))  # fmt: skip


def _versions(model: Model, source: Source) -> list[tuple[Version, Tokens]]:
    found = []
    for entry, candidate in model.candidates():
        tokens = model.tokens(entry.score)
        if entry.make is None or tokens is None:
            continue
        recipe = Recipe.model_validate(entry.make.params["recipe"])
        coded = audit(source, recipe).quantized if recipe.encoder is not None else 0
        linears = round(candidate.bits_per_weight * coded / 8) + 2 * max(0, _in_blocks(source) - coded)
        version = Version(model.name, model.parameters, entry.label, form(recipe), candidate.bytes_total, linears)
        found.append((version, tokens))
    return found


def _in_blocks(source: Source) -> int:
    return sum(math.prod(site.shape) for block in source.blocks for site in source.sites(block))
