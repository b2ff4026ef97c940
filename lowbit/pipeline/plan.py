"""plan: what a recipe will make of a model, and what that costs, before any weight is read.

Sizes are exact (a checkpoint's headers aside). Memory is that of the walk at its worst moment, beside the process
that plans: within 15 % of what was measured (benchmarks/README.md). The model's files are mapped and count in full,
though the system takes their pages back when it needs them (``mapped``). Times are operation counts over this
machine's measured rates: estimates, good to about a factor of two, for an idle machine.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
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
from lowbit.pipeline import rate
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
    mapped: int
    """Bytes of the model's files: a part of every stage's memory that the system can take back."""
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


class _Held(NamedTuple):
    """Bytes beside calibration: with a block loaded, what coding a weight adds to them, and with the embedding."""

    blocks: int
    encoding: int
    embedding: int


_INTEGERS, _TABLES = _Passes(75, 11, 45), _Passes(130, 31, 800)
_GRADIENT_PASSES = 4  # of a block: forward, again for the backward pass, and that pass through activations and weights
_LOGITS = 4  # of a window at once: they, their log-softmax, and a gradient of either
_FORWARD_PASSES = 3  # over every linear's input and output in a forward pass: norms, activations, rotations, sums
_COLUMN_S = 45e-6  # one step of the column loop beside its arithmetic: about ten small operations
_RATE_ROUNDS = 4  # in which a rate is found
_TEXT = 64 << 20  # tokens of a whole text with their offsets, before windows are cut from them


def plan(source: Source, recipe: Recipe, rates: Rates, dtype: torch.dtype = torch.float32) -> Plan:
    """Price a recipe; loads no weights. Raises what :func:`audit` raises."""
    coverage = audit(source, recipe)
    treated = list(coverage.treated.values())
    low = coverage.nbytes
    tokens = recipe.calibration.samples * recipe.calibration.length if recipe.calibrated else 0
    return Plan(
        sites=len(treated), parameters=coverage.parameters, quantized=coverage.quantized, bytes_quantized=low,
        bytes_kept=coverage.kept_nbytes, 
        bits_per_weight=8 * low / coverage.quantized if coverage.quantized else 16.0,
        bytes_source_16bit=2 * coverage.parameters, mapped=_mapped(source),
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
    base = rates.resident + _mapped(source)
    blocks, encoding = base + copies * block, 6 * 4 * widest
    stages = [StageCost("read and write", 4 * coverage.parameters / 1e9, max(blocks + encoding, base + 4 * outside))]
    if tokens:
        stages += _calibration(
            source, recipe, coverage, rates, tokens, dtype, _Held(blocks, encoding, base + outside * dtype.itemsize)
        )
    memory = stages[-1].memory
    search = sum(_clip_steps(t) * _passes(t).step * math.prod(s.shape) for s, t in treated)
    rounding = sum(_rounding(s, t, rates) for s, t in treated)
    return [
        *stages, StageCost("clip search", 8 * search / rates.elementwise, memory),
        StageCost("rounding", rounding, memory),
    ]  # fmt: skip


def _calibration(
    source: Source, recipe: Recipe, coverage: Coverage, rates: Rates, tokens: int, dtype: torch.dtype, bare: _Held
) -> list[StageCost]:
    """Forward passes over the tokens, and what methods learn from them."""
    c, d = recipe.calibration, source.config.get_text_config(decoder=True).hidden_size
    inputs = [(s, t, kinds) for s, t in coverage.treated.values() if (kinds := t.encoder.needs)]
    first = _first_of_each_input(inputs)
    widths = [sum(sum(s.shape) for s, _ in coverage.in_block(b).values()) for b in source.blocks]
    # a lockstep pass has a thread a batch, and what one batch took inside the block stays with its thread's allocator
    inside = tokens * max(widths) * dtype.itemsize
    lockstep = inside <= LIMIT and any(t.encoder.true_sequential for _, t, _ in inputs)
    if not lockstep:
        inside = inside // c.samples * min(c.batch, c.samples)
    tuner: Any = recipe.tuner
    hidden = min(Hidden.nbytes(c.samples, c.length, d, dtype), LIMIT) * (2 if tuner else 1)  # the original's too
    kept = _TEXT + hidden
    held = bare.blocks + kept + inside
    rounds = 1 + len(recipe.transforms) + (4 + 3 * tuner.steps * tuner.batch / c.samples if tuner else 0)
    products = rounds * tokens * (2 * coverage.quantized + 4 * c.length * d * len(source.blocks)) / rates.flops
    passes = rounds * tokens * _FORWARD_PASSES * 8 * sum(widths) / rates.elementwise
    grams, largest = _grams(source, recipe, coverage)
    statistics = sum(_statistics(s, kinds, tokens) for s, _, kinds in first) / rates.flops
    factors = sum(4 * s.shape[1] ** 3 for s, _, kinds in first if Gram in kinds) / rates.flops
    stages = [
        StageCost("forward passes", products + passes, max(held, bare.embedding + kept)),
        StageCost("statistics", statistics, held + grams),
        StageCost("factorisation", factors, held + grams + 4 * largest + (bare.encoding if lockstep else 0)),
    ]
    if rate.asks_fisher(t for _, t in coverage.treated.values()):
        logits = _LOGITS * 4 * c.length * source.config.get_text_config(decoder=True).vocab_size
        window = 2 * c.length * max(widths) * dtype.itemsize  # a block's activations, and gradients of them
        passes = _GRADIENT_PASSES * 2 * coverage.parameters * max(rate.TOKENS, c.length) / rates.flops
        stages.insert(0, StageCost("Fisher information", passes, bare.embedding + kept + logits + window))
    return stages


def _mapped(source: Source) -> int:
    """Bytes of the model's files, which are mapped while they are read and counted as resident from then on."""
    return 0 if source.root is None else source.store.nbytes()


def _grams(source: Source, recipe: Recipe, coverage: Coverage) -> tuple[int, int]:
    """Bytes of the Gram matrices that are held at once, and of the largest that an encoder works on.

    Transforms and tuners are given those of a whole block, encoders those of a stage: of one input, or of all experts.
    """
    whole = bool(recipe.transforms) or recipe.tuner is not None
    before = frozenset[type[Stat]]().union(*(transform.needs for _, transform in recipe.transforms))
    together, largest = Counter[str](), 0
    for block in source.blocks:
        inputs = [(s, t, t.encoder.needs | before) for s, t in coverage.in_block(block).values()]
        for site, treatment, kinds in _first_of_each_input(inputs):
            if Gram not in kinds:
                continue
            together[block if whole else re.sub(r"\.experts\.\d+\.", ".", site.name)] += Gram.nbytes(site.shape[1])
            largest = max(largest, Gram.nbytes(site.shape[1]) * (Gram in treatment.encoder.needs))
    return max(together.values(), default=0), largest


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
