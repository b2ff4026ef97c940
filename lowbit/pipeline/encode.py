"""One block of the walk: transforms edit it, encoders turn its linears into codes, its hidden states move on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from torch import nn

from lowbit.arrays import Matrix, Tensor
from lowbit.calibration.cards import Card
from lowbit.calibration.samples import Range
from lowbit.calibration.stats import Gram, Stat, Stats
from lowbit.errors import RecipeError
from lowbit.formats.activation import ActivationFormat, Input
from lowbit.formats.qtensor import Columns, QTensor, Raw, Sum
from lowbit.methods.base import Edit, FoldScale, SetRanges, Transform, Weight
from lowbit.methods.rtn import Rtn
from lowbit.models.graph import set_matrix
from lowbit.models.source import Source
from lowbit.models.stream import Stream
from lowbit.pipeline.coverage import Coverage
from lowbit.pipeline.lockstep import Lockstep
from lowbit.pipeline.memory import Chunks
from lowbit.pipeline.observe import Stage, collector, discover, new_stats, observe
from lowbit.pipeline.recipe import Recipe, Treatment
from lowbit.pipeline.result import Finished, SiteReport
from lowbit.pipeline.spill import Hidden, room
from lowbit.pipeline.view import Edges, View


class BlockWork:
    """One block being transformed and encoded."""

    def __init__(
        self, source: Source, recipe: Recipe, stream: Stream, i: int, block: nn.Module, hidden: Hidden | None,
        original: Hidden | None, card: Card | None, coverage: Coverage, edges: Edges, chunks: Chunks,
        report: Callable[[str], None], fisher: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.source, self.recipe, self.stream, self.i, self.block = source, recipe, stream, i, block
        self.hidden, self.original, self.card = hidden, original, card
        self.chunks, self.report, self.fisher = chunks, report, fisher
        self.name = source.blocks[i]
        treatments = {site: t for site, (_, t) in coverage.in_block(self.name).items()}
        self.sites = coverage.in_block(self.name) if recipe.until == "codes" else {}
        self.needs = {site: t.encoder.needs | ranges_needed(t) for site, (_, t) in self.sites.items()}
        self.stages: list[Stage] = []
        if hidden is not None:
            every = [site.name for site in source.sites(self.name)]
            self.stages = discover(stream, i, block, hidden, every)
        inputs = [shared for stage in self.stages for shared in stage.inputs]
        self.view = View(source, self.name, block, treatments, inputs, self._run_sample, edges)
        self.seen: dict[str, Stats] = {}  # of the block as its edits left it
        self.codes: dict[str, QTensor] = {}
        self.inputs: dict[str, Input] = {}
        self.reports: list[SiteReport] = []

    def encode(self, last: bool) -> Finished:
        """The whole work on the block; afterwards the hidden states are those that the next block reads."""
        targets = self._targets(last)
        for _, transform in self.recipe.transforms:
            self._transform(transform)
        self.seen = {}
        if self.hidden is None:
            self._encode(list(self.sites), {} if self.card is None else _known(self.card, self.sites))
        elif self.recipe.tuner is not None and targets is not None:
            self._tune(targets)
            self._advance(last)
        else:
            self._calibrated(last)
        codes = self.codes | self._entered()
        changed = {n: v for n, v in self.view.edited.items() if n.removesuffix(".weight") not in codes}
        return Finished(codes, self.inputs, changed, self.reports)

    def _run_sample(self, block: nn.Module) -> Tensor:
        """One window through a copy of the block, in the copy's dtype."""
        assert self.hidden is not None
        return self.stream.run(self.i, block, self.hidden.data[:1].to(next(block.parameters()).dtype))

    def _targets(self, last: bool) -> Hidden | None:
        """What the original block makes of the original's hidden states, which move on to it."""
        if self.original is None:
            return None
        original = self.original
        self.chunks.run(lambda: original.advance(self.stream, self.i, self.block))
        return original

    def _transform(self, transform: Transform) -> None:
        """Watch the block as earlier edits left it, and apply what the transform wants changed.

        Nothing is watched again that follows from what was: a scale that moved from the inputs of linears into their
        weights.
        """
        needs = {site: transform.needs for shared in self.view.inputs for site in shared}
        if not all(
            site in self.seen and all(kind in self.seen[site] for kind in kinds) for site, kinds in needs.items()
        ):
            self.seen = {}
            self.seen = self._observe(self.stages, needs)
        edits = []
        for edit in transform(self.view, self.seen):
            self.view.apply(edit)
            edits.append(edit)
        if not all(self._follow(edit) for edit in edits):
            self.seen = {}

    def _follow(self, edit: Edit) -> bool:
        """Change what was seen as an edit changed the inputs; False where that is not known."""
        match edit:
            case SetRanges():
                return True
            case FoldScale(edge, scale):
                moved = {self.view.full(consumer) for consumer in edge.consumers}
                shared = [readers for readers in self.view.inputs if moved & {*readers}]
                if any(not moved >= {*readers} or readers[0] in self.view.entries for readers in shared):
                    return False
                for readers in shared:
                    self.seen[readers[0]].rescale(edge.consumers_scale(scale).reciprocal())
                return True
            case _:
                return False

    def _calibrated(self, last: bool) -> None:
        stages = [s for stage in self.stages if (s := stage.only(self.sites)) is not None]
        sequential = any(t.encoder.true_sequential for _, t in self.sites.values())
        if sequential and all(len(stage.inputs) == 1 for stage in stages) and self._fits():
            if self.chunks.attempt(lambda: self._lockstep(stages, last)):
                return
            stages = [s for stage in stages if (s := stage.only(self.sites.keys() - self.codes.keys())) is not None]
        for group in [[stage] for stage in stages] if sequential else [stages]:
            self._encode([site for stage in group for site in stage.sites], self._observe(group, self.needs))
        self._advance(last)

    def _lockstep(self, stages: list[Stage], last: bool) -> None:
        """All stages in one forward pass."""
        assert self.hidden is not None
        gates = [self.view.module(stage.sites[0]) for stage in stages]
        with Lockstep(self.stream, self.i, self.block, self.hidden, gates) as batches:
            for stage, gate in zip(stages, gates, strict=True):
                entry = self.view.entries.get(stage.sites[0])
                stats = new_stats(stage.inputs[0], self.needs, gate, self.stream.device, entry)
                batches.until(gate, collector(stats, entry))
                self._encode(stage.sites, dict.fromkeys(stage.sites, stats))
            if not last:
                batches.finish()

    def _run_with_gradients(self, block: nn.Module, hidden: Tensor, i: int) -> Tensor:
        self.stream.learn((hidden.shape[0], hidden.shape[1]))
        return self.stream.run_with_gradients(self.i, block, hidden)

    def _tune(self, targets: Hidden) -> None:
        """Let the tuner choose the codes of every site at once."""
        tuner = self.recipe.tuner
        assert tuner is not None
        assert self.hidden is not None
        for site, entry in self.view.entries.items():
            if not getattr(entry, "orthogonal", False):
                raise RecipeError(
                    "a tuner can follow rotations only", where=site, fix="gptq after that step",
                    why="gradients do not go back through other ways into a linear",
                )  # fmt: skip
        started = time.perf_counter()
        found = self._observe(self.stages, self.needs)
        weights = {site: self._weight(site) for site in self.sites}
        formats = {site: t.format for site, (_, t) in self.sites.items()}
        modules = {site: self.view.module(site) for site in self.sites}
        codes = tuner(
            self.block, self._run_with_gradients, self.hidden.data, targets.data, weights, found, formats, modules,
            self.view.entries,
        )  # fmt: skip
        each = (time.perf_counter() - started) / len(self.sites)
        for site in self.sites:
            self._finish(site, codes[site], weights[site].matrix, found.get(site), each)

    def _encode(self, sites: list[str], found: Mapping[str, Stats]) -> None:
        """Encode sites from their statistics; what follows in the block then sees the low-bit weights."""
        for site in sites:
            started = time.perf_counter()
            w, treatment, stats = self._weight(site), self.sites[site][1], found.get(site) or Stats(site, {})
            unseen = bool(treatment.encoder.needs) and not any(kind in stats for kind in treatment.encoder.needs)
            encoder = Rtn(clip=20) if unseen and found else treatment.encoder
            q = encoder(w, stats, treatment.format)
            note = UNSEEN if encoder is not treatment.encoder else ""
            self._finish(site, q, w.matrix, stats, time.perf_counter() - started, note)

    def _weight(self, site: str) -> Weight:
        fisher = self.fisher.get(site)
        return replace(self.view.to_encode(site), fisher=None if fisher is None else fisher.to(self.stream.device))

    def _finish(self, site: str, q: QTensor, W: Matrix, stats: Stats | None, seconds: float, note: str = "") -> None:
        treatment, entry = self.sites[site][1], self.view.entries.get(site)
        decoded = q.decode()
        error = decoded - W
        whole = q if entry is None else entry.wrap(q)
        self.codes[site] = whole
        if treatment.activations is not None:
            self.inputs[site] = _input(treatment.activations, stats)
        self.reports.append(SiteReport(
            site, treatment.method, treatment.format.name, whole.nbytes, whole.bits_per_weight,
            _weight_error(error, W), _output_error(error, W, stats), seconds,
            note or _remark(q) or str(getattr(entry, "note", "")),
        ))  # fmt: skip
        if self.hidden is not None:
            replace_by_codes(self.recipe, self.block, self.name, site, decoded if entry is None else whole.decode())
        self.report(site)

    def _entered(self) -> dict[str, QTensor]:
        """Linears that got another way in but no codes: their matrix behind it, in float32, for no bit to be lost."""
        free = self.view.entries.keys() - self.codes.keys()
        return {site: self.view.entries[site].wrap(Raw.of(self.view.weight(site))) for site in sorted(free)}

    def _observe(self, stages: list[Stage], needs: Mapping[str, frozenset[type[Stat]]]) -> dict[str, Stats]:
        hidden = self.hidden
        assert hidden is not None
        return self.chunks.run(
            lambda: observe(self.stream, self.i, self.block, hidden, stages, needs, self.view.entries)
        )

    def _advance(self, last: bool) -> None:
        if not last and self.hidden is not None:
            hidden = self.hidden
            self.chunks.run(lambda: hidden.advance(self.stream, self.i, self.block))

    def _fits(self) -> bool:
        """Whether the activations inside the block of all tokens fit beside the rest (a rough upper estimate)."""
        assert self.hidden is not None
        widths = sum(sum(site.shape) for site, _ in self.sites.values())
        windows, length, _ = self.hidden.data.shape
        return windows * length * widths * self.hidden.data.element_size() <= room(self.stream.device)


def _known(card: Card, sites: Collection[str]) -> dict[str, Stats]:
    """What a card holds of the inputs of a block; linears with a common input share one object."""
    found: dict[str, Stats] = {}
    for readers in card.inputs:
        if wanted := [site for site in readers if site in sites]:
            found |= dict.fromkeys(wanted, card.stats(wanted[0]))
    return found


UNSEEN = "no calibration token reached it: rounded to nearest"


def replace_by_codes(recipe: Recipe, block: nn.Module, name: str, site: str, decoded: Matrix) -> None:
    """Let the forward pass use a site's low-bit weight, unless the recipe propagates the original."""
    if recipe.calibration.propagate == "quantized":
        set_matrix(block.get_submodule(site.removeprefix(name + ".")), decoded)


def ranges_needed(treatment: Treatment) -> frozenset[type[Stat]]:
    """The statistic that static rounding of inputs is calibrated by."""
    static = treatment.activations is not None and treatment.activations.static
    return frozenset({Range}) if static else frozenset()


def _input(fmt: ActivationFormat, stats: Stats | None) -> Input:
    """How a site's inputs are rounded: the range that they had in calibration, for a static format."""
    if not fmt.static:
        return Input(fmt)
    assert stats is not None
    seen = stats[Range]
    return Input(fmt, seen.low.min().view(1).cpu(), seen.high.max().view(1).cpu())


def _remark(q: QTensor) -> str:
    """What a reader of the report should know about how a site is held."""
    columns = [term.index.numel() for term in q.terms if isinstance(term, Columns)] if isinstance(q, Sum) else []
    return f"{sum(columns)} columns in 16 bit" if columns else ""


_ERROR_ROWS = 64  # rows, evenly spaced, that the reported output error is taken over


def _weight_error(error: Matrix, W: Matrix) -> float:
    whole = float(W.square().sum())
    return float(error.square().sum()) / whole if whole else 0.0


def _output_error(error: Matrix, W: Matrix, stats: Stats | None) -> float | None:
    """Over a sample of rows; None without a Gram matrix."""
    if stats is None or Gram not in stats:
        return None
    H = stats[Gram].sum()
    every = max(1, W.shape[0] // _ERROR_ROWS)
    error, W = error[::every], W[::every]
    whole = float((W @ H).mul_(W).sum())
    return float((error @ H).mul_(error).sum()) / whole if whole else 0.0
