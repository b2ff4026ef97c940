"""The best precision for a budget of bytes, over a family of models (arXiv:2212.09720).

Loss is set against everything stored. A precision's curve runs through the family, log-linear in bytes between its
models, so that precisions are compared at equal bytes; every comparison is paired token by token.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from lowbit.evaluation.statistics import Interval
from lowbit.report import text
from lowbit.report.panel import Curves, Heat, Mark, Panel, Square, Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study import laws
from lowbit.study.contrasts import Base, base_of, claims, nats, plain
from lowbit.study.family import SIXTEEN, Count, Family, of_view
from lowbit.study.laws import Best, Point
from lowbit.study.view import View

RUINED = 0.5  # nats above 4 bits from which a line is not drawn
BUDGETS = 10  # sizes of the envelope table, evenly spaced in log bytes


def panels(view: View) -> list[Panel]:
    """One panel over all models; none for a single model, or before two precisions are scored."""
    family = of_view(view)
    return [] if family is None else of_family(family)


def of_family(family: Family) -> list[Panel]:
    """Versions whose weights alone are low-bit; none where no two precisions overlap in size."""
    family = family.where([i for i, v in enumerate(family.versions) if v.form.kind == "W" or v.label == SIXTEEN])
    points, budgets = family.points(), _budgets(family, "total")
    if len(family.models) < 2 or not budgets:
        return []
    best = laws.envelope(points, budgets, losses=family.losses)
    bits = {v.label: v.form.weights for v in family.versions}
    base = base_of(family)
    drawn = base._replace(widths={k: label for k, label in base.widths.items() if not _ruined(family, base, label)})
    lead = [
        f"{len(points)} versions of {len(family.models)} models, scored on {family.span}.",
        *_winners(best, bits),
    ]
    return [
        Panel(
            "laws", "The best precision for a budget", tuple(lead), tuple(claims(family, base)),
            (_envelope(best, bits, "total"), *_linears(family, bits), _all(family)),
            (_curves(family, drawn), *_regret(family, drawn), _map(family)), _notes(family, base, drawn),
        )
    ]  # fmt: skip


def _budgets(family: Family, count: Count) -> list[int]:
    """Sizes that two curves span, evenly spaced in log bytes."""
    points = family.points(count)
    spans = [
        (min(sizes), max(sizes))
        for label in dict.fromkeys(p.precision for p in points)
        if len(sizes := [p.nbytes for p in points if p.precision == label]) > 1
    ]
    if len(spans) < 2:
        return []
    low, high = sorted(s[0] for s in spans)[1], sorted(s[1] for s in spans)[-2]
    return [round(x) for x in np.geomspace(low, high, BUDGETS)] if low < high else []


def _winners(best: Sequence[Best], bits: dict[str, float]) -> Iterable[str]:
    """What is best where, in sentences: one a width, with the chances that it has there."""
    widths = [bits[b.precision] for b in best]
    for width, run in itertools.groupby(range(len(best)), key=lambda i: widths[i]):
        mine = list(run)
        chances = [_chance(best[i], bits)[width] for i in mine]
        sizes = " to ".join(dict.fromkeys(text.size(best[i].nbytes) for i in (mine[0], mine[-1])))
        names = ", ".join(dict.fromkeys(best[i].precision for i in mine))
        spelled = " to ".join(dict.fromkeys(f"{100 * c:.0f} %" for c in (min(chances), max(chances))))
        yield f"At {sizes} stored, {width:g} bits do best ({names}); chance that the width is the best one: {spelled}."


def _chance(one: Best, bits: dict[str, float]) -> dict[float, float]:
    """By width: that the best precision has it."""
    found: dict[float, float] = defaultdict(float)
    for precision, chance in one.chances:
        found[bits[precision]] += chance
    return found


def _envelope(best: Sequence[Best], bits: dict[str, float], count: Count) -> Titled:
    """The best precision at each budget."""
    what = "Best precision for a budget" + (" of bytes in linears alone" if count == "linears" else "")
    columns = (Column("Budget"), Column("Best", numeric=False), Column("Loss", "nats a token, 95 %"),
               Column("Chance", "of being best"), Column("Chance of its width"),
               Column("Others above 5 %", numeric=False))  # fmt: skip
    rows = [
        Row((
            Cell(text.size(b.nbytes)), Cell(b.precision, f"{bits[b.precision]:g} bits"),
            Cell(*text.estimate(b.loss, b.low, b.high)), Cell(f"{100 * b.chance:.0f} %"),
            Cell(f"{100 * _chance(b, bits)[bits[b.precision]]:.0f} %"), Cell(", ".join(b.rivals) or text.MISSING),
        ))
        for b in best
    ]  # fmt: skip
    return Titled(what, Table(columns, tuple(rows)), folded=count == "linears")


def _linears(family: Family, bits: dict[str, float]) -> Iterable[Titled]:
    """The envelope over the linears' bytes."""
    if budgets := _budgets(family, "linears"):
        yield _envelope(laws.envelope(family.points("linears"), budgets, losses=family.losses), bits, "linears")


def _all(family: Family) -> Titled:
    columns = (Column("Model", numeric=False), Column("Version", numeric=False), Column("Stored"), Column("Linears"),
               Column("Loss", "nats a token, 95 %"), Column("Change from 16 bit", "nats, paired, 95 %"))  # fmt: skip
    rows = []
    for i, v in enumerate(family.versions):
        loss = family.loss(i)
        change = Cell(text.MISSING) if v.label == SIXTEEN else Cell(*_signed(family.change(i)))
        cells = Cell(v.model), Cell(v.label), Cell(text.size(v.total)), Cell(text.size(v.linears))
        rows.append(Row((*cells, Cell(*text.estimate(*loss[:3])), change), is_reference=v.label == SIXTEEN))
    return Titled("All versions", Table(columns, tuple(rows)), folded=True)


def _signed(i: Interval) -> tuple[str, str]:
    return text.estimate(i.estimate, i.low, i.high, signed=True)


def _curves(family: Family, base: Base) -> Curves:
    marks = []
    for width, label in base.widths.items():
        for i, v in enumerate(family.versions):
            if v.label == label:
                loss = family.loss(i)
                marks.append(Mark(f"{width:g} bits", 8 * v.total / 1e6, *loss[:3], f"{v.model}, {label}"))
    return Curves(
        "bits", "Loss against all stored bits",
        f"{base.name} and its other widths, a line a width, a mark a model. Intervals are those of each loss by "
        "itself; most of their width is the text's, which all versions share.",
        "megabits stored", "nats a token", tuple(marks), log_x=True,
    )  # fmt: skip


def _regret(family: Family, base: Base) -> Iterable[Curves]:
    """Every width beside 4 bits at equal bytes."""
    if 4 not in base.widths:
        return
    points, marks = family.points(), []
    for width, label in base.widths.items():
        for size in [] if width == 4 else _sizes(points, base.widths[4], label):
            one, four = laws.at(points, label, size), laws.at(points, base.widths[4], size)
            if one is not None and four is not None:
                gap = family.losses.weighted(one - four)
                marks.append(Mark(f"{width:g} bits", 8 * size / 1e6, *gap[:3], text.size(size)))
    if marks:
        yield Curves(
            "regret", "What a width costs beside 4 bits at equal bytes",
            "Loss less that of 4 bits at the same size, paired token by token; above 0, 4 bits are better. Between "
            "models a width's loss is taken to be linear in log bytes.",
            "megabits stored", "nats a token", tuple(marks), log_x=True, levels=(("4 bits", 0.0),),
        )  # fmt: skip


def _sizes(points: Sequence[Point], one: str, other: str) -> list[int]:
    """Sizes of either curve's models that both span."""
    mine = [[p.nbytes for p in points if p.precision == name] for name in (one, other)]
    low, high = max(map(min, mine)), min(map(max, mine))
    return sorted({size for sizes in mine for size in sizes if low <= size <= high})


def _map(family: Family) -> Heat:
    """Mean change over the models, by format and width."""
    squares, order = [], sorted({v.form.weights for v in plain(family)})
    named = sorted({(v.form.type, v.form.block, v.form.weights): v.label for v in plain(family)}.items())
    for width in order:
        for (kind, block, bits), label in named:
            if bits != width:
                continue
            rows = [i for i, v in enumerate(family.versions) if v.label == label]
            models = {family.versions[i].model for i in rows}
            originals = [i for i, v in enumerate(family.versions) if v.label == SIXTEEN and v.model in models]
            change = family.losses.weighted(family.weights(plus=rows, minus=originals))
            squares.append(Square(f"{width:g}", f"{kind} {block}", change.estimate, f"{nats(change)} nats"))
    return Heat(
        "formats", "What each format costs", "Mean over the models of the loss added to 16 bit, on a log scale; "
        "formats that add nothing are left blank.", "bits", "type and block", "nats added", tuple(squares), log=True,
    )  # fmt: skip


def _ruined(family: Family, base: Base, label: str) -> bool:
    """Whether a width would press all others into the foot of a figure."""
    gap = laws.equal_bytes(family.points(), label, base.widths.get(4, SIXTEEN), family.losses)
    return gap is not None and gap.estimate > RUINED


def _notes(family: Family, base: Base, drawn: Base) -> tuple[str, ...]:
    left = [f"{k:g}" for k in base.widths if k not in drawn.widths]
    out = (f"Lines of {' and '.join(left)} bits are left out: over {RUINED:g} nats above the others.",) if left else ()
    shares = []
    for name in family.models:
        v = next(v for v in family.versions if v.model == name and v.label == SIXTEEN)
        shares.append(f"{name} {100 * (1 - v.linears / v.total):.0f} %")
    return (
        "Bytes are everything stored, embeddings and norms included, the original counted in 16 bit. What is not in "
        f"the blocks' linears stays in 16 bit and is this share of the originals: {', '.join(shares)}. Verdicts are "
        "over all bytes; where counting the linears alone gives another one, the claim says so.",
        "Chances come from drawing the text's clusters anew, 4000 times: they are about this family on other text of "
        "this kind, not about a family trained again.",
        "Claims hold only if each of their differences does, so each is as good as its worst one; verdicts at 5 %, "
        "adjusted over the claims (Holm), and against a claim also by the number of its differences.",
        *out,
    )
