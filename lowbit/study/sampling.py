"""Cells of what models write: every setting of a sampler, with the same random numbers for all (evaluation/sampler.py).

write    a model, prompts, settings, seeds  ->  texts by setting, their likelihood under the original, costs

A candidate's cell needs no other cell: the original that reads its texts is loaded beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.study import stages
from lowbit.study.engine import Cell
from lowbit.study.rows import Member
from lowbit.study.spec import Sampling
from lowbit.study.worker import Stage

WRITE = Stage("write", "lowbit.study.sampling:write", stages.REFERENCE.code)


@dataclass(frozen=True)
class SampleGrid:
    """The cells of one model: what the original writes, and every candidate by label."""

    model: str
    settings: Sampling
    reference: Cell
    versions: Mapping[str, Cell]

    @property
    def cells(self) -> list[Cell]:
        return [self.reference, *self.versions.values()]

    @property
    def members(self) -> list[Member]:
        return [Member(cell.key, f"{self.model}/write") for cell in self.cells]


def of_made(
    model: str, common: Mapping[str, Any], made: Mapping[str, Cell], settings: Sampling, prefix: str = ""
) -> SampleGrid:
    """The cells of candidates that a study makes; ``made`` maps labels to the cells whose checkpoints they are.

    ``common`` are the parameters that scored cells share (model, text, dtype and their digests). Runs nothing.
    """
    shared = {key: common[key] for key in ("model", "model_digest", "dtype", "text", "text_digest")}
    params = {**shared, **settings.model_dump(exclude={"lengths"})}  # shorter texts are read off the longest
    reference = Cell(WRITE, f"{prefix}texts of {model}", (), params, common["model_digest"])
    versions = {
        label: Cell(WRITE, f"{prefix}texts of {label}", (cell.key,), params, cell.key) for label, cell in made.items()
    }
    return SampleGrid(model, settings, reference, versions)
