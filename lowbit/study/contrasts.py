"""What arXiv:2212.09720 says of precisions at equal bytes, as contrasts of a family's versions.

Two precisions are compared over the sizes that both span: the mean of their differences there, paired token by token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal, NamedTuple

from lowbit.evaluation.hypotheses import Hypothesis, Measured, judge, worst
from lowbit.evaluation.statistics import Interval, tost
from lowbit.report import text
from lowbit.report.panel import Claim
from lowbit.study import laws
from lowbit.study.family import SIXTEEN, Count, Family, Version

SOURCE = "arXiv:2212.09720"
MARGIN = 0.01  # nats that do not matter, as in the main table


class Base(NamedTuple):
    """The formats of one type and block that the most widths were measured of: others are held against these."""

    type: str
    block: str
    widths: Mapping[float, str]
    """Labels by bits, rising; the original is the last."""

    @property
    def name(self) -> str:
        return f"{self.type}-{self.block}"


def base_of(family: Family) -> Base:
    """That of the most widths, 4 among them if possible; the first of equals."""
    groups: dict[tuple[str, str], dict[float, str]] = defaultdict(dict)
    for v in plain(family):
        groups[v.form.type, v.form.block].setdefault(v.form.weights, v.label)
    most = max(groups, key=lambda g: (4 in groups[g], len(groups[g])), default=("", ""))
    return Base(*most, dict(sorted(groups[most].items())) | {16.0: SIXTEEN})


def plain(family: Family) -> list[Version]:
    """Rounded without outliers: what type, block and width alone do."""
    return [v for v in family.versions if v.form.method == "rtn"]


def claims(family: Family, base: Base) -> list[Claim]:
    """What the paper says, and what is found; adjusted together, apart for each way to count bytes."""
    total, linears = (_contrasts(family, base, count) for count in ("total", "linears"))
    verdicts, others = (
        {j.hypothesis.name: j.verdict for j in judge([measured for measured, _ in asked.values()])}
        for asked in (total, linears)
    )
    found = []
    for name, (measured, told) in total.items():
        other = others.get(name, verdicts[name])
        aside = "" if other == verdicts[name] else f" With only the linears counted: {other}."
        found.append(Claim(SOURCE, measured.hypothesis.claim, told + aside, verdicts[name]))
    return found


_Asked = dict[str, tuple[Measured, str]]


def _contrasts(family: Family, base: Base, count: Count) -> _Asked:
    """Every claim that the versions bear on: its difference, and what to say of it."""
    points, found = family.points(count), _Asked()
    four = base.widths.get(4)

    def ask(name: str, claim: str, kind: Literal["above", "below"], pairs: Mapping[str, tuple[str, str]]) -> None:
        gaps = {what: laws.equal_bytes(points, *pair, family.losses) for what, pair in pairs.items()}
        held = {what: gap for what, gap in gaps.items() if gap is not None}
        if held:
            least = worst(list(held.values()), kind)
            told = "; ".join(f"{what} {nats(gap)}" for what, gap in held.items())
            found[name] = Measured(Hypothesis(name, claim, kind), least, len(held)), f"{told} nats; {_over(least)}."

    if four is not None:
        others = {f"4 bits less {k:g} bits": (four, label) for k, label in base.widths.items() if k != 4}
        ask("four", "For a total of bits, 4 bits are the best width.", "below", others)
        for label, form in {v.label: v.form for v in plain(family) if v.form.weights == 4}.items():
            if form.block == base.block and form.type != base.type and not form.type.startswith("int"):
                claim = f"At 4 bits, {form.type} codes do better than integers."
                ask(f"type {label}", claim, "below", {f"{label} less {four}": (label, four)})
            if form.type == base.type and form.block in ("row", "tensor"):
                claim = f"At 4 bits, blocks of {base.block.removeprefix('g')} do better than one scale a {form.block}."
                ask(f"block {label}", claim, "below", {f"{four} less {label}": (four, label)})
        kept = {v.label for v in family.versions if v.form.outliers and v.form.weights == 3}
        claim = "Outliers in 16 bit do not make 3 bits as good as 4 for a total of bits."
        ask("outliers", claim, "above", {f"{label} less {four}": (label, four) for label in sorted(kept)})
    return found | _alike(family, base)


def _alike(family: Family, base: Base) -> _Asked:
    """At 6 to 8 bits no type and no block matters: the format furthest from the base of its width, model by model."""
    twins = {(v.model, v.form.weights): i for i, v in enumerate(family.versions) if v.label in base.widths.values()}
    gaps: dict[str, Interval] = {}
    for label in dict.fromkeys(v.label for v in plain(family) if 6 <= v.form.weights <= 8):
        rows = [i for i, v in enumerate(family.versions) if v.label == label]
        against = [twins.get((family.versions[i].model, family.versions[i].form.weights)) for i in rows]
        pairs = [i for i in against if i is not None]
        if label not in base.widths.values() and len(pairs) == len(rows):
            gaps[label] = family.losses.weighted(family.weights(plus=rows, minus=pairs))
    if not gaps:
        return {}
    name = max(gaps, key=lambda label: tost(gaps[label], MARGIN))
    claim = f"At 6 to 8 bits neither type nor block matters (within {MARGIN:g} nats)."
    told = (
        f"Of {len(gaps)} formats the least alike: {name} less {base.name} {nats(gaps[name])} nats; {_over(gaps[name])}."
    )
    return {"alike": (Measured(Hypothesis("alike", claim, "within", MARGIN), gaps[name], len(gaps)), told)}


def nats(gap: Interval) -> str:
    """A difference with its interval, in words."""
    return " ".join(text.estimate(gap.estimate, gap.low, gap.high, signed=True))


def _over(gap: Interval) -> str:
    return f"n = {gap.n:,} tokens in {gap.clusters} clusters"
