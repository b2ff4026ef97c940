"""Tables of what was written, and of what writing took."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lowbit.evaluation.metrics import generations as gen
from lowbit.evaluation.metrics import survival
from lowbit.evaluation.metrics.generations import Texts
from lowbit.evaluation.sampler import Setting
from lowbit.evaluation.statistics import Interval
from lowbit.report import text
from lowbit.report.panel import Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses.sampling.claims import ratio, speed
from lowbit.study.analyses.sampling.evidence import Version, Wrote

_SHIFTS = (
    ("text_nll_ref", Column("Surprise of the original", "nat a token"), 1.0),
    ("repetition", Column("Repeated 4-grams", "%"), 100.0),
    ("loops", Column("Ends in a loop", "%"), 100.0),
    ("runaway", Column("Not ended", "%"), 100.0),
    ("length", Column("Length", "tokens"), 1.0),
)
_DISTINCT = Column("Distinct-2", "%")


def spelled(setting: Setting) -> str:
    """A setting in words."""
    if setting.temperature == 0:
        return "greedy"
    return f"T {setting.temperature:g}, " + ("all" if setting.top_k is None else f"top {setting.top_k}")


def main(wrote: Wrote) -> Titled:
    """Over all settings: the original's levels, then differences from it, text by text."""
    columns = (Column("Version", "", False), *(c for _, c, _ in _SHIFTS), _DISTINCT,
               Column("Greedy differs", "from token (median)"), Column("Drawn differs", "from token"))  # fmt: skip
    rows = [Row((Cell(wrote.original.label), *_levels(wrote.original.all), Cell(text.MISSING), Cell(text.MISSING)),
                is_reference=True)]  # fmt: skip
    for v in wrote.versions:
        parts = (parting(wrote.original.greedy, v.greedy), parting(wrote.original.drawn, v.drawn))
        rows.append(Row((Cell(v.label), *_shifts(wrote.original.all, v.all), *parts)))
    return Titled("What was written, over all settings", Table(columns, tuple(rows)))


def by_setting(wrote: Wrote) -> Titled:
    """The same, setting by setting."""
    columns = (Column("Setting", "", False), Column("Version", "", False), *(c for _, c, _ in _SHIFTS), _DISTINCT,
               Column("Differs", "from token (median)"))  # fmt: skip
    rows = []
    for setting, base in wrote.original.texts.items():
        name = Cell(spelled(setting))
        rows.append(
            Row((name, Cell(wrote.original.label), *_levels(base), Cell(text.MISSING)), is_reference=True)
        )  # fmt: skip
        for v in wrote.versions:
            mine = v.texts[setting]
            rows.append(Row((name, Cell(v.label), *_shifts(base, mine), parting(base, mine))))
    return Titled("Setting by setting", Table(columns, tuple(rows)), folded=True)


def by_length(wrote: Wrote) -> list[Titled]:
    """The first tokens of the same texts, as a smaller ``max_new_tokens`` would have left them."""
    if not wrote.lengths:
        return []
    columns = (Column("New tokens", "at most"), Column("Version", "", False), *(c for _, c, _ in _SHIFTS), _DISTINCT)
    rows = []
    for steps in (*wrote.lengths, wrote.steps):
        base, at = wrote.original.all.first(steps), Cell(str(steps))
        rows.append(Row((at, Cell(wrote.original.label), *_levels(base)), is_reference=True))
        rows += [Row((at, Cell(v.label), *_shifts(base, v.all.first(steps)))) for v in wrote.versions]
    return [Titled("By length, over all settings", Table(columns, tuple(rows)), folded=True)]


def costs(wrote: Wrote) -> Titled:
    """Speed of one text at a time, prefill and decode apart, and memory."""
    columns = (
        Column("Version", "", False), Column("Kernel", "of the linears", False),
        Column("Prefill", "tokens/s"), Column("Prefill", "of the original"),
        Column("Decode", "tokens/s"), Column("Decode", "of the original"),
        Column("Weights", "in memory"), Column("Cache", "a token"), Column("Peak", "growth of the process"),
    )  # fmt: skip
    rows = [Row(_cost(v, v is wrote.original), is_reference=v is wrote.original)
            for v in (wrote.original, *wrote.versions)]  # fmt: skip
    return Titled("What one text at a time takes", Table(columns, tuple(rows)))


def parting(base: Texts | None, mine: Texts | None) -> Cell:
    """The token at which half of the texts have left the original's."""
    if base is None or mine is None:
        return Cell(text.MISSING)
    where = gen.divergence(base, mine)
    beyond = f"> {int(where.position.max())}"
    middle, low, high = (beyond if at is None else str(at) for at in survival.median(where))
    return Cell(middle, f"[{low}, {high}]")


def _levels(texts: Texts) -> list[Cell]:
    levels = [_level(gen.level(metric, texts).scaled(factor), column.unit) for metric, column, factor in _SHIFTS]
    return [*levels, Cell(text.number(100 * gen.distinct(texts)))]


def _shifts(base: Texts, mine: Texts) -> list[Cell]:
    shifts = [_cell(gen.shift(metric, base, mine).scaled(factor), signed=True) for metric, _, factor in _SHIFTS]
    return [*shifts, Cell(text.number(100 * gen.distinct(mine)))]


def _cell(i: Interval, signed: bool = False) -> Cell:
    return Cell(*text.estimate(*i[:3], signed=signed))


def _level(i: Interval, unit: str) -> Cell:
    """A share lies within 0 and 100 %, whatever t says."""
    return _cell(i._replace(low=max(i.low, 0.0), high=min(i.high, 100.0)) if unit == "%" else i)


def _cost(v: Version, alone: bool) -> tuple[Cell, ...]:
    made = [r.candidate for r in v.costs.rounds]
    kernels = ", ".join(name for name in v.costs.kernels) or "dense"
    cells = [Cell(v.label), Cell(f"{kernels}, {v.costs.dtype}")]
    for what in ("prefill_rate", "decode_rate"):
        cells.append(Cell(text.number(_mean([getattr(c, what) for c in made]))))
        cells.append(Cell("1") if alone else Cell(*ratio(speed(v, what))))
    last = made[-1]
    cache = last.cache_bytes / (last.prompt_tokens + last.decode_tokens)
    # memory that earlier work gave back to the process, not to the system, is taken again without growth
    grown = text.size(v.costs.grown_bytes) if v.costs.grown_bytes >= v.costs.static_bytes else text.MISSING
    return (*cells, Cell(text.size(v.costs.static_bytes)), Cell(text.size(round(cache))), Cell(grown))


def _mean(rates: Sequence[float]) -> float:
    """The geometric one, as ratios are."""
    return math.exp(float(np.mean(np.log(rates))))
