"""Long contexts: whether what stands far back is still found, by length and depth, in fewer bits.

The tasks are those that are made at several lengths (``lines``, ``pairs``, ``needle``). Accuracy has a floor where the
original itself fails, so the likelihood of the right answer stands beside it. After the long-context part of
arXiv:2402.18158, where loss grows with length and sooner for a low-bit cache than for low-bit weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lowbit.evaluation.hypotheses import Hypothesis, Measured, judge
from lowbit.evaluation.statistics import Interval, paired_mean
from lowbit.report import text
from lowbit.report.panel import Claim, Curves, Heat, Mark, Panel, Square, Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses.judged import spelled
from lowbit.study.view import Model, Pair, View

SOURCE = "arXiv:2402.18158"


class Found(NamedTuple):
    """All made items of one candidate, over the tasks; changes are candidate less reference."""

    label: str
    length: Int[np.ndarray, " n"]
    depth: Float[np.ndarray, " n"]
    cluster: Int[np.ndarray, " n"]
    before: Float[np.ndarray, " n"]
    after: Float[np.ndarray, " n"]
    """1 where the greedy continuation is the answer."""
    nll: Float[np.ndarray, " n"]
    """Change of -log p(answer), in nats."""

    @property
    def lengths(self) -> list[int]:
        return sorted({int(n) for n in self.length})

    def at(self, length: int) -> Bool[np.ndarray, " n"]:
        chosen: Bool[np.ndarray, " n"] = self.length == length
        return chosen


def panels(view: View) -> list[Panel]:
    """A panel for each model whose candidates have answered a made task."""
    made = ((number, model, list(_found(model))) for number, model in enumerate(view.models))
    return [
        panel(f"long-{number}", view.titled("Long contexts", model), found) for number, model, found in made if found
    ]


def growth(found: Found) -> Interval | None:
    """Change of -log p(answer) at the longest length less that at the shortest; None where there is one length only.

    Clusters (seeds of a task) hold all lengths, so that each gives one difference.
    """
    short, long = found.lengths[0], found.lengths[-1]
    if short == long:
        return None
    differences = []
    for cluster in np.unique(found.cluster):
        mine = found.cluster == cluster
        a, b = found.nll[mine & found.at(short)], found.nll[mine & found.at(long)]
        if len(a) and len(b):
            differences.append(float(b.mean() - a.mean()))
    if len(differences) < 2:
        return None
    return paired_mean(np.array(differences), np.arange(len(differences)))


def _found(model: Model) -> Iterator[Found]:
    by_label: dict[str, list[Pair]] = {}
    for pair in model.pairs():
        if pair.task.task.family == "long" and pair.task.task.make is not None:
            by_label.setdefault(pair.label, []).append(pair)
    for label, pairs in by_label.items():
        places = [str(group).split("/") for pair in pairs for group in pair.reference.group]
        clusters = [pair.reference.cluster.astype(np.int64) + 1000 * i for i, pair in enumerate(pairs)]
        yield Found(
            label, np.array([int(length) for length, _ in places]), np.array([float(depth) for _, depth in places]),
            np.concatenate(clusters),
            np.concatenate([pair.reference.score for pair in pairs]).astype(np.float64),
            np.concatenate([pair.candidate.score for pair in pairs]).astype(np.float64),
            np.concatenate([pair.reference.logprob - pair.candidate.logprob for pair in pairs]).astype(np.float64),
        )  # fmt: skip


def panel(key: str, title: str, found: Sequence[Found]) -> Panel:
    """What the versions of one model found and lost; all have answered the same items."""
    lengths = sorted({n for f in found for n in f.lengths})
    return Panel(
        key, title, tuple(_sentence(f) for f in found), _claims(found),
        (Titled("By length", _table(found, lengths)),),
        (_accuracy(found, lengths), _change(found, lengths), *(_map(i, f) for i, f in enumerate(found))),
        (
            f"{len(found[0].length):,} made items a version in {len(np.unique(found[0].cluster))} clusters (seeds of a "
            "task, over all lengths and depths). Versions that round keys and values are scored through their cache.",
            "Where the original does not find the answer, accuracy cannot fall: read the change of -log p(answer).",
        ),
    )  # fmt: skip


def _sentence(f: Found) -> str:
    longest = f.lengths[-1]
    at = f.at(longest)
    change = spelled(paired_mean(f.after[at] - f.before[at], f.cluster[at]).scaled(100.0), signed=True)
    nll = spelled(paired_mean(f.nll[at], f.cluster[at]), signed=True)
    return (
        f"{f.label}: at {longest} tokens {_percent(f.before[at].mean())} of answers found become "
        f"{_percent(f.after[at].mean())} ({change} pp); -log p(answer) {nll} nat."
    )


def _claims(found: Sequence[Found]) -> tuple[Claim, ...]:
    """For each version: does its loss grow with length? Adjusted together."""
    measured = [
        Measured(Hypothesis(f.label, f"{f.label}: the loss grows with the length of the context", "above"), grown)
        for f in found
        if (grown := growth(f)) is not None
    ]
    return tuple(
        Claim(
            SOURCE, j.hypothesis.claim,
            f"{spelled(j.interval, signed=True)} nat from {found[0].lengths[0]} to {found[0].lengths[-1]} tokens, "
            f"{j.interval.n} clusters, p {text.p_value(j.p_for)} (Holm)", j.verdict,
        )
        for j in judge(measured)
    )  # fmt: skip


def _table(found: Sequence[Found], lengths: Sequence[int]) -> Table:
    columns = (
        Column("Version", numeric=False), Column("Length", "tokens"), Column("Items"), Column("Original", "% found"),
        Column("Version", "% found"), Column("Δ", "pp, 95 % CI"), Column("Δ -log p(answer)", "nat, 95 % CI"),
    )  # fmt: skip
    rows = []
    for f in found:
        for length in lengths:
            at = f.at(length)
            if len(np.unique(f.cluster[at])) < 2:
                continue
            change, nll = paired_mean(f.after[at] - f.before[at], f.cluster[at]), paired_mean(f.nll[at], f.cluster[at])
            rows.append(
                Row((
                    Cell(f.label), Cell(f"{length}"), Cell(f"{int(at.sum())}"), Cell(_percent(f.before[at].mean())),
                    Cell(_percent(f.after[at].mean())), _cell(change, 100.0), _cell(nll),
                ))
            )  # fmt: skip
    return Table(columns, tuple(rows))


def _accuracy(found: Sequence[Found], lengths: Sequence[int]) -> Curves:
    marks = [
        Mark("original", float(length), *_three(paired_mean(found[0].before[at], found[0].cluster[at]), 100.0))
        for length in lengths
        if (at := found[0].at(length)).any()
    ]
    marks += [
        Mark(f.label, float(length), *_three(paired_mean(f.after[at], f.cluster[at]), 100.0))
        for f in found
        for length in lengths
        if (at := f.at(length)).any()
    ]
    caption = "Mean over depths and tasks; bars are 95 % intervals of each level, differences are sharper (the table)."
    return Curves("found", "Answers found by length", caption, "Tokens", "Found (%)", tuple(marks), log_x=True)


def _change(found: Sequence[Found], lengths: Sequence[int]) -> Curves:
    marks = tuple(
        Mark(f.label, float(length), *_three(paired_mean(f.nll[at], f.cluster[at]), 1.0))
        for f in found
        for length in lengths
        if (at := f.at(length)).any()
    )
    caption = "Change of -log p(right answer), paired item by item; bars are 95 % intervals."
    return Curves(
        "change", "Loss of the answer's likelihood by length", caption, "Tokens", "Δ -log p (nat)", marks, log_x=True,
        levels=(("original", 0.0),),
    )  # fmt: skip


def _map(number: int, f: Found) -> Heat:
    squares = []
    for depth in sorted(set(f.depth.tolist())):
        for length in f.lengths:
            at = f.at(length) & (f.depth == depth)
            if at.any():
                mean = float(f.nll[at].mean())
                found = f"{text.number(mean, signed=True)} nat, {int(at.sum())} items"
                squares.append(Square(f"{length}", f"{depth:g}", mean, found))
    caption = "Orange: the answer is less likely than to the original. Depth 0 is the beginning of the context."
    return Heat(
        f"map-{number}", f"{f.label}: by length and depth", caption, "Tokens", "Depth", "Δ -log p", tuple(squares),
        diverging=True,
    )  # fmt: skip


def _three(i: Interval, factor: float) -> tuple[float, float, float]:
    return factor * i.estimate, factor * i.low, factor * i.high


def _cell(i: Interval, factor: float = 1.0) -> Cell:
    return Cell(*text.estimate(*_three(i, factor), signed=True))


def _percent(share: float) -> str:
    return f"{100 * float(share):.0f} %"
