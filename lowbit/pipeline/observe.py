"""Watching a block run: which linears read the same input, in which order, and the statistics of those inputs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lowbit.arrays import Tensor
from lowbit.calibration.stats import Stat, Stats
from lowbit.methods.base import Entry
from lowbit.models.graph import is_linear, matrix
from lowbit.models.stream import Stream
from lowbit.pipeline.spill import Hidden


@dataclass(frozen=True)
class Stage:
    """Linears of a block whose statistics can be taken at once; each inner tuple reads one common input."""

    inputs: tuple[tuple[str, ...], ...]

    @property
    def sites(self) -> list[str]:
        return [site for shared in self.inputs for site in shared]

    def only(self, sites: Collection[str]) -> Stage | None:
        """The same with only some sites; None when it has none of them."""
        inputs = tuple(left for shared in self.inputs if (left := tuple(s for s in shared if s in sites)))
        return Stage(inputs) if inputs else None


def discover(stream: Stream, i: int, block: nn.Module, hidden: Hidden, sites: list[str]) -> list[Stage]:
    """The stages of a block in order of execution, found by running one window.

    Linears are put together when they are given the very same tensor (q, k and v; gate and up). Experts of one
    layer form a stage of their own for each matrix kind, whether or not this batch reaches them.
    """
    calls: list[tuple[str, Tensor]] = []
    name = stream.source.blocks[i]
    handles = [
        _linear(block, name, site).register_forward_pre_hook(_remember(calls, site)) for site in sites
    ]  # fmt: skip
    try:
        stream.run(i, block, hidden.data[:1])
    finally:
        _remove(handles)
    shared: dict[tuple[int, int], list[str]] = {}
    for site, x in calls:  # the tensors are alive in ``calls``, so address and width name one input
        readers = shared.setdefault((x.data_ptr(), x.shape[-1]), [])
        if site not in readers:
            readers.append(site)
    seen = {site for site, _ in calls}
    groups = [tuple(readers) for readers in shared.values()] + [(site,) for site in sites if site not in seen]
    stages: dict[str, list[tuple[str, ...]]] = {}
    for group in groups:
        stages.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.*.", group[0]), []).append(group)
    return [Stage(tuple(inputs)) for inputs in stages.values()]


def observe(
    stream: Stream, i: int, block: nn.Module, hidden: Hidden, stages: list[Stage],
    needs: Mapping[str, frozenset[type[Stat]]], entries: Mapping[str, Entry] | None = None,
) -> dict[str, Stats]:  # fmt: skip
    """The statistics that the sites of ``stages`` need; linears with a common input share one object.

    Where a linear has another way in (``entries``), they are those of the entered inputs. When there is one input to
    watch, a pass ends as soon as it has been seen.
    """
    name = stream.source.blocks[i]
    taps: list[tuple[str, Stats, Entry | None]] = []
    found: dict[str, Stats] = {}
    for stage in stages:
        for shared in stage.inputs:
            if not any(needs.get(site) for site in shared):
                continue
            entry = (entries or {}).get(shared[0])
            stats = new_stats(shared, needs, _linear(block, name, shared[0]), stream.device, entry)
            taps.append((shared[0], stats, entry))
            found |= dict.fromkeys(shared, stats)
    if not taps:
        return found
    handles = [
        _linear(block, name, site).register_forward_pre_hook(_collect(collector(stats, entry), last=len(taps) == 1))
        for site, stats, entry in taps
    ]
    try:
        for batch in hidden.batches():
            with contextlib.suppress(_Enough):
                stream.run(i, block, hidden.data[batch])
    finally:
        _remove(handles)
    return found


def new_stats(
    shared: tuple[str, ...], needs: Mapping[str, frozenset[type[Stat]]], linear: nn.Module, device: torch.device,
    entry: Entry | None = None,
) -> Stats:  # fmt: skip
    """Empty statistics for linears that read one input: all that any of them needs."""
    kinds = frozenset(kind for site in shared for kind in needs.get(site, ()))
    width = matrix(linear).shape[1]
    if entry is not None:
        width = entry.enter(torch.zeros(1, width, device=device)).shape[1]
    return Stats.of(shared[0], kinds, width, device)


def collector(stats: Stats, entry: Entry | None) -> Callable[[Tensor], None]:
    """What takes in the inputs of a linear, as it is given them."""

    def collect(x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        stats.update(rows if entry is None else entry.enter(rows))

    return collect


class _Enough(Exception):
    """Ends a forward pass that has shown all that was wanted; carries no error."""


def _collect(see: Callable[[Tensor], None], last: bool) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(inputs[0])
        if last:
            raise _Enough

    return hook


def _remember(calls: list[tuple[str, Tensor]], site: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((site, inputs[0]))

    return hook


def _linear(block: nn.Module, name: str, site: str) -> nn.Module:
    module = block.get_submodule(site.removeprefix(name + "."))
    assert is_linear(module)
    return module


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
