"""Which uncertainty of the original foretells a change, of answers and of tokens, for the analysis of disagreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lowbit.evaluation import hypotheses
from lowbit.evaluation.metrics import agreement
from lowbit.evaluation.metrics import disagreement as dis
from lowbit.evaluation.statistics import Interval, holm, p_value
from lowbit.report import text
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses.answered import Version, estimated
from lowbit.study.view import Model


class Worst(NamedTuple):
    """The uncertainty that comes nearest to the margin, or beats it by most."""

    score: str
    interval: Interval
    """AUC of the margin less its own."""


class Ranking(NamedTuple):
    """How each uncertainty ranks the changed ones of ``n`` questions first."""

    n: int
    changed: int
    margin: Interval
    ahead: Mapping[str, Interval]
    """AUC of the margin less that of each other one, paired."""

    @property
    def worst(self) -> Worst:
        chosen = hypotheses.worst(list(self.ahead.values()), "above")
        return next(Worst(name, i) for name, i in self.ahead.items() if i is chosen)


class TokenRanking(NamedTuple):
    """The same of the tokens of the text."""

    changed: Interval
    margin: Interval
    entropy: Interval
    beside_entropy: Interval
    least_sure: Interval | None
    """Share of the changed tokens in the fifth that the original was least sure of."""


def rankings(versions: Sequence[Version]) -> dict[str, Ranking]:
    """By candidate, on questions with more than two choices; without those that changed none or all of them."""
    found = {}
    for version in versions:
        part = version.pooled(least=3)
        if part is None:
            continue
        reference = part.reference
        changed = dis.disagrees(reference, part.candidate)
        if 0 < changed.sum() < len(changed):
            scores = {name: score(reference.p) for name, score in dis.SCORES.items()}
            margin = scores.pop("margin")
            ahead = {name: dis.auc_shift(other, margin, changed, reference.cluster) for name, other in scores.items()}
            auc = dis.auc(margin, changed, reference.cluster)
            found[version.label] = Ranking(len(changed), int(changed.sum()), auc, ahead)
    return found


def of_tokens(model: Model) -> dict[str, TokenRanking]:
    """By candidate, from the token evidence of the text that it was scored on."""
    found = {}
    for entry, about in model.candidates():
        tokens = model.tokens(entry.score)
        if tokens is None:
            continue
        changed = tokens.top1 != tokens.top1_ref
        if 0 < changed.sum() < len(changed):
            margin, entropy = -tokens.margin_ref.astype("float64"), tokens.entropy_ref.astype("float64")
            cluster = tokens.cluster
            found[about.label] = TokenRanking(
                dis.rate(changed, cluster), dis.auc(margin, changed, cluster), dis.auc(entropy, changed, cluster),
                dis.auc_shift(entropy, margin, changed, cluster), agreement.flips_in_lowest_margin(tokens),
            )  # fmt: skip
    return found


def table(found: Mapping[str, Ranking]) -> Table:
    """AUC of the margin, and how far each other uncertainty is behind it; p by Holm over the table."""
    others = [name for name in dis.SCORES if name != "margin"]
    tested = [(label, name) for label in found for name in others]
    adjusted = holm([p_value(found[label].ahead[name]) for label, name in tested])
    p = dict(zip(tested, adjusted, strict=True))
    rows = []
    for label, one in found.items():
        below, above = ([n for n in others if p[label, n] < hypotheses.ALPHA and sign * one.ahead[n].estimate > 0]
                        for sign in (1, -1))  # fmt: skip
        words = [f"margin above {', '.join(below)}"] if below else []
        words += [f"margin below {', '.join(above)}"] if above else []
        rows.append(
            Row((
                Cell(label), Cell(f"{one.n}", f"{one.changed} changed"), estimated(one.margin),
                *(estimated(one.ahead[name], signed=True) for name in others), Cell("; ".join(words) or "nothing"),
            ))
        )  # fmt: skip
    columns = (
        Column("Version", numeric=False), Column("Questions", "of 3 choices or more"), Column("Margin", "AUC"),
        *(Column(f"Ahead of {name}", "Δ AUC") for name in others), Column("Shown to differ", numeric=False),
    )  # fmt: skip
    return Table(columns, tuple(rows))


def token_table(found: Mapping[str, TokenRanking]) -> Table:
    """The same of tokens."""
    rows = [
        Row((
            Cell(label), Cell(f"{one.changed.n}"), estimated(one.changed.scaled(100.0)), estimated(one.margin),
            estimated(one.entropy), estimated(one.beside_entropy, signed=True),
            Cell(text.MISSING) if one.least_sure is None else estimated(one.least_sure.scaled(100.0)),
        ))
        for label, one in found.items()
    ]  # fmt: skip
    columns = (
        Column("Version", numeric=False), Column("Tokens"), Column("Changed", "%"), Column("Margin", "AUC"),
        Column("Entropy", "AUC"), Column("Margin ahead of entropy", "Δ AUC"),
        Column("Of them in the least sure fifth", "%"),
    )  # fmt: skip
    return Table(columns, tuple(rows))
