"""walk: the one loop over a model. Load a block, observe, edit, encode, propagate, write, free.

Memory held at once: one block, its edited weights and codes, the statistics of one stage, and the hidden states of
the calibration tokens (in a file beyond a limit). A finished block is one atomic write to the sink; to resume, blocks
that the sink has are run but not encoded again, so the result has the bytes of an undisturbed run. Out of memory, the
walk halves the windows that it runs at once, says so, and goes on.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.arrays import Int, Tensor
from lowbit.calibration.cards import Card
from lowbit.errors import CalibrationError
from lowbit.models.source import Source
from lowbit.models.stream import Stream
from lowbit.pipeline.coverage import Coverage, audit
from lowbit.pipeline.encode import BlockWork, replace_by_codes
from lowbit.pipeline.memory import Chunks
from lowbit.pipeline.rate import known_fisher
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.result import Finished, Progress, Sink, SiteReport
from lowbit.pipeline.shared import check_card
from lowbit.pipeline.spill import Hidden
from lowbit.pipeline.view import Edges

__all__ = ["Finished", "Progress", "Sink", "SiteReport", "prepared", "walk"]


@contextlib.contextmanager
def _older_objects_aside() -> Iterator[None]:
    """Collections in here look at new objects alone: those of the imported libraries cost half a second each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_older_objects_aside()
def walk(
    source: Source,
    recipe: Recipe,
    tokens: Int[Tensor, "windows length"] | None,
    sink: Sink,
    *,
    card: Card | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Coverage:
    """Quantize every block of a model into ``sink``; returns what was covered.

    ``tokens`` may be None when no step needs statistics, or when a ``card`` holds them; then no activation is ever
    computed. ``dtype`` is the dtype of the forward passes, ``device`` where they, the statistics and the methods run;
    what reaches the sink is on the CPU. Raises CoverageError before any work when a matrix would be missed,
    CalibrationError for tokens that do not fit, or a card of another model or of too few statistics.
    """
    coverage = audit(source, recipe)
    stream, hidden = Stream(source, dtype, device), None
    if card is not None:
        check_card(card, source, recipe, coverage)
    elif recipe.calibrated:
        _check_tokens(source, recipe, tokens)
        assert tokens is not None
        hidden = Hidden.embed(stream, tokens, recipe.calibration.batch)
    # a tuner aims at what the original model computes, so the original's hidden states are carried along
    original = hidden.copy() if hidden is not None and recipe.tuner is not None else None
    stream.close()
    edges, total, done = Edges(), len(coverage.treated), 0
    fisher = known_fisher(source, coverage, tokens, dtype, on_progress)
    for i, name in enumerate(source.blocks):
        sites, last = coverage.in_block(name), i + 1 == len(source.blocks)
        if sink.has(name) and hidden is None:
            done += len(sites)
            continue
        block = stream.load(i)
        counter = _Counter(i, len(source.blocks), done, total, on_progress)
        chunks = Chunks(stream, [h for h in (hidden, original) if h is not None], counter.note)
        if not sink.has(name):
            work = BlockWork(
                source, recipe, stream, i, block, hidden, original, card, coverage, edges, chunks, counter.site,
                fisher,
            )  # fmt: skip
            sink.write(name, block, _on_cpu(work.encode(last)))
            del work
        elif hidden is not None:
            finished = sink.read(name)
            if original is not None and not last:
                chunks.run(lambda b=block, i=i: original.advance(stream, i, b))  # type: ignore[misc]
            for full, value in finished.edited.items():
                _put(block, full.removeprefix(name + "."), value, dtype, stream.device)
            for site, q in finished.codes.items():
                replace_by_codes(recipe, block, name, site, q.decode().to(stream.device))
            if not last:
                chunks.run(lambda b=block, i=i: hidden.advance(stream, i, b))  # type: ignore[misc]
        done += len(sites)
        del block
        gc.collect()  # a block's view and what runs it hold each other, and the block
    return coverage


def prepared(source: Source, recipe: Recipe) -> Source:
    """The source that a recipe's walk and sink must be given: transforms of the whole model are applied to it."""
    for _, transform in recipe.transforms:
        source = transform.prepare(source) if hasattr(transform, "prepare") else source
    return source


def _put(block: nn.Module, name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    owner, _, leaf = name.rpartition(".")
    block.get_submodule(owner)._parameters[leaf] = nn.Parameter(value.to(device, dtype), requires_grad=False)


def _to_host(t: Tensor) -> Tensor:
    """Through page-locked memory, which torch keeps for the next block: fresh pages cost more than the copy."""
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t) if t.is_cuda else t


def _on_cpu(done: Finished) -> Finished:
    return Finished(
        {site: q.map(_to_host) for site, q in done.codes.items()}, done.inputs,
        {name: value.cpu() for name, value in done.edited.items()}, done.reports,
    )  # fmt: skip


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
    """Turns finished sites and notes into progress."""

    block: int
    blocks: int
    done: int
    total: int
    emit: Callable[[Progress], None]

    def site(self, site: str) -> None:
        self.done += 1
        self.emit(Progress(self.block, self.blocks, site, self.done, self.total))

    def note(self, note: str) -> None:
        self.emit(Progress(self.block, self.blocks, "", self.done, self.total, note))
