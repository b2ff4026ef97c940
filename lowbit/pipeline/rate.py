"""What entropy-coded formats ask of the whole model: how much its predictions depend on each output of each linear."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.formats.ec import Entropy
from lowbit.models.source import Source
from lowbit.pipeline.coverage import Coverage
from lowbit.pipeline.fisher import output_fisher
from lowbit.pipeline.recipe import Treatment
from lowbit.pipeline.result import Progress

TOKENS = 2048  # of the calibration text, for gradients: only the order of magnitude of each row counts


def asks_fisher(treatments: Iterable[Treatment]) -> bool:
    """Whether some linear's encoder weighs rows by their Fisher information."""
    return any(map(_asks, treatments))


def known_fisher(
    source: Source, coverage: Coverage, tokens: Int[Tensor, "windows length"] | None, dtype: torch.dtype,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Float[Tensor, "out"]]:  # fmt: skip
    """The Fisher information of every output of the linears that ask for it (:func:`output_fisher`).

    From the first 2048 of the calibration tokens, or one window; on the CPU. Empty where none asks, or without tokens.
    """
    sites = {name for name, (_, treatment) in coverage.treated.items() if _asks(treatment)}
    if not sites or tokens is None:
        return {}
    windows = tokens[: max(1, TOKENS // tokens.shape[1])].cpu()
    on_progress(Progress(0, len(source.blocks), "", 0, len(coverage.treated), "Measuring what predictions depend on"))
    return {site: found.outputs for site, found in output_fisher(source, windows, sites, dtype, 1).items()}


def _asks(treatment: Treatment) -> bool:
    return isinstance(treatment.format, Entropy) and bool(getattr(treatment.encoder, "fisher", False))
