"""plan: what a recipe will make of a model, and what that costs, before any weight is read.

Sizes are exact (a checkpoint's headers aside). Times come from the work's operation counts over this machine's
measured rates; they are estimates, good to about a factor of 1.5 on an idle machine.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from lowbit.calibration.stats import Gram, Stat
from lowbit.models.graph import Site, outside_blocks
from lowbit.models.source import Source
from lowbit.pipeline.coverage import Coverage, Kept, audit
from lowbit.pipeline.recipe import Recipe, Treatment
from lowbit.pipeline.spill import LIMIT, Hidden


@dataclass(frozen=True)
class Rates:
    """This machine's speed: operations a second of a matrix product, and bytes a second of an elementwise pass."""

    flops: float
    elementwise: float

    @classmethod
    def measure(cls) -> Rates:
        """About a fifth of a second of products and passes at the size of a small layer."""
        a, b = torch.randn(512, 768), torch.randn(768, 768)
        x = torch.randn(1 << 20)
        return cls(
            _rate(lambda: a @ b, 2 * 512 * 768 * 768),
            _rate(lambda: x.mul(1.5).round_(), 2 * 8 * x.numel()),
        )  # fmt: skip


@dataclass(frozen=True)
class StageCost:
    """One stage of the walk: estimated seconds, and bytes held while it runs."""

    name: str
    seconds: float
    memory: int


@dataclass(frozen=True)
class Plan:
    """The outcome of a recipe on a model, known in advance."""

    sites: int
    parameters: int
    quantized: int
    bytes_quantized: int
    bytes_kept: int
    bits_per_weight: float
    bytes_source_16bit: int
    stages: tuple[StageCost, ...]
    kept: tuple[Kept, ...]

    @property
    def bytes_total(self) -> int:
        return self.bytes_quantized + self.bytes_kept

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak(self) -> int:
        """Bytes at the worst moment, a process with torch and transformers loaded included."""
        return max(stage.memory for stage in self.stages)


_PROCESS = 600 << 20  # a Python process with torch and transformers imported
_COLUMN_S = 45e-6  # one step of the column loop beside its arithmetic: about ten small operations
_SEARCH_PASSES = 7  # elementwise passes over the weight for one step of a clip search


def plan(source: Source, recipe: Recipe, rates: Rates, dtype: torch.dtype = torch.float32) -> Plan:
    """Price a recipe; loads no weights. Raises what :func:`audit` raises."""
    coverage = audit(source, recipe)
    treated = list(coverage.treated.values())
    low = sum(t.format.nbytes(site.shape) for site, t in treated)
    kept = 2 * (coverage.parameters - coverage.quantized)
    tokens = recipe.calibration.samples * recipe.calibration.length if recipe.calibrated else 0
    return Plan(
        sites=len(treated), parameters=coverage.parameters, quantized=coverage.quantized, bytes_quantized=low,
        bytes_kept=kept, bits_per_weight=8 * low / coverage.quantized, bytes_source_16bit=2 * coverage.parameters,
        stages=tuple(_stages(source, recipe, coverage, rates, tokens, dtype)), kept=coverage.kept,
    )  # fmt: skip


def _stages(
    source: Source, recipe: Recipe, coverage: Coverage, rates: Rates, tokens: int, dtype: torch.dtype
) -> list[StageCost]:
    treated = list(coverage.treated.values())
    block = max(sum(4 * math.prod(s.shape) for s, _ in coverage.in_block(b).values()) for b in source.blocks)
    widest = max(math.prod(s.shape) for s, _ in treated)
    base = _PROCESS + block + 6 * 4 * widest
    stages = [StageCost("read and write", 4 * coverage.parameters / 1e9, base)]
    if tokens:
        d = source.config.get_text_config(decoder=True).hidden_size
        c = recipe.calibration
        hidden = min(Hidden.nbytes(c.samples, c.length, d, dtype), LIMIT)
        inside = tokens * sum(sum(s.shape) for s, _ in coverage.in_block(source.blocks[0]).values()) * dtype.itemsize
        embedding = sum(p.numel() for _, p in outside_blocks(source.skeleton, source.blocks)) * dtype.itemsize
        held = base + hidden + (inside // 2 if inside <= LIMIT else inside // c.samples * c.batch) + embedding
        inputs = [(s, t, kinds) for s, t in treated if (kinds := t.encoder.needs)]
        forward = 2 * tokens * coverage.quantized / rates.flops
        statistics = sum(_statistics(s, kinds, tokens) for s, _, kinds in _first_of_each_input(inputs)) / rates.flops
        gram = max((Gram.nbytes(s.shape[1]) for s, _, kinds in inputs if Gram in kinds), default=0)
        stages += [
            StageCost("forward passes", forward, held),
            StageCost("statistics", statistics, held + gram),
            StageCost("factorisation", sum(4 * s.shape[1] ** 3 for s, _, _ in _first_of_each_input(inputs))
                      / rates.flops, held + 5 * gram),
        ]  # fmt: skip
    search = sum(_clip_steps(t) * _SEARCH_PASSES * 8 * math.prod(s.shape) for s, t in treated) / rates.elementwise
    rounding = sum(_rounding(s, t, rates) for s, t in treated)
    memory = stages[-1].memory
    return [*stages, StageCost("clip search", search, memory), StageCost("rounding", rounding, memory)]


def _first_of_each_input(
    inputs: list[tuple[Site, Treatment, frozenset[type[Stat]]]],
) -> list[tuple[Site, Treatment, frozenset[type[Stat]]]]:
    """Query, key and value, and gate and up, read one input: their statistics are taken once."""
    followers = ("k_proj", "v_proj", "up_proj")
    return [entry for entry in inputs if entry[0].leaf not in followers]


def _statistics(site: Site, kinds: frozenset[type[Stat]], tokens: int) -> float:
    n = site.shape[1]
    return (1.2 * tokens * n * n if Gram in kinds else 0.0) + 4.0 * tokens * n


def _clip_steps(treatment: Treatment) -> int:
    return max(int(getattr(treatment.encoder, "clip", 0)), treatment.format.least_clip_steps)


def _rounding(site: Site, treatment: Treatment, rates: Rates) -> float:
    """Seconds to choose and pack the codes of one site."""
    rows, columns = site.shape
    pack = 12 * 8 * rows * columns / rates.elementwise
    if Gram not in treatment.encoder.needs:
        return pack
    return pack + columns * _COLUMN_S + rows * columns * columns / rates.flops


def _rate(work: object, amount: float) -> float:
    """The best of a few timings of a callable."""
    assert callable(work)
    work()
    best = math.inf
    stop = time.perf_counter() + 0.1
    while time.perf_counter() < stop:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return amount / best
