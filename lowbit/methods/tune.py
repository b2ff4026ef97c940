"""Learned rounding, block by block: codes that make a block's output right, whatever came before it.

Every linear starts from GPTQ. The loss is the block's: its output on inputs that went through the blocks rounded so
far, against the original block's output on the original inputs, as a relative error a token. Two things bring it down:

- *Correction* (no gradients): linears that write to the residual stream are given weights that also supply what the
  output lacks, as far as a ridge regression on their own inputs predicts it, before they are rounded
  (:mod:`lowbit.methods.training.residual`). This is most of the gain, for two more forward passes.
- *Descent*: the rounding of all linears is learned together by signed gradient descent (SignRound, Cheng et al., arXiv
  2309.05516), from where GPTQ put each code (:mod:`lowbit.methods.training.rounding`). SignRound starts from round to
  nearest and learns offsets; starting from searched values is what LLMC recommends (arXiv 2405.06001).

More calibration text helps both: the loss on calibration tokens falls far below that on new ones. What was measured,
and what was left out because it does not pay, is in benchmarks/tuner_study.py.

Options: ``share`` and ``ridge`` of the correction (share 0: none); ``steps`` of the descent (0: none), of ``batch``
windows each; ``lr`` in code distances and ``scale_lr`` as a share of a step size (plain scales; coded ones, as in
mxfp4, stay as fitted), both falling to zero linearly; ``start`` (gptq or rtn), ``clip`` and ``damp`` as in gptq;
``seed`` of the order of windows; ``fisher`` as in gptq. Entropy-coded formats take ``steps=0``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit.arrays import Float, Matrix, Tensor
from lowbit.calibration.stats import Gram, Stat, Stats
from lowbit.errors import CalibrationError, RecipeError
from lowbit.formats.ec import Entropy
from lowbit.formats.format import Format
from lowbit.formats.qtensor import QTensor, Raw
from lowbit.methods.base import Entry, Kind, Weight
from lowbit.methods.columns import feedback, round_columns
from lowbit.methods.columns.lattice import gptq_at_rate, rtn_at_rate
from lowbit.methods.training.residual import Run, lack, order_and_writers, relative
from lowbit.methods.training.rounding import Held, Rounding, learnable
from lowbit.models.graph import set_matrix

_UNSEEN_CLIP = 20  # ranges searched for an expert that no token reached, as everywhere


@dataclass(frozen=True)
class Tune:
    share: float = 0.7
    ridge: float = 0.3
    steps: int = 64
    batch: int = 2
    lr: float = 0.005
    scale_lr: float = 0.001
    start: str = "gptq"
    clip: int = 20
    damp: float = 0.01
    seed: int = 0
    fisher: bool = True

    kind: ClassVar[Kind] = "tuner"
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.start not in ("gptq", "rtn"):
            raise RecipeError(f"unknown start {self.start!r}", where="tune", fix="start=gptq or start=rtn")
        if min(self.share, self.lr, self.scale_lr, self.damp, self.steps, self.clip) < 0:
            raise RecipeError("an option is negative", where="tune", fix="0 turns a part off")
        if self.ridge <= 0 or self.batch < 1:
            raise RecipeError(
                f"ridge {self.ridge} and batch {self.batch} must be positive", where="tune", fix="ridge=0.3, batch=2"
            )

    @property
    def any_rate(self) -> bool:
        return not self.steps  # a step of descent would change the size

    @property
    def needs(self) -> frozenset[type[Stat]]:
        return frozenset({Gram})

    def __call__(
        self,
        block: nn.Module,
        run: Run,
        inputs: Float[Tensor, "windows length d"],
        targets: Float[Tensor, "windows length d"],
        weights: Mapping[str, Weight],
        stats: Mapping[str, Stats],
        formats: Mapping[str, Format],
        modules: Mapping[str, nn.Module],
        entries: Mapping[str, Entry],
    ) -> Mapping[str, QTensor]:
        """Codes of every site of ``weights``; the block is left as it was.

        Cost, in forward passes over the windows: one a linear that writes to the residual stream, and three (forward
        and back) for the ``steps * batch`` windows of the descent; GPTQ beside. Memory: three float32 copies of the
        block's weights and the activations of ``batch`` windows. Raises FormatError for formats without blocks along
        rows, and CalibrationError when the loss is not finite.
        """
        for site, fmt in formats.items():
            if self.steps or not isinstance(fmt, Entropy):
                learnable(fmt, site)
        kept = {site: module.weight for site, module in modules.items()}
        try:
            roundings = self._start(block, run, inputs, targets, weights, stats, formats, modules, entries)
            if self.steps:
                self._descend(block, run, inputs, targets, roundings, modules, entries)
        finally:
            for site, module in modules.items():
                module.weight = kept[site]
        return {site: roundings[site].encode() for site in weights}

    def _start(
        self, block: nn.Module, run: Run, inputs: Tensor, targets: Tensor, weights: Mapping[str, Weight],
        stats: Mapping[str, Stats], formats: Mapping[str, Format], modules: Mapping[str, nn.Module],
        entries: Mapping[str, Entry],
    ) -> dict[str, Rounding | Held]:  # fmt: skip
        """Every linear rounded, in order of execution; those that write to the stream after what they can correct."""
        order, writers = order_and_writers(block, run, inputs[:1], modules)
        found: dict[str, Rounding | Held] = {}
        for site in order:
            w, gram, entry = weights[site], _gram(stats.get(site)), entries.get(site)
            missing = None
            if self.share and site in writers:
                missing = lack(block, run, inputs, targets, modules[site], self.batch)
            if missing is not None:
                dW = missing.correction(self.share, self.ridge)
                w = replace(w, matrix=w.matrix + (dW if entry is None else entry.weight(dW)))
                gram = missing.gram if entry is None else _entered(missing.gram, entry)
            found[site] = self._round(w, gram, formats[site])
            set_matrix(modules[site], _outside(found[site].weight(), entry))
        return found

    def _round(self, w: Weight, gram: Gram | None, fmt: Format) -> Rounding | Held:
        """The start of one linear: GPTQ, or round to nearest where asked or where no token was seen."""
        if isinstance(fmt, Entropy):
            if gram is not None and self.start == "gptq":
                return Held(gptq_at_rate(w, gram, fmt, self.damp, True, self.fisher))
            return Held(rtn_at_rate(w, None if gram is None else gram.mean_square(), fmt))
        W = w.matrix.contiguous()
        if gram is None:
            params = fmt.fit(W, None, _UNSEEN_CLIP, ranges=w.ranges)
        else:
            params = fmt.fit(W, gram.mean_square() if self.clip else None, self.clip, ranges=w.ranges)
        if gram is None or self.start == "rtn":
            zero = None if params.zero is None else fmt.block.spread(params.zero, tuple(W.shape))
            codes = fmt.snap(W, fmt.block.spread(params.step, tuple(W.shape)), zero, params.table).codes
        else:
            order, L = feedback(gram, self.damp, True, w.name)
            codes, _ = round_columns(W, L, order, fmt, params, 64)
        return Rounding(W, codes, params, fmt)

    def _descend(
        self, block: nn.Module, run: Run, inputs: Tensor, targets: Tensor, roundings: Mapping[str, Rounding | Held],
        modules: Mapping[str, nn.Module], entries: Mapping[str, Entry],
    ) -> None:  # fmt: skip
        """Signed gradient descent on all linears together."""
        loss = torch.zeros(())
        for step, i in zip(range(self.steps), self._windows(len(inputs)), strict=False):
            for site, rounding in roundings.items():
                set_matrix(modules[site], _outside(rounding.weight(), entries.get(site)))
                modules[site].weight.requires_grad_(True)
            with torch.enable_grad():
                out = run(block, inputs[i : i + self.batch], i).to(torch.float32)
                target = targets[i : i + self.batch].to(out)
                loss = ((out - target).square().sum(-1) * relative(target)).mean()
                loss.backward()
            left = 1 - step / self.steps
            for site, rounding in roundings.items():
                if (grad := _gradient(modules[site])) is not None:  # an expert may have had no token
                    entry = entries.get(site)
                    inside = grad if entry is None else entry.weight(grad)
                    rounding.move(inside, self.lr * left, self.scale_lr * left)
        if not math.isfinite(float(loss.detach())):
            raise CalibrationError(
                "the loss of learned rounding is not finite", where=next(iter(modules)),
                why="gradients of such a loss say nothing about the rounding", fix="passes in float32 or bfloat16",
            )  # fmt: skip

    def _windows(self, count: int) -> Iterator[int]:
        """First windows of batches, for ever: every batch once an epoch, in an order of its own."""
        generator = torch.Generator().manual_seed(self.seed)
        starts = range(0, count, self.batch)
        while True:
            for k in torch.randperm(len(starts), generator=generator).tolist():
                yield starts[k]


def _outside(inner: Matrix, entry: Entry | None) -> Matrix:
    """The matrix that the block's own inputs meet."""
    return inner if entry is None else entry.wrap(Raw.of(inner)).decode()


def _entered(gram: Gram, entry: Entry) -> Gram:
    """The Gram matrix of entered inputs, from that of the inputs: both of its sides enter."""
    return Gram.of(entry.enter(entry.enter(gram.sum()).t().contiguous()), gram.tokens)


def _gram(stats: Stats | None) -> Gram | None:
    return None if stats is None or Gram not in stats else stats[Gram]


def _gradient(module: nn.Module) -> Matrix | None:
    """The gradient of a linear's matrix (out, in)."""
    grad: Tensor | None = module.weight.grad  # type: ignore[assignment]
    if grad is None:
        return None
    grad = grad.to(torch.float32)
    return grad.t() if isinstance(module, Conv1D) else grad


METHOD = Tune
