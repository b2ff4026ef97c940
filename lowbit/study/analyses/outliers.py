"""Outliers of weights, inputs and cache, layer by layer: maps, a table by kind, and what is said of them elsewhere.

Needs ``[outliers]`` in the study file. The layers are the sample: an interval says how much layers of one model differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lowbit.errors import StudyError
from lowbit.evaluation.statistics import Interval, paired_mean
from lowbit.report import text
from lowbit.report.panel import Heat, Panel, Square, Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study import outliers
from lowbit.study.analyses.judged import RULE, Statement, claims, spelled
from lowbit.study.outliers import Tail, What
from lowbit.study.view import Model, View

_NAMES: Mapping[What, str] = {"W": "weights", "A": "inputs of linears", "K": "keys", "V": "values"}
_EVALUATING, _KIVI, _INT8 = "arXiv:2402.18158", "arXiv:2402.02750", "arXiv:2208.07339"
_VALUES = {"kurtosis": "kurtosis", "peak": "largest over median"}
_NEAR = 1.0  # how far from a Gaussian's 3 a kurtosis may be and still be called near
_WORST = 20


def panels(view: View) -> list[Panel]:
    """One a model whose cell is done. Raises StudyError for a study without such cells."""
    if all(model.grid.outliers is None for model in view.models):
        raise StudyError(
            "the analysis of outliers has nothing to read", where=f"study {view.name!r}",
            why="outliers are measured where the study file asks for them", fix="a table [outliers]",
        )  # fmt: skip
    found = []
    for i, model in enumerate(view.models):
        tails = _tails(model)
        if tails:
            found.append(panel(f"outliers-{i}", view.titled("Outliers", model), tails, _tokens(model)))
    return found


def _tails(model: Model) -> list[Tail]:
    folder = None if model.grid.outliers is None else model.folder(model.grid.outliers.cell)
    return [] if folder is None else outliers.read(folder)


def _tokens(model: Model) -> int:
    output = None if model.grid.outliers is None else model.output(model.grid.outliers.cell)
    return 0 if output is None else int(output["tokens"])


def panel(key: str, title: str, tails: Sequence[Tail], tokens: int) -> Panel:
    """Of one model's tails, measured on so many tokens."""
    kinds = _kinds(tails)
    ranked = sorted(tails, key=lambda t: -t.kurtosis)
    kurtosis, peak = (
        "Kurtosis: 3 is a Gaussian; the higher, the more of the range of a block is spent on few values.",
        "The largest magnitude of a channel over that of the median channel: what one scale for all channels wastes.",
    )
    layers = len({t.layer for t in tails})
    return Panel(
        key, title, _lead(tails, ranked[0], tokens), claims(list(_statements(tails))) if layers > 1 else (),
        (
            Titled("By kind, over all layers", _by_kind(tails, kinds)),
            Titled(f"The {min(_WORST, len(ranked))} with the heaviest tails", _worst(ranked), folded=True),
        ),
        (
            _map("kurtosis", "Kurtosis by layer and kind", kurtosis, tails, kinds),
            _map("peak", "Largest channel by layer and kind", peak, tails, kinds),
        ),
        (
            f"Over {tokens:,} tokens; every value of a tensor counts once, its channels are the inputs of a linear or "
            "the dimensions of the heads. Keys are those of the cache, behind the rotation of positions.",
            f"Intervals are over the {layers} layers of this one model (tokens are taken as given), so they speak of "
            "models like it only as far as its layers do. " + RULE,
            f"What {_EVALUATING} says of outliers is as others report it; its figures were not at hand.",
        ),
    )  # fmt: skip


def _lead(tails: Sequence[Tail], worst: Tail, tokens: int) -> tuple[str, ...]:
    medians = {w: [t.kurtosis for t in tails if t.what == w] for w in _NAMES}
    spread = ", ".join(f"{text.number(float(np.median(k)))} of {_NAMES[w]} ({len(k)})" for w, k in medians.items() if k)
    said = [
        f"Median kurtosis (tensors): {spread}; a Gaussian has 3.",
        f"The heaviest tail is that of the {_called(worst)}: kurtosis {text.number(worst.kurtosis)}, largest magnitude "
        f"{text.number(worst.absmax)}, which is {text.number(worst.absmax / worst.std) if worst.std else text.MISSING} "
        f"of its standard deviations (over {tokens:,} tokens).",
    ]
    inputs = [t for t in tails if t.what == "A"]
    far = sum(t.beyond * t.values for t in inputs)
    if far:
        held = sum((t.held or 0.0) * t.beyond * t.values for t in inputs) / far
        share = far / sum(t.values for t in inputs)
        said.append(
            f"{text.number(100 * share)} % of the values of inputs lie beyond six standard deviations; "
            f"{text.number(100 * held)} % of them in 1 % of the channels."
        )
    return tuple(said)


class _Ratio(NamedTuple):
    """The geometric mean of ratios, and what it is over."""

    log: Interval

    def __str__(self) -> str:
        e, low, high = np.exp(self.log[:3])
        value, ends = text.estimate(e, low, high)
        return f"{value} times {ends}, {self.log.n} pairs in {self.log.clusters} layers"


def _statements(tails: Sequence[Tail]) -> Iterator[Statement]:
    """What others say of outliers, each where there is something to compare."""
    tensor = {(t.what, t.layer, t.kind): t for t in tails if t.kurtosis > 0}
    linears = [(layer, kind) for what, layer, kind in tensor if what == "W" and ("A", layer, kind) in tensor]
    ratio = np.array([np.log(tensor["A", *s].kurtosis / tensor["W", *s].kurtosis) for s in linears])
    if (log := _over_layers(ratio, [layer for layer, _ in linears])) is not None:
        yield Statement(
            _EVALUATING,
            "Inputs of linears have heavier tails than their weights",
            "above",
            log,
            f"kurtosis of A over W: {_Ratio(log)}",
        )
    weights = [t for t in tails if t.what == "W"]
    off = _over_layers(np.array([t.kurtosis - 3 for t in weights]), [t.layer for t in weights])
    if off is not None:
        yield Statement(
            _EVALUATING,
            f"Weights are near Gaussian: mean kurtosis within {_NEAR:g} of 3",
            "within",
            off,
            f"kurtosis {spelled(_moved(off, 3.0))}, {off.n} linears in {off.clusters} layers",
            _NEAR,
        )
    down = _way_down(tails)
    if (log := _over_layers(np.array([r for _, r in down]), [layer for layer, _ in down])) is not None:
        yield Statement(
            _EVALUATING,
            "The way down of the feed-forward has inputs of heavier tails than other linears",
            "above",
            log,
            f"its kurtosis over the geometric mean of the layer's others: {_Ratio(log)}",
        )
    keys, values = ({t.layer: t for t in tails if t.what == w} for w in "KV")
    for field, name, source in (("kurtosis", "tails", _EVALUATING), ("peak", "channels that stand out", _KIVI)):
        sizes = {layer: (getattr(k, field), getattr(values[layer], field)) for layer, k in keys.items()}
        pairs = {layer: k / v for layer, (k, v) in sizes.items() if k > 0 and v > 0}
        log = _over_layers(np.log(list(pairs.values())), list(pairs))
        if log is not None:
            yield Statement(
                source,
                f"Keys have more outliers than values: {name}",
                "above",
                log,
                f"{field} of K over V: {_Ratio(log)}",
            )
    held = [t for t in tails if t.what == "A" and t.held is not None]
    half = _over_layers(np.array([(t.held or 0.0) - 0.5 for t in held]), [t.layer for t in held])
    if half is not None:
        share = _moved(half, 0.5).scaled(100.0)
        yield Statement(
            _INT8,
            "Few channels hold the outliers of inputs: 1 % of them more than half",
            "above",
            half,
            f"mean share {spelled(share, '%')}, {half.n} inputs that have any, {half.clusters} layers",
        )


def _way_down(tails: Sequence[Tail]) -> list[tuple[int, float]]:
    """Of each layer with one widest input: log of its kurtosis less the mean log of the layer's other inputs."""
    found = []
    for layer in sorted({t.layer for t in tails}):
        inputs = [t for t in tails if t.what == "A" and t.layer == layer and t.kurtosis > 0]
        widest = max((t.channels for t in inputs), default=0)
        wide = [np.log(t.kurtosis) for t in inputs if t.channels == widest]
        others = [np.log(t.kurtosis) for t in inputs if t.channels < widest]
        if wide and others:
            found.append((layer, float(np.mean(wide) - np.mean(others))))
    return found


def _over_layers(values: Float[np.ndarray, " n"], layers: Sequence[int]) -> Interval | None:
    return paired_mean(values, np.array(layers)) if len(set(layers)) > 1 else None


def _moved(interval: Interval, by: float) -> Interval:
    e, low, high = (x + by for x in interval[:3])
    return interval._replace(estimate=e, low=low, high=high)


def _kinds(tails: Sequence[Tail]) -> dict[tuple[What, str], str]:
    """What tables call a tensor and kind: experts together, the last part of a name where that is enough."""
    kinds = {t.kind: re.sub(r"\.\d+(?=\.|$)", ".*", t.kind) for t in tails}
    last = {whole: whole.rpartition(".")[2] for whole in kinds.values()}
    unique = {w: short if list(last.values()).count(short) == 1 else w for w, short in last.items()}
    return {(t.what, t.kind): t.what if t.what in "KV" else f"{t.what} {unique[kinds[t.kind]]}" for t in tails}


def _grouped(tails: Sequence[Tail], kinds: Mapping[tuple[What, str], str]) -> dict[str, list[Tail]]:
    found: dict[str, list[Tail]] = {}
    for t in tails:
        found.setdefault(kinds[t.what, t.kind], []).append(t)
    return found


def _map(key: str, title: str, caption: str, tails: Sequence[Tail], kinds: Mapping[tuple[What, str], str]) -> Heat:
    """Of experts the largest."""
    squares = []
    for name, group in _grouped(tails, kinds).items():
        for layer in dict.fromkeys(t.layer for t in group):
            value = max(getattr(t, key) for t in group if t.layer == layer)
            squares.append(Square(name, str(layer), value, text.number(value)))
    return Heat(key, title, caption, "tensor and kind", "layer", _VALUES[key], tuple(squares),
                log=True)  # fmt: skip


def _by_kind(tails: Sequence[Tail], kinds: Mapping[tuple[What, str], str]) -> Table:
    columns = (
        Column("Tensor", numeric=False), Column("Kurtosis", "median"), Column("Kurtosis", "largest, layer"),
        Column("AbsMax", "largest, layer"), Column("Std", "median"), Column("Beyond 6 σ", "%"),
        Column("In 1 % of channels", "% of those"), Column("Largest channel", "over median, largest, layer"),
    )  # fmt: skip
    rows = []
    for name, group in _grouped(tails, kinds).items():
        far = sum(t.beyond * t.values for t in group)
        held = 100 * sum((t.held or 0.0) * t.beyond * t.values for t in group) / far if far else None
        rows.append(Row((
            Cell(name), Cell(text.number(float(np.median([t.kurtosis for t in group])))), _largest(group, "kurtosis"),
            _largest(group, "absmax"), Cell(text.number(float(np.median([t.std for t in group])))),
            Cell(text.number(100 * far / sum(t.values for t in group))), Cell(text.number(held)),
            _largest(group, "peak"),
        )))  # fmt: skip
    return Table(columns, tuple(rows))


def _largest(group: Sequence[Tail], field: str) -> Cell:
    most = max(group, key=lambda t: float(getattr(t, field)))
    return Cell(text.number(getattr(most, field)), f"layer {most.layer}")


def _worst(ranked: Sequence[Tail]) -> Table:
    columns = (
        Column("Tensor", numeric=False), Column("Kurtosis"), Column("AbsMax"), Column("Std"), Column("Beyond 6 σ", "%"),
        Column("Largest channel", "over median"),
    )  # fmt: skip
    shown = [
        Row(tuple(map(Cell, (
            _called(t), *map(text.number, (t.kurtosis, t.absmax, t.std, 100 * t.beyond, t.peak)),
        ))))
        for t in ranked[:_WORST]
    ]  # fmt: skip
    return Table(columns, tuple(shown))


def _called(t: Tail) -> str:
    """``inputs of mlp.down_proj, layer 3``."""
    names: Mapping[What, str] = {"W": f"weights of {t.kind}", "A": f"inputs of {t.kind}", "K": "keys", "V": "values"}
    return f"{names[t.what]}, layer {t.layer}"
