"""A sink that keeps everything, and recipes from a line, for tests of the walk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.formats.qtensor import QTensor
from lowbit.pipeline.recipe import Calibration, Override, Recipe, parse
from lowbit.pipeline.walk import Finished, SiteReport


@dataclass
class Kept:
    """What a walk wrote; ``done`` blocks can be taken over by another walk."""

    blocks: dict[str, Finished] = field(default_factory=dict)

    def has(self, block: str) -> bool:
        return block in self.blocks

    def read(self, block: str) -> Finished:
        return self.blocks[block]

    def write(self, block: str, module: nn.Module, done: Finished) -> None:
        self.blocks[block] = done

    @property
    def reports(self) -> list[SiteReport]:
        return [report for done in self.blocks.values() for report in done.reports]

    @property
    def codes(self) -> dict[str, QTensor]:
        return {site: q for done in self.blocks.values() for site, q in done.codes.items()}

    @property
    def edited(self) -> dict[str, torch.Tensor]:
        return {name: value for done in self.blocks.values() for name, value in done.edited.items()}


def same_codes(a: Mapping[str, QTensor], b: Mapping[str, QTensor]) -> bool:
    """Whether two results hold the same bytes."""
    return a.keys() == b.keys() and all(
        torch.equal(p.data, q.data) for site in a for p, q in zip(a[site].parts(), b[site].parts(), strict=True)
    )


def recipe(line: str, *overrides: Override, **calibration: Any) -> Recipe:
    return parse(line).model_copy(update={"override": list(overrides), "calibration": Calibration(**calibration)})
