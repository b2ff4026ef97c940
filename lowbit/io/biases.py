"""Biases that a transform gave to linears which the model builds without: loaders drop what a configuration lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from lowbit.arrays import Tensor
from lowbit.errors import ExportError
from lowbit.io.opening import skeleton
from lowbit.models.source import Source
from lowbit.models.store import Memory


@dataclass(frozen=True)
class Biases:
    """Configuration under which the model builds the biases, and the zeros for those that come along with them."""

    config: Mapping[str, Any]
    zeros: Mapping[str, Tensor]


def with_biases(source: Source, config: Mapping[str, Any], added: frozenset[str]) -> Biases:
    """The fewest ``*bias`` switches of the configuration that make the model build every bias of ``added``.

    Raises ExportError where the family has no such switch: its loaders would drop the biases in silence.
    """
    if not added:
        return Biases(config, {})
    before = {name for name, _ in source.skeleton.named_parameters()}
    switches = [key for key, value in config.items() if key.endswith("bias") and value is False]
    for count in range(1, len(switches) + 1):
        for chosen in combinations(switches, count):
            changed = {**config, **dict.fromkeys(chosen, True)}
            model = skeleton(source.name, changed, Memory({}), None).skeleton
            new = {name: p for name, p in model.named_parameters() if name not in before}
            if added <= new.keys() and all(p.ndim == 1 and name.endswith("bias") for name, p in new.items()):
                return Biases(changed, {n: torch.zeros(p.shape) for n, p in new.items() if n not in added})
    raise ExportError(
        f"{len(added)} linears have a bias that this family builds without", where=min(added),
        why="a transform moved an offset into it, and loaders of other ecosystems would drop it",
        fix="a recipe whose transforms add no biases",
    )  # fmt: skip
