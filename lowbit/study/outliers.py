"""Cells of outlier statistics: of every linear's weights and inputs, and of keys and values, of the original.

outliers    model, text  ->  outliers.json: largest size, spread and kurtosis by layer and kind
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.study import stages
from lowbit.study.engine import Cell
from lowbit.study.rows import Member
from lowbit.study.spec import Outliers
from lowbit.study.worker import Stage

OUTLIERS = Stage("outliers", "lowbit.study.outliers:outliers", stages.REFERENCE.code)


@dataclass(frozen=True)
class OutlierGrid:
    """The one cell of a model."""

    model: str
    cell: Cell

    @property
    def cells(self) -> list[Cell]:
        return [self.cell]

    @property
    def members(self) -> list[Member]:
        return [Member(self.cell.key, f"{self.model}/outliers")]


def of_model(model: str, common: Mapping[str, Any], settings: Outliers, prefix: str = "") -> OutlierGrid:
    """The cell of one model; ``common`` are the parameters that scored cells share. Runs nothing."""
    shared = {key: common[key] for key in ("model", "model_digest", "dtype", "text", "text_digest")}
    cell = Cell(OUTLIERS, f"{prefix}outliers of {model}", (), {**shared, **settings.model_dump()},
                common["model_digest"])  # fmt: skip
    return OutlierGrid(model, cell)
