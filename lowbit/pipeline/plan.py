"""plan: what a recipe will make of a model, and what that costs, before any weight is read.

Sizes are exact (a checkpoint's headers aside). Memory is that of the walk at its worst moment, beside the process
that plans: within 15 % of what was measured. Times are operation counts over this machine's measured rates:
estimates, good to about a factor of two, for an idle machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch

from lowbit.calibration.stats import Gram, Stat
from lowbit.formats.ec import Entropy
from lowbit.formats.grids import IntGrid
from lowbit.models.graph import Site, outside_blocks
from lowbit.models.source import Source
from lowbit.pipeline.coverage import Coverage, Kept, audit
from lowbit.pipeline.recipe import Recipe, Treatment
from lowbit.pipeline.spill import LIMIT, Hidden


@dataclass(frozen=True)
class Rates:
    """This machine: operations a second of a matrix product, bytes a second of an elementwise pass, and a process.

    ``resident`` is what Python with torch, transformers and an opened model holds before any work, in bytes.
    """

    flops: float
    elementwise: float
    resident: int

    @classmethod
    def measure(cls) -> Rates:
        """About a fifth of a second of products and passes at the size of a small layer."""
        a, b = torch.randn(512, 768), torch.randn(768, 768)
        x = torch.randn(1 << 20)
        return cls(
            _rate(lambda: a @ b, 2.0 * 512 * 768 * 768),
            _rate(lambda: x.mul(1.5).round_(), 2.0 * 8 * x.numel()),
            int(psutil.Process().memory_info().rss),
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
        """Bytes resident at the worst moment, Python and its libraries included."""
        return max(stage.memory for stage in self.stages)


class _Passes(NamedTuple):
    """Elementwise passes over a weight, fitted to timings: to code and pack it, a clip step, a column loop."""

    encode: int
    step: int
    loop: int


_INTEGERS, _TABLES = _Passes(75, 11, 45), _Passes(130, 31, 800)
_FORWARD_PASSES = 3  # over every linear's input and output in a forward pass: norms, activations, rotations, sums
_COLUMN_S = 45e-6  # one step of the column loop beside its arithmetic: about ten small operations
_RATE_ROUNDS = 4  # in which a rate is found
_TEXT = 64 << 20  # tokens of a whole text with their offsets, before windows are cut from them


def plan(source: Source, recipe: Recipe, rates: Rates, dtype: torch.dtype = torch.float32) -> Plan:
    """Price a recipe; loads no weights. Raises what :func:`audit` raises."""
    coverage = audit(source, recipe)
    treated = list(coverage.treated.values())
    low = coverage.nbytes
    kept = 2 * (coverage.parameters - coverage.quantized)
    tokens = recipe.calibration.samples * recipe.calibration.length if recipe.calibrated else 0
    return Plan(
        sites=len(treated), parameters=coverage.parameters, quantized=coverage.quantized, bytes_quantized=low,
        bytes_kept=kept, 
        bits_per_weight=8 * low / coverage.quantized if coverage.quantized else 16.0,
        bytes_source_16bit=2 * coverage.parameters,
        stages=tuple(_stages(source, recipe, coverage, rates, tokens, dtype)), kept=coverage.kept,
    )  # fmt: skip


def _stages(
    source: Source, recipe: Recipe, coverage: Coverage, rates: Rates, tokens: int, dtype: torch.dtype
) -> list[StageCost]:
    treated = list(coverage.treated.values())
    block = max(sum(4 * math.prod(s.shape) for s in source.sites(b)) for b in source.blocks)
    widest = max((math.prod(s.shape) for s, _ in treated), default=0)
    outside = sum(p.numel() for _, p in outside_blocks(source.skeleton, source.blocks))
    # edited weights stay in float32 beside the block; a tuner holds positions, gradients and rounded weights
    copies = 2 + bool(recipe.transforms) + 3 * (recipe.tuner is not None)
    base = rates.resident + copies * block + 6 * 4 * widest
    stages = [StageCost("read and write", 4 * coverage.parameters / 1e9, max(base, rates.resident + 4 * outside))]
    if tokens:
        stages += _calibration(source, recipe, coverage, rates, tokens, dtype, base + outside * dtype.itemsize)
    search = sum(_clip_steps(t) * _passes(t).step * math.prod(s.shape) for s, t in treated)
    rounding = sum(_rounding(s, t, rates) for s, t in treated)
    memory = stages[-1].memory
    return [
        *stages, StageCost("clip search", 8 * search / rates.elementwise, memory),
        StageCost("rounding", rounding, memory),
    ]  # fmt: skip


def _calibration(
    source: Source, recipe: Recipe, coverage: Coverage, rates: Rates, tokens: int, dtype: torch.dtype, base: int
) -> list[StageCost]:
    """Forward passes over the tokens, and what methods learn from them."""
    c, d = recipe.calibration, source.config.get_text_config(decoder=True).hidden_size
    inputs = [(s, t, kinds) for s, t in coverage.treated.values() if (kinds := t.encoder.needs)]
    first = _first_of_each_input(inputs)
    widths = [sum(sum(s.shape) for s, _ in coverage.in_block(b).values()) for b in source.blocks]
    inside = tokens * max(widths) * dtype.itemsize  # activations of all tokens within one block, as in a lockstep pass
    if inside > LIMIT or not any(t.encoder.true_sequential for _, t, _ in inputs):
        inside = inside // c.samples * min(c.batch, c.samples)
    tuner: Any = recipe.tuner
    hidden = min(Hidden.nbytes(c.samples, c.length, d, dtype), LIMIT) * (2 if tuner else 1)  # the original's too
    held = base + _TEXT + hidden + inside
    rounds = 1 + len(recipe.transforms) + (4 + 3 * tuner.steps * tuner.batch / c.samples if tuner else 0)
    products = rounds * tokens * (2 * coverage.quantized + 4 * c.length * d * len(source.blocks)) / rates.flops
    passes = rounds * tokens * _FORWARD_PASSES * 8 * sum(widths) / rates.elementwise
    gram = max((Gram.nbytes(s.shape[1]) for s, _, kinds in inputs if Gram in kinds), default=0)
    if recipe.transforms or tuner:  # the statistics of a whole block at once
        gram *= max(len({s.shape[1]: 0 for s in source.sites(b)}) + 1 for b in source.blocks)
    statistics = sum(_statistics(s, kinds, tokens) for s, _, kinds in first) / rates.flops
    factors = sum(4 * s.shape[1] ** 3 for s, _, kinds in first if Gram in kinds) / rates.flops
    return [
        StageCost("forward passes", products + passes, held),
        StageCost("statistics", statistics, held + gram),
        StageCost("factorisation", factors, held + 5 * gram),
    ]


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
    if isinstance(treatment.format, Entropy):
        return 0
    return max(int(getattr(treatment.encoder, "clip", 0)), treatment.format.least_clip_steps)


def _passes(treatment: Treatment) -> _Passes:
    return _INTEGERS if isinstance(treatment.format.grid, IntGrid) else _TABLES


def _rounding(site: Site, treatment: Treatment, rates: Rates) -> float:
    """Seconds to choose and pack the codes of one site."""
    rows, columns = site.shape
    per_pass = 8 * rows * columns / rates.elementwise
    passes = _passes(treatment)
    if Gram not in treatment.encoder.needs:
        return passes.encode * per_pass
    loop = columns * _COLUMN_S + rows * columns * columns / rates.flops
    rounds = _RATE_ROUNDS if isinstance(treatment.format, Entropy) else 1
    return (passes.encode + passes.loop) * per_pass + rounds * loop


def _rate(work: Callable[[], object], amount: float) -> float:
    """An amount of work a second, by the best of the timings that a tenth of a second has room for."""
    work()
    best = math.inf
    stop = time.perf_counter() + 0.1
    while time.perf_counter() < stop:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return amount / best
