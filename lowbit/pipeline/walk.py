"""walk: the one loop over a model. Load a block, observe, encode, propagate, write, free.

Memory held at once: one block, its codes, the statistics of one stage, and the hidden states of the calibration
tokens (in a file beyond a limit). A finished block is one atomic write to the sink; to resume, blocks that the sink
has are run but not encoded again, so the result has the bytes of an undisturbed run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from lowbit.arrays import Int, Matrix, Tensor
from lowbit.calibration.stats import Gram, Stats
from lowbit.errors import CalibrationError
from lowbit.formats.qtensor import QTensor
from lowbit.methods.base import Weight
from lowbit.models.graph import matrix, set_matrix
from lowbit.models.source import Source
from lowbit.models.stream import Stream
from lowbit.pipeline.coverage import Coverage, audit
from lowbit.pipeline.lockstep import Lockstep
from lowbit.pipeline.observe import Stage, discover, new_stats, observe
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.spill import LIMIT, Hidden


@dataclass(frozen=True)
class SiteReport:
    """What encoding one site did: its size and its error relative to the weight and to the output."""

    site: str
    method: str
    format: str
    nbytes: int
    bits_per_weight: float
    weight_error: float
    """|Q - W|² / |W|²"""
    output_error: float | None
    """|X(Q - W)ᵀ|² / |XWᵀ|² over the calibration tokens, where a Gram matrix was collected"""
    seconds: float


@dataclass(frozen=True)
class Progress:
    """One step of the walk; ``done`` of ``total`` sites."""

    block: int
    blocks: int
    site: str
    done: int
    total: int


@runtime_checkable
class Sink(Protocol):
    """Where finished blocks go."""

    def has(self, block: str) -> bool: ...
    def read(self, block: str) -> Mapping[str, QTensor]: ...
    def write(self, block: str, module: nn.Module, codes: Mapping[str, QTensor], reports: list[SiteReport]) -> None: ...


def walk(
    source: Source,
    recipe: Recipe,
    tokens: Int[Tensor, "windows length"] | None,
    sink: Sink,
    *,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Coverage:
    """Quantize every block of a model into ``sink``; returns what was covered.

    ``tokens`` may be None when no method needs statistics; then no activation is ever computed. ``dtype`` is the
    dtype of the forward passes. Raises CoverageError before any work when a matrix would be missed.
    """
    coverage = audit(source, recipe)
    calibrated = any(t.encoder.needs for _, t in coverage.treated.values())
    if calibrated:
        _check_tokens(source, recipe, tokens)
    stream = Stream(source, dtype)
    hidden = Hidden.embed(stream, tokens, recipe.calibration.batch) if calibrated and tokens is not None else None
    stream.close()
    total, done = len(coverage.treated), 0
    for i, name in enumerate(source.blocks):
        sites = coverage.in_block(name)
        finished = sink.has(name)
        if finished and hidden is None:
            done += len(sites)
            continue
        block = stream.load(i)
        if not finished:
            report = _Counter(i, len(source.blocks), done, total, on_progress)
            codes, reports = _Block(source, recipe, stream, i, block, hidden, coverage, report).encode()
            sink.write(name, block, codes, reports)
        else:
            codes = dict(sink.read(name))
            if hidden is not None:
                for site, q in codes.items():
                    _replace(recipe, block, name, site, q.decode())
                if i + 1 < len(source.blocks):
                    hidden.advance(stream, i, block)
        done += len(sites)
        del block
    return coverage


def _check_tokens(source: Source, recipe: Recipe, tokens: Int[Tensor, "windows length"] | None) -> None:
    """Raises CalibrationError for tokens that are missing or that the model cannot read."""
    if tokens is None or tokens.numel() == 0:
        raise CalibrationError("this recipe needs calibration text", where=recipe.line, fix="--text FILE")
    config = source.config.get_text_config(decoder=True)
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
        raise CalibrationError(
            f"token ids from {int(tokens.min())} to {int(tokens.max())}, the model knows 0 to {config.vocab_size - 1}",
            where=source.name, fix="the tokenizer of this model",
        )  # fmt: skip
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens.shape[1] > longest:
        raise CalibrationError(
            f"windows of {tokens.shape[1]} tokens, the model reads at most {longest}", where=source.name,
            fix=f"a length of at most {longest}",
        )  # fmt: skip


@dataclass
class _Counter:
    """Turns finished sites into progress."""

    block: int
    blocks: int
    done: int
    total: int
    emit: Callable[[Progress], None]

    def __call__(self, site: str) -> None:
        self.done += 1
        self.emit(Progress(self.block, self.blocks, site, self.done, self.total))


class _Block:
    """One block being encoded: its stages in order, and its hidden states moved on to the next block."""

    def __init__(
        self, source: Source, recipe: Recipe, stream: Stream, i: int, block: nn.Module, hidden: Hidden | None,
        coverage: Coverage, report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.source, self.recipe, self.stream, self.i, self.block = source, recipe, stream, i, block
        self.hidden, self.coverage, self.report = hidden, coverage, report
        self.name = source.blocks[i]
        self.sites = coverage.in_block(self.name)
        self.needs = {site: t.encoder.needs for site, (_, t) in self.sites.items()}
        self.codes: dict[str, QTensor] = {}
        self.reports: list[SiteReport] = []

    def encode(self) -> tuple[dict[str, QTensor], list[SiteReport]]:
        if self.hidden is None:
            self._encode(list(self.sites), {})
            return self.codes, self.reports
        stages = discover(self.stream, self.i, self.block, self.hidden, list(self.sites))
        sequential = any(t.encoder.true_sequential for _, t in self.sites.values())
        last = self.i + 1 == len(self.source.blocks)
        if sequential and all(len(stage.inputs) == 1 for stage in stages) and self._fits():
            self._lockstep(stages, self.hidden, last)
            return self.codes, self.reports
        for group in [[stage] for stage in stages] if sequential else [stages]:
            found = observe(self.stream, self.i, self.block, self.hidden, group, self.needs)
            self._encode([site for stage in group for site in stage.sites], found)
        if not last:
            self.hidden.advance(self.stream, self.i, self.block)
        return self.codes, self.reports

    def _lockstep(self, stages: list[Stage], hidden: Hidden, last: bool) -> None:
        """All stages in one forward pass."""
        gates = [self.block.get_submodule(stage.sites[0].removeprefix(self.name + ".")) for stage in stages]
        with Lockstep(self.stream, self.i, self.block, hidden, gates) as batches:
            for stage, gate in zip(stages, gates, strict=True):
                stats = new_stats(stage.inputs[0], self.needs, gate, self.stream.device)
                batches.until(gate, lambda x, stats=stats: stats.update(x.reshape(-1, x.shape[-1])))  # type: ignore[misc]
                self._encode(stage.sites, dict.fromkeys(stage.sites, stats))
            if not last:
                batches.finish()

    def _fits(self) -> bool:
        """Whether the activations inside the block of all tokens fit beside the rest (a rough upper estimate)."""
        assert self.hidden is not None
        widths = sum(sum(site.shape) for site, _ in self.sites.values())
        windows, length, _ = self.hidden.data.shape
        return windows * length * widths * self.hidden.data.element_size() <= LIMIT

    def _encode(self, sites: list[str], found: Mapping[str, Stats]) -> None:
        """Encode sites from their statistics; what follows in the block then sees the low-bit weights."""
        for site in sites:
            q, decoded, report = _encode_site(self.source, site, self.coverage, found.get(site))
            self.codes[site] = q
            self.reports.append(report)
            if self.hidden is not None:
                _replace(self.recipe, self.block, self.name, site, decoded)
            self.report(site)


def _replace(recipe: Recipe, block: nn.Module, name: str, site: str, decoded: Matrix) -> None:
    """Let the forward pass use a site's low-bit weight, unless the recipe propagates the original."""
    if recipe.calibration.propagate == "quantized":
        set_matrix(block.get_submodule(site.removeprefix(name + ".")), decoded)


def _encode_site(
    source: Source, site: str, coverage: Coverage, stats: Stats | None
) -> tuple[QTensor, Matrix, SiteReport]:
    """The codes of one site, the weight that they stand for, and what became of it."""
    started = time.perf_counter()
    _, treatment = coverage.treated[site]
    # The method sees the weight as the file has it, not as the forward pass rounded it.
    W = matrix(source.load(site, torch.float32)).contiguous()
    stats = stats or Stats(site, {})
    q = treatment.encoder(Weight(site, W), stats, treatment.format)
    decoded = q.decode()
    error = decoded - W
    return q, decoded, SiteReport(
        site, treatment.method, treatment.format.name, q.nbytes, q.bits_per_weight,
        _weight_error(error, W), _output_error(error, W, stats), time.perf_counter() - started,
    )  # fmt: skip


_ERROR_ROWS = 64  # rows, evenly spaced, that the reported output error is taken over


def _weight_error(error: Matrix, W: Matrix) -> float:
    whole = float(W.square().sum())
    return float(error.square().sum()) / whole if whole else 0.0


def _output_error(error: Matrix, W: Matrix, stats: Stats) -> float | None:
    """Over a sample of rows; None without a Gram matrix."""
    if Gram not in stats:
        return None
    H = stats[Gram].sum()
    every = max(1, W.shape[0] // _ERROR_ROWS)
    error, W = error[::every], W[::every]
    whole = float((W @ H).mul_(W).sum())
    return float((error @ H).mul_(error).sum()) / whole if whole else 0.0
