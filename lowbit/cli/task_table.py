"""The table of tasks on the screen: one block a candidate, its evidence above it, what it could have found below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit import digest
from lowbit.cli.columns import print_columns
from lowbit.evaluation.judge import Judged
from lowbit.evaluation.task_findings import TaskFinding, p_text
from lowbit.report import text
from lowbit.study.task_table import TaskTable
from lowbit.study.tasks import Version

_HEADS = ("task", "measure", "n", "clusters", "ref", "cand", "Δ", "95 % CI", "lost/gained/other", "p", "verdict")
_LEFT = ("task", "measure", "95 % CI", "verdict")


def show(found: TaskTable) -> None:
    """Print the table; p values are adjusted over all rows of all candidates."""
    print(f"reference  {found.model}  {_identity(found.described)}")
    for version in found.versions:
        rows = found.rows[version.label]
        print(f"\ncandidate  {version.label}  {_identity(version.described)}")
        if not rows:
            print("no task of it is done")
            continue
        print_columns(_HEADS, [_row(f) for f in rows], _LEFT)
        print(f"p and verdict: {rows[0].rule}, over the whole table. {_detectable(version, found)}")
        if floors := [f for f in rows if f.floor is not None]:
            most = max(floors, key=lambda f: f.floor or 0.0)
            share = f"up to {text.number(most.floor)} % of items change ({most.task}, {most.measure})"
            print(f"noise floor: {share if most.floor else 'no item changes'} when the reference runs in other batches")
    for note in found.notes:
        print(f"note: {text.safe(note)}")


def show_judged(judged: Mapping[str, Judged]) -> None:
    """Print what a judge said of the dialogues of each candidate, and how far it can be trusted."""
    for label, j in judged.items():
        value, interval = text.estimate(j.score.estimate, j.score.low, j.score.high, signed=True)
        print(
            f"judge  {text.safe(label)}: {j.wins} won, {j.losses} lost, {j.ties} tied of {j.score.n}; score {value} "
            f"{interval}; {100 * j.turned:.0f} % of its verdicts turn with the order, {100 * j.noise:.0f} % when asked "
            f"again, {j.unread} replies without one"
        )


def _row(f: TaskFinding) -> tuple[str, ...]:
    unit = "pp" if f.unit == "%" else f.unit
    delta, interval = text.estimate(f.delta, f.low, f.high, signed=True)
    flips = text.MISSING if f.flips is None else f"{f.flips.lost} / {f.flips.gained} / {f.flips.other}"
    verdict = f"{f.verdict} ({f.note})" if f.note else f.verdict
    return (
        f.task, f.measure, str(f.n), str(f.clusters), _level(f.reference), _level(f.candidate), f"{delta} {unit}",
        interval, flips, p_text(f.p_adjusted), verdict,
    )  # fmt: skip


def _level(value: float) -> str:
    return text.number(value) if abs(value) < 10 else f"{value:.1f}".replace("-", "−")


def _identity(described: Mapping[str, Any]) -> str:
    bits = f"{text.number(described['bits_per_weight'])} bits a weight"
    return f"sha {digest.short(described['digest'])}  {text.size(described['bytes_total'])}  {bits}"


def _detectable(version: Version, found: TaskTable) -> str:
    parts: list[str] = []
    for f in found.rows[version.label]:
        unit = "pp" if f.unit == "%" else f.unit
        if f.mde > 0 and not any(p.startswith(f"{f.task} ") for p in parts):
            parts.append(f"{f.task} {text.number(f.mde)} {unit}")
    return f"MDE (80 % power at 5 %): {' · '.join(parts)}" if parts else ""
