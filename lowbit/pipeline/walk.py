"""walk: the one loop over a model. Load a block, observe, encode, propagate, write, free.

Memory held at once: one block, its codes, the statistics of one stage, and the hidden states of the calibration
tokens (in a file beyond a limit). A finished block is one atomic write to the sink; to resume, blocks that the sink
has are run but not encoded again, so the result has the bytes of an undisturbed run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from lowbit.arrays import Float, Int, Tensor
from lowbit.calibration.stats import Gram, Stats
from lowbit.errors import CalibrationError
from lowbit.formats.qtensor import QTensor
from lowbit.methods.base import Weight
from lowbit.models.graph import matrix, set_matrix
from lowbit.models.source import Source
from lowbit.models.stream import Stream
from lowbit.pipeline.coverage import Coverage, audit
from lowbit.pipeline.observe import Stage, discover, observe
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.spill import Hidden


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
    if calibrated and tokens is None:
        raise CalibrationError("this recipe needs calibration text", where=recipe.line, fix="--text FILE")
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
        if finished:
            codes: Mapping[str, QTensor] = sink.read(name)
        else:
            report = _Counter(i, len(source.blocks), done, total, on_progress)
            codes, reports = _encode_block(source, recipe, stream, i, block, hidden, coverage, report)
        if finished and recipe.calibration.propagate == "quantized":
            for site, q in codes.items():
                set_matrix(block.get_submodule(site.removeprefix(name + ".")), q.decode(dtype))
        if hidden is not None and i + 1 < len(source.blocks):
            hidden.advance(stream, i, block)
        if not finished:
            sink.write(name, block, codes, reports)
        done += len(sites)
        del block
    return coverage


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


def _encode_block(
    source: Source, recipe: Recipe, stream: Stream, i: int, block: nn.Module, hidden: Hidden | None,
    coverage: Coverage, report: _Counter,
) -> tuple[dict[str, QTensor], list[SiteReport]]:  # fmt: skip
    """All sites of one block, stage by stage; each stage sees what the stages before it became."""
    name = source.blocks[i]
    sites = coverage.in_block(name)
    codes: dict[str, QTensor] = {}
    reports: list[SiteReport] = []
    if hidden is None:
        stages = [Stage(((site,),)) for site in sites]
    else:
        stages = discover(stream, i, block, hidden, list(sites))
    needs = {site: t.encoder.needs for site, (_, t) in sites.items()}
    # Without true-sequential methods one pass over the block serves all of its stages.
    together = not any(t.encoder.true_sequential for _, t in sites.values())
    observed = observe(stream, i, block, hidden, stages, needs) if together and hidden is not None else {}
    for stage in stages:
        if not together and hidden is not None:
            observed = observe(stream, i, block, hidden, [stage], needs)
        for site in stage.sites:
            encoded, site_report = _encode_site(source, site, coverage, observed.get(site))
            codes[site] = encoded
            reports.append(site_report)
            if hidden is not None and recipe.calibration.propagate == "quantized":
                set_matrix(block.get_submodule(site.removeprefix(name + ".")), encoded.decode(stream.dtype))
            report(site)
    return codes, reports


def _encode_site(
    source: Source, site: str, coverage: Coverage, stats: Stats | None
) -> tuple[QTensor, SiteReport]:
    started = time.perf_counter()
    _, treatment = coverage.treated[site]
    # The method sees the weight as the file has it, not as the forward pass rounded it.
    W = matrix(source.load(site, torch.float32)).contiguous()
    stats = stats or Stats(site, {})
    q = treatment.encoder(Weight(site, W), stats, treatment.format)
    error = q.decode() - W
    return q, SiteReport(
        site, treatment.method, treatment.format.name, q.nbytes, q.bits_per_weight,
        _ratio(error, W, None), _ratio(error, W, stats), time.perf_counter() - started,
    )  # fmt: skip


_ERROR_ROWS = 128  # rows, evenly spaced, that the reported output error is taken over


def _ratio(error: Float[Tensor, "out in"], W: Float[Tensor, "out in"], stats: Stats | None) -> float | None:
    """Relative squared error of the weight, or of the output when a Gram matrix is there."""
    if stats is None:
        whole = float(W.square().sum())
        return float(error.square().sum()) / whole if whole else 0.0
    if Gram not in stats:
        return None
    H = stats[Gram].sum()
    every = max(1, W.shape[0] // _ERROR_ROWS)
    error, W = error[::every], W[::every]
    whole = float((W @ H).mul_(W).sum())
    return float((error @ H).mul_(error).sum()) / whole if whole else 0.0
