"""Where the loss is: by block, by position in the window, and by how sure the original was; from token evidence.

KL is that of the next-token distributions. How sure the original was is its margin, the probability of its first
choice less that of its second; tokens are ranked by it and cut into fifths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lowbit.evaluation.metrics import agreement, kl
from lowbit.evaluation.metrics.base import Tokens, quantile_group
from lowbit.evaluation.statistics import Interval, cluster_ratio, paired_mean
from lowbit.report import text
from lowbit.report.model import Candidate
from lowbit.report.panel import Curves, Heat, Mark, Panel, Square, Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses.judged import RULE, Statement, claims, spelled
from lowbit.study.view import Model, View

FIFTHS = 5
_SHOWN = 6  # candidates with a map and claims of their own
_CONFIDENCE, _DISAGREEMENT, _EVALUATING = "arXiv:2405.00632", "arXiv:2204.04220", "arXiv:2402.18158"


class Fifth(NamedTuple):
    """A fifth of the tokens, by the original's margin."""

    low: float
    high: float
    """The smallest and the largest margin in it."""
    kl: Interval
    share: Interval
    """Of the whole KL that falls into it."""
    changed: Interval
    """Share of its first choices that are not the original's."""


class Place(NamedTuple):
    """One candidate that differs from the original."""

    candidate: Candidate
    tokens: Tokens
    fifths: tuple[Fifth, ...]
    """From the least sure to the surest."""
    late: Interval | None
    """Mean KL in the later half of each window less that in its first half; None for fewer than two windows."""
    flips: Interval | None
    """Share of the changed choices that fall into the least sure fifth; None for too few."""


def panels(view: View) -> list[Panel]:
    """One a model with a scored candidate that is not the original bit for bit."""
    found = []
    for i, model in enumerate(view.models):
        places = list(_places(model))
        if places:
            found.append(panel(f"where-{i}", view.titled("Where the loss is", model), places, model.report.noise_floor))
    return found


def _places(model: Model) -> Iterator[Place]:
    for entry, candidate in model.candidates():
        tokens = model.tokens(entry.score)
        found = None if tokens is None else place_of(candidate, tokens)
        if found is not None:
            yield found


def place_of(candidate: Candidate, tokens: Tokens) -> Place | None:
    """None for a version that loses nothing, and where a fifth lies within one cluster."""
    if not tokens.kl.any() or len(np.unique(tokens.cluster)) < 2:
        return None
    found = tuple(fifths(tokens))
    flips = agreement.flips_in_lowest_margin(tokens, FIFTHS)
    return Place(candidate, tokens, found, later_half(tokens), flips) if len(found) == FIFTHS else None


def fifths(tokens: Tokens) -> Iterator[Fifth]:
    """Those that two clusters reach; the KL of the evidence is not 0 everywhere. O(n log n)."""
    margin, cluster, loss = tokens.margin_ref, tokens.cluster, tokens.kl.astype(np.float64)
    group = quantile_group(margin.astype(np.float64), FIFTHS)
    flipped = (tokens.top1 != tokens.top1_ref).astype(np.float64)
    for k in range(FIFTHS):
        rows = group == k
        if len(np.unique(cluster[rows])) >= 2:
            yield Fifth(
                float(margin[rows].min()), float(margin[rows].max()), _within(paired_mean(loss[rows], cluster[rows])),
                _within(cluster_ratio(loss * rows, loss, cluster), 1.0),
                _within(paired_mean(flipped[rows], cluster[rows]), 1.0),
            )  # fmt: skip


def later_half(tokens: Tokens) -> Interval | None:
    """Paired by cluster, each counted alike. None where fewer than two clusters have both halves."""
    middle = (int(tokens.pos.min()) + int(tokens.pos.max()) + 1) / 2
    late, member = tokens.pos >= middle, np.unique(tokens.cluster, return_inverse=True)[1]
    n, total = (_by_half(member, late, w) for w in (np.ones(len(tokens)), tokens.kl.astype(np.float64)))
    both = (n > 0).all(0)
    if both.sum() < 2:
        return None
    first, second = total[:, both] / n[:, both]
    return paired_mean(second - first, np.arange(int(both.sum())))._replace(n=len(tokens))


def _by_half(
    member: Int[np.ndarray, " n"], late: Bool[np.ndarray, " n"], weight: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "2 clusters"]:
    """Sums by cluster: over its first half, over its later half."""
    size = int(member.max()) + 1
    return np.stack([np.bincount(member[rows], weight[rows], size) for rows in (~late, late)])


def _within(interval: Interval, most: float = np.inf) -> Interval:
    return interval._replace(low=max(interval.low, 0.0), high=min(interval.high, most))


def panel(key: str, title: str, places: Sequence[Place], floor: float | None = None) -> Panel:
    """Of the versions of one model, at least one; ``floor`` is the KL of the noise floor."""
    shown = places[:_SHOWN]
    first = places[0].tokens
    clusters, length = len(np.unique(first.cluster)), int(first.pos.max()) + 1
    notes = [
        f"{len(first):,} tokens in {clusters} clusters, windows of {length}; intervals are clustered. {RULE}",
    ]
    if any(p.candidate.kl_by_block for p in places):
        notes.append("A block alone can cost more or less than it does among others that are low-bit too.")
    if len(places) > _SHOWN:
        notes.append(f"Maps and claims are of the first {_SHOWN} versions of {len(places)}, in the study's order.")
    return Panel(
        key, title, tuple(_lead(places)), claims(list(_statements(shown))),
        (
            Titled("In one line a version", _summary(places)),
            Titled("By how sure the original was", _by_fifth(places), folded=len(places) > 2),
        ),
        (
            _curves(places, floor), _changed(places), *_blocks(places),
            *(_map(f"map-{i}", place) for i, place in enumerate(shown)),
        ),
        tuple(notes),
    )  # fmt: skip


def _lead(places: Sequence[Place]) -> Iterator[str]:
    worst = max(places, key=lambda p: float(p.tokens.kl.mean()))
    label = worst.candidate.label
    yield (
        f"The fifth of the tokens of which the original was least sure holds "
        f"{spelled(worst.fifths[0].share.scaled(100.0), '%')} of the KL of {label}, which has most of all; "
        f"the surest fifth {spelled(worst.fifths[-1].share.scaled(100.0), '%')}."
    )
    if worst.flips is not None:
        share = spelled(worst.flips.scaled(100.0), "%")
        yield f"Of the choices that {label} changes, {share} are in the least sure fifth."
    if len(places) > 1:
        low, high = (100 * f(p.fifths[0].share.estimate for p in places) for f in (min, max))
        yield f"Over all {len(places)} versions the least sure fifth holds {text.number(low)} to {text.number(high)} %."
    for place in places:
        if len(place.candidate.kl_by_block) > 1:
            most, then, *_ = sorted(place.candidate.kl_by_block, key=lambda b: -b.value)
            apart = "apart from" if most.low > then.high else "not apart from"
            yield (
                f"{place.candidate.label}: block {most.block} alone costs most, "
                f"{' '.join(text.estimate(most.value, most.low, most.high))} nat, {apart} block {then.block} by their "
                "intervals."
            )


def _statements(places: Sequence[Place]) -> Iterator[Statement]:
    for place in places:
        label, n = place.candidate.label, f"n {len(place.tokens):,}"
        share = place.fifths[0].share
        yield Statement(
            _CONFIDENCE, f"{label}: the loss falls where the original was unsure, more than a fifth of it in the least "
            "sure fifth", "above", _less(share, 1 / FIFTHS), f"{spelled(share.scaled(100.0), '%')}, {n}",
        )  # fmt: skip
        if place.flips is not None:
            yield Statement(
                _DISAGREEMENT, f"{label}: choices change where the first and the second were close, more often in the "
                "least sure fifth than elsewhere", "above", _less(place.flips, 1 / FIFTHS),
                f"{spelled(place.flips.scaled(100.0), '%')} of the changed choices, {place.flips.n:,} tokens",
            )  # fmt: skip
        if place.late is not None:
            yield Statement(
                _EVALUATING, f"{label}: more context, more loss: later halves of windows lose more", "above",
                place.late, f"{spelled(place.late, 'nat', signed=True)}, {n}",
            )  # fmt: skip


def _less(interval: Interval, by: float) -> Interval:
    e, low, high = (x - by for x in interval[:3])
    return interval._replace(estimate=e, low=low, high=high)


def _summary(places: Sequence[Place]) -> Table:
    columns = (
        Column("Version", numeric=False), Column("KL", "nat"), Column("In the least sure fifth", "% of KL"),
        Column("In the surest fifth", "% of KL"), Column("Changed choices", "%"),
        Column("Of them in the least sure fifth", "%"), Column("Later less first half", "nat"),
    )  # fmt: skip
    rows = [
        Row((
            Cell(p.candidate.label), _cell(kl.mean(p.tokens)), _cell(p.fifths[0].share, 100.0),
            _cell(p.fifths[-1].share, 100.0), _changed_share(p.tokens), _cell(p.flips, 100.0),
            _cell(p.late, signed=True),
        ))
        for p in places
    ]  # fmt: skip
    return Table(columns, tuple(rows))


def _changed_share(tokens: Tokens) -> Cell:
    return Cell(text.number(100 * float(np.mean(tokens.top1 != tokens.top1_ref))))


def _by_fifth(places: Sequence[Place]) -> Table:
    columns = (
        Column("Version", numeric=False), Column("Margin of the original", numeric=False), Column("KL", "nat"),
        Column("Of all KL", "%"), Column("Choices changed", "%"),
    )  # fmt: skip
    rows = [
        Row((Cell(p.candidate.label), Cell(f"{f.low:.3f} to {f.high:.3f}"), _cell(f.kl), _cell(f.share, 100.0),
             _cell(f.changed, 100.0)))
        for p in places for f in p.fifths
    ]  # fmt: skip
    return Table(columns, tuple(rows))


def _cell(interval: Interval | None, factor: float = 1.0, *, signed: bool = False) -> Cell:
    if interval is None:
        return Cell(text.MISSING)
    return Cell(*text.estimate(*interval.scaled(factor)[:3], signed=signed))


def _curves(places: Sequence[Place], floor: float | None) -> Curves:
    marks = [
        Mark(p.candidate.label, float(k), *f.kl[:3], f"margin {f.low:.3f} to {f.high:.3f}")
        for p in places
        for k, f in enumerate(p.fifths, 1)
    ]
    return Curves(
        "fifths", "KL by how sure the original was",
        "Tokens in fifths by the original's margin, 1 the least sure. Bars are 95 % intervals.",
        "fifth of the tokens", "KL (nat)", tuple(marks), log_y=True,
        levels=(("noise floor", floor),) if floor else (),
    )  # fmt: skip


def _changed(places: Sequence[Place]) -> Curves:
    marks = [
        Mark(p.candidate.label, float(k), *f.changed.scaled(100.0)[:3], f"margin {f.low:.3f} to {f.high:.3f}")
        for p in places
        for k, f in enumerate(p.fifths, 1)
    ]
    return Curves(
        "changed", "Changed choices by how sure the original was",
        "Share of the first choices that are not the original's, by the same fifths. Bars are 95 % intervals.",
        "fifth of the tokens", "changed (%)", tuple(marks),
    )  # fmt: skip


def _blocks(places: Sequence[Place]) -> Iterator[Heat]:
    squares = tuple(
        Square(str(b.block), p.candidate.label, b.value, f"{' '.join(text.estimate(b.value, b.low, b.high))} nat")
        for p in places
        for b in p.candidate.kl_by_block
    )
    if squares:
        caption = "Only this block is low-bit; 0 is next to the embedding."
        yield Heat("blocks", "KL of each block alone", caption, "block", "version", "KL", squares, log=True)


def _map(key: str, place: Place) -> Heat:
    """Mean KL by position, in powers of two, and fifth; squares that two clusters reach."""
    tokens = place.tokens
    group = quantile_group(tokens.margin_ref.astype(np.float64), FIFTHS)
    edges = [0, *(2**k for k in range(3, int(tokens.pos.max()).bit_length() + 1))]
    squares = []
    for low, high in pairwise(edges):
        for k in range(FIFTHS):
            rows = (tokens.pos >= low) & (tokens.pos < high) & (group == k)
            if len(np.unique(tokens.cluster[rows])) >= 2:
                found = _within(paired_mean(tokens.kl[rows].astype(np.float64), tokens.cluster[rows]))
                name = f"{k + 1}{' (least sure)' if k == 0 else ' (surest)' if k == FIFTHS - 1 else ''}"
                last = min(high - 1, int(tokens.pos.max()))
                squares.append(Square(f"{low}–{last}", name, found.estimate, f"{spelled(found, 'nat')}, n {found.n:,}"))
    return Heat(
        key, f"KL by position and confidence: {place.candidate.label}",
        "Mean over the tokens of a band of positions and a fifth by the original's margin.",
        "position in the window", "fifth of the tokens", "KL", tuple(squares), log=True,
    )  # fmt: skip
