"""At equal bytes, a larger model in fewer bits or a smaller one in more (arXiv:2405.03146).

Two answers. *Read off the curve*: the larger model's precision runs through the family, and is read at exactly the
bytes of the smaller version. *Measured*: every version beside the best version of the next smaller model that takes no
more bytes. Both are paired token by token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from lowbit.evaluation.hypotheses import Hypothesis, Measured, Verdict, judge, worst
from lowbit.evaluation.statistics import Interval, holm, p_value
from lowbit.report import text
from lowbit.report.panel import Claim, Curves, Mark, Panel, Titled
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study import laws
from lowbit.study.contrasts import Base, base_of
from lowbit.study.family import SIXTEEN, Count, Family, Version, of_view
from lowbit.study.laws import Matched
from lowbit.study.view import View

SOURCE = "arXiv:2405.03146"
CHECK = "arXiv:2405.03146, check A6.1"
_Kind = Literal["above", "below"]


class Duel(NamedTuple):
    """A larger model's precision beside a version of the next smaller model, at that one's bytes."""

    larger: Version
    smaller: Version
    measured: Interval
    """Loss of the larger version as it is, less that of the smaller, whatever their bytes."""
    equal: Interval | None
    """The same at the smaller one's bytes; None where the precision's curve does not reach them."""

    def best(self, kind: _Kind, count: Count) -> Interval | None:
        """What speaks to "the larger one is better" (below 0) at equal bytes: a version that takes fewer does too."""
        fewer = self.larger.nbytes(count) <= self.smaller.nbytes(count)
        return self.measured if self.equal is None and kind == "below" and fewer else self.equal


class Asked(NamedTuple):
    """A claim over all pairs of neighbours: a precision of the larger against one of the smaller."""

    source: str
    claim: str
    larger: float
    smaller: tuple[float, ...]
    kind: _Kind


ASKED = (
    Asked(SOURCE, "At equal bytes the larger model in 4 bits beats the next smaller one in 16.", 4, (16,), "below"),
    Asked(CHECK, "At equal bytes the larger model in 4 bits beats the next smaller one in 8.", 4, (8,), "below"),
    Asked(CHECK, "At equal bytes the larger model in 2 bits, rounded to nearest, loses to the next smaller one "
          "in 4, 8 and 16.", 2, (16, 8, 4), "above"),
)  # fmt: skip


def panels(view: View) -> list[Panel]:
    """One panel over all models; none for a single model, or before versions of two are scored."""
    family = of_view(view)
    return [] if family is None else of_family(family)


def of_family(family: Family) -> list[Panel]:
    """Versions whose weights alone are low-bit."""
    family = family.where([i for i, v in enumerate(family.versions) if v.form.kind == "W" or v.label == SIXTEEN])
    if len(family.models) < 2:
        return []
    base = base_of(family)
    rows = {count: laws.scale_or_precision(family.points(count), family.losses) for count in ("total", "linears")}
    found = {count: [duels(family, base, asked, count) for asked in ASKED] for count in ("total", "linears")}
    tables = [_equal(found["total"], found["linears"]), _measured(family, rows["total"], rows["linears"])]
    return [
        Panel(
            "scale", "A larger model in fewer bits, or a smaller one in more",
            (f"{len(family.versions)} versions of {len(family.models)} models ({', '.join(family.models)}), scored on "
             f"{family.span}.", *_sentences(found["total"], rows["total"])),
            tuple(_claims(found["total"], found["linears"])), tuple(t for t in tables if t.table.rows),
            (_figure(family, "total"), _figure(family, "linears")), _notes(family),
        )
    ]  # fmt: skip


def duels(family: Family, base: Base, asked: Asked, count: Count) -> list[Duel]:
    """The pairs of neighbours that have both precisions."""
    points, place = family.points(count), {(v.model, v.label): i for i, v in enumerate(family.versions)}
    label, found = base.widths.get(asked.larger, ""), []
    for (small, large), bits in itertools.product(itertools.pairwise(family.models), asked.smaller):
        big, little = place.get((large, label)), place.get((small, base.widths.get(bits, "")))
        if big is None or little is None:
            continue
        read, one = laws.at(points, label, points[little].nbytes), family.weights(plus=[little])
        found.append(
            Duel(
                family.versions[big], family.versions[little],
                family.losses.weighted(family.weights(plus=[big]) - one),
                None if read is None else family.losses.weighted(read - one),
            )
        )  # fmt: skip
    return found


def _claims(total: Sequence[list[Duel]], linears: Sequence[list[Duel]]) -> Iterable[Claim]:
    """Each holds only if every pair's difference does; adjusted together, apart for each way to count bytes."""
    verdicts, others = _judged(total, "total"), _judged(linears, "linears")
    for asked, mine in zip(ASKED, total, strict=True):
        if asked.claim not in verdicts:
            continue
        spoken = [(d, i) for d in mine if (i := d.best(asked.kind, "total")) is not None]
        told = "; ".join(
            f"{d.larger.model} against {d.smaller.model} in {d.smaller.form.weights:g} {_signed(i)}" for d, i in spoken
        )
        left = len(mine) - len(spoken)
        out = f" {left} of {len(mine)} pairs are out of reach and not counted." if left else ""
        verdict, other = verdicts[asked.claim], others.get(asked.claim)
        aside = f" With only the linears counted: {other}." if other not in (None, verdict) else ""
        n = spoken[0][1]
        found = f"Loss of the larger less the smaller, nats: {told}; n = {n.n:,} tokens in {n.clusters} clusters."
        yield Claim(asked.source, asked.claim, found + out + aside, verdict)


def _judged(found: Sequence[list[Duel]], count: Count) -> dict[str, Verdict]:
    measured = []
    for asked, mine in zip(ASKED, found, strict=True):
        gaps = [i for d in mine if (i := d.best(asked.kind, count)) is not None]
        if gaps:
            hypothesis = Hypothesis(asked.claim, asked.claim, asked.kind)
            measured.append(Measured(hypothesis, worst(gaps, asked.kind), len(gaps)))
    return {j.hypothesis.name: j.verdict for j in judge(measured)}


def _sentences(found: Sequence[list[Duel]], rows: Sequence[Matched]) -> Iterable[str]:
    for asked, mine in zip(ASKED, found, strict=True):
        spoken = [(d, i) for d in mine if (i := d.best(asked.kind, "total")) is not None]
        if not spoken:
            continue
        sure = sum(i.high < 0 if asked.kind == "below" else i.low > 0 for _, i in spoken)
        gaps = [i.estimate for _, i in spoken]
        sizes = " to ".join(dict.fromkeys(text.number(x, signed=True) for x in (min(gaps), max(gaps))))
        way = "beats" if asked.kind == "below" else "loses to"
        against = " or ".join(f"{b:g}" for b in sorted({d.smaller.form.weights for d, _ in spoken}, reverse=True))
        yield (
            f"At equal bytes the larger model in {asked.larger:g} bits {way} the next smaller one in {against} bits in "
            f"{sure} of {len(spoken)} comparisons (the interval excludes 0); differences in loss of {sizes} nats."
        )
    won = {word: sum(r.verdict == word for r in rows) for word in ("larger", "smaller", "undecided")}
    if rows:
        yield (
            f"Of {len(rows)} measured versions beside the best of the next smaller model in as many bytes or fewer, "
            f"{won['larger']} are better, {won['smaller']} worse and {won['undecided']} undecided (adjusted)."
        )


def _signed(i: Interval) -> str:
    return " ".join(text.estimate(i.estimate, i.low, i.high, signed=True))


def _equal(total: Sequence[list[Duel]], linears: Sequence[list[Duel]]) -> Titled:
    """What the claims are about, pair by pair."""
    columns = (Column("Larger", numeric=False), Column("Smaller", numeric=False), Column("Bytes", "larger | smaller"),
               Column("Difference as measured", "nats, 95 %"), Column("At the smaller one's bytes", "nats, 95 %"),
               Column("Better", "adjusted", numeric=False), Column("By linears alone", numeric=False))  # fmt: skip
    flat = [d for mine in total for d in mine]
    words, others = _better(flat), _better([d for mine in linears for d in mine])
    rows = []
    for d, word, other in zip(flat, words, others, strict=True):
        cells = (
            Cell(d.larger.model, d.larger.label), Cell(d.smaller.model, d.smaller.label),
            Cell(f"{text.size(d.larger.total)} | {text.size(d.smaller.total)}"),
            Cell(*text.estimate(*d.measured[:3], signed=True)),
            Cell("not reached") if d.equal is None else Cell(*text.estimate(*d.equal[:3], signed=True)),
            Cell(word), Cell(other),
        )  # fmt: skip
        rows.append(Row(cells))
    return Titled("At equal bytes, read off the larger one's curve", Table(columns, tuple(rows)))


def _better(duels: Sequence[Duel]) -> list[str]:
    """Which of the two at equal bytes, two-sided at 5 % over all rows (Holm)."""
    ps = [1.0 if d.equal is None else p_value(d.equal) for d in duels]
    found = []
    for d, p in zip(duels, holm(ps), strict=True):
        if d.equal is None:
            found.append("not reached")
        else:
            found.append("undecided" if p >= laws.ALPHA else "larger" if d.equal.estimate < 0 else "smaller")
    return found


def _measured(family: Family, rows: Sequence[Matched], linears: Sequence[Matched]) -> Titled:
    """Every version beside its best rival."""
    columns = (Column("Larger", numeric=False), Column("Smaller, best within its bytes", numeric=False),
               Column("Bytes", "larger | smaller"), Column("Difference", "nats, 95 %"), Column("p", "adjusted"),
               Column("Better", numeric=False), Column("By linears alone", numeric=False))  # fmt: skip
    others = {(m.larger.model, m.larger.precision): m for m in linears}
    drawn = []
    for m in rows:
        other = others.get((m.larger.model, m.larger.precision))
        drawn.append(
            Row((
                Cell(m.larger.model, m.larger.precision), Cell(m.smaller.model, m.smaller.precision),
                Cell(f"{text.size(m.larger.nbytes)} | {text.size(m.smaller.nbytes)}"),
                Cell(*text.estimate(*m.difference[:3], signed=True)), Cell(text.p_value(m.p)), Cell(m.verdict),
                Cell("none fits") if other is None else Cell(other.verdict, other.smaller.precision),
            ))
        )  # fmt: skip
    return Titled("Every version beside the best of the next smaller model", Table(columns, tuple(drawn)))


def _figure(family: Family, count: Count) -> Curves:
    what = "all stored bytes" if count == "total" else "the bytes of linears alone"
    marks = []
    for i, v in sorted(enumerate(family.versions), key=lambda iv: (-iv[1].form.weights, iv[1].label)):
        loss = family.loss(i)
        marks.append(Mark(v.label, v.nbytes(count) / 1e6, *loss[:3], v.model))
    return Curves(
        count, f"Loss against {what}", "A line a precision, a mark a model. At one size, the lower line is the better "
        "choice. Intervals are those of each loss by itself; most of their width is the text's, which all share.",
        "megabytes", "nats a token", tuple(marks), log_x=True,
    )  # fmt: skip


def _notes(family: Family) -> tuple[str, ...]:
    originals = {v.model: v for v in family.versions if v.label == SIXTEEN}
    shares = ", ".join(f"{m} {100 * (1 - originals[m].linears / originals[m].total):.0f} %" for m in family.models)
    return (
        "Bytes are everything stored; verdicts are over these. Embeddings stay in 16 bit and are most of a small model "
        f"(all but the linears: {shares} of the originals), so a model's versions differ less in bytes than in bits; "
        "the last column counts the linears alone.",
        "Read off the curve: between two models of one precision, loss is taken to be linear in log bytes. Where a "
        "curve does not reach the smaller one's bytes, a larger model that takes fewer and is better still "
        "supports a claim.",
        "Against the best of several versions: better than every one (an intersection-union test), or worse than "
        "some, times their number. Holm over the rows of a table, and over the claims.",
        "Each model was trained once: intervals are about other text, not about models trained again.",
    )
