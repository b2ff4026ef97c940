"""Advice: from a measured table and a constraint to one version, the reason, and what was ruled out.

Nothing is predicted that was measured: sizes are stored bytes, losses are paired differences with intervals. A limit
on loss is met when it is *shown* to be met (one-sided test, Holm over the versions that come into question), so the
best of many does not slip in by luck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lowbit.errors import StudyError
from lowbit.evaluation import evidence
from lowbit.evaluation.metrics import perplexity
from lowbit.evaluation.statistics import Interval, holm, p_value
from lowbit.report.pareto import Point, Standing, standings
from lowbit.report.text import MISSING, size
from lowbit.study.rows import CellRow
from lowbit.study.store import Store

Prefer = Literal["quality", "size", "speed"]
Measure = Literal["perplexity", "score"]
ALPHA = 0.05
ORIGINAL = "original"
UNHARMED = Interval(0.0, 0.0, 0.0, 0.0, 0, 0, "the original itself")
UNMEASURED = Interval(0.0, 0.0, 0.0, 0.0, 0, 0, "not measured")


@dataclass(frozen=True)
class Option:
    """One version of the model, measured."""

    label: str
    recipe: str
    """What makes it; ``dense`` for one that no recipe made."""
    nbytes: int
    """Stored."""
    need: int
    """Bytes in memory while it runs: weights, keys and values, the rest."""
    loss: Interval
    """Log-perplexity less that of the original, in nats; or the share of the original's mean score on tasks that is
    lost."""
    rate: float | None = None
    """Tokens a second when decoding; None where unknown."""
    path: str = ""
    """Where it lies; empty for one that does not exist (any more)."""
    measure: Measure = "perplexity"

    @property
    def percent(self) -> str:
        """The loss in percent of perplexity or of the original's score, with its interval; a dash where unmeasured."""
        if self.loss == UNMEASURED:
            return MISSING
        value, low, high = (100 * (math.expm1(x) if self.measure == "perplexity" else x) for x in self.loss[:3])
        return f"{value:+.2f} % [{low:+.2f}, {high:+.2f}]"

    def limit(self, share: float) -> float:
        """A share of perplexity, or of score, in the unit of ``loss``."""
        return math.log1p(share) if self.measure == "perplexity" else share


@dataclass(frozen=True)
class Constraint:
    """What a version must meet; None where anything goes."""

    memory: int | None = None
    """Bytes."""
    max_loss: float | None = None
    """Share of perplexity, or of the original's score: 0.01 for 1 %."""
    min_rate: float | None = None
    """Tokens a second."""


class Ruled(NamedTuple):
    """A version that was not chosen, and why."""

    option: Option
    why: str


@dataclass(frozen=True)
class Advice:
    """The version to take, or None where no measured one meets the constraint."""

    choice: Option | None
    reason: str
    front: tuple[Option, ...]
    """The versions that nothing measured is both smaller and better than, smallest first."""
    ruled_out: tuple[Ruled, ...]


def advise(options: Sequence[Option], constraint: Constraint, prefer: Prefer | None = None) -> Advice:
    """The best version within a constraint.

    ``prefer``: "quality", the least loss that the evidence leaves possible (the upper end of its interval, so that what
    is badly known does not win); "size", the fewest bytes in memory; "speed", the most tokens a second. By
    default quality, or size where a limit on loss is the only constraint. Ties go to the smaller, then to the less
    lossy, then to the label. Raises StudyError for an empty table.
    """
    if not options:
        raise StudyError("nothing was measured", where="advise", fix="lowbit study run, or lowbit compare")
    wanted = preferred(constraint, prefer)
    ruled, left = [], []
    for option in options:
        why = too_much(option, constraint)
        if why:
            ruled.append(Ruled(option, why))
        else:
            left.append(option)
    if constraint.max_loss is not None:
        left, lossy = _within_loss(left, constraint.max_loss)
        ruled += lossy
    front = _front(options)
    if not left:
        return Advice(None, _nearest(options, constraint), front, tuple(ruled))
    if wanted == "speed" and all(o.rate is None for o in left):
        raise StudyError(
            "no speed is known of the versions that meet the constraint", where="--prefer speed",
            fix="--bandwidth, from which speeds are predicted, or another preference",
        )  # fmt: skip
    choice = min(left, key=lambda o: _order(o, wanted))
    ruled += [Ruled(o, _second(o, choice, wanted)) for o in left if o is not choice]
    return Advice(choice, _reason(choice, left, wanted, constraint), front, tuple(ruled))


def table(
    store: Store, study: str, model_digest: str, *, overhead: int = 0, rate_of: Mapping[str, float] | None = None
) -> list[Option]:
    """Every scored version of one model of a study, and the original, which loses nothing.

    ``overhead`` is what running takes beside the weights, in bytes; ``rate_of`` gives measured tokens a second by
    label. Raises StudyError where the study has not scored this model.
    """
    rows = [cell for _, cell in store.cells(study) if cell.params.get("model_digest") == model_digest]
    done = [cell for cell in rows if cell.status == "done" and cell.output is not None]
    references = [cell for cell in done if cell.stage == "reference"]
    if not references:
        raise StudyError(
            "this model was not scored", where=f"study {study!r}", fix="lowbit study run, or lowbit compare"
        )
    rates = rate_of or {}
    base = references[0]
    tokens, provenance = evidence.read_tokens(store.evidence_folder(base.key))
    own = perplexity.delta(tokens)
    nothing = Interval(0.0, 0.0, 0.0, 0.0, own.n, own.clusters, "the original itself")
    found = [_option(store, ORIGINAL, base, nothing, overhead, rates)]
    for cell in (c for c in done if c.stage == "score"):
        tokens, scored = evidence.read_tokens(store.evidence_folder(cell.key))
        scored.require_comparable(provenance)
        label = cell.label.rpartition("score ")[2]
        found.append(_option(store, label, cell, perplexity.delta(tokens), overhead, rates))
    return found


def _option(
    store: Store, label: str, cell: CellRow, loss: Interval, overhead: int, rates: Mapping[str, float]
) -> Option:
    assert cell.output is not None  # it is done
    nbytes = int(cell.output["bytes_total"])
    path = cell.params.get("candidate") or (cell.params["model"] if label == ORIGINAL else None)
    where = Path(path) if path else store.root / "checkpoints" / cell.inputs[1]
    return Option(
        label, str(cell.output["recipe"]), nbytes, nbytes + overhead, loss, rates.get(label),
        str(where) if where.exists() else "",
    )  # fmt: skip


def preferred(constraint: Constraint, prefer: Prefer | None) -> Prefer:
    """What decides among versions that meet a constraint."""
    return prefer or ("size" if constraint.max_loss is not None and constraint.memory is None else "quality")


def too_much(option: Option, constraint: Constraint) -> str:
    """Why a version meets the constraint on memory or speed not; empty where it does."""
    memory, rate = constraint.memory, constraint.min_rate
    if memory is not None and option.need > memory:
        return f"needs {size(option.need)}, {size(option.need - memory)} too many"
    if rate is not None and option.rate is None:
        return "its speed is not known"
    if rate is not None and option.rate is not None and option.rate < rate:
        return f"{option.rate:.1f} tokens/s, asked for {rate:g}"
    return ""


def _within_loss(options: Sequence[Option], max_loss: float) -> tuple[list[Option], list[Ruled]]:
    shown = holm([p_value(o.loss, o.limit(max_loss), "less") for o in options])
    kept, ruled = [], []
    for option, p in zip(options, shown, strict=True):
        if p < ALPHA:
            kept.append(option)
        elif option.loss.estimate >= option.limit(max_loss):
            ruled.append(Ruled(option, f"loses {option.percent}, allowed are {100 * max_loss:g} %"))
        else:
            ruled.append(
                Ruled(
                    option,
                    f"loses {option.percent}: not shown to stay below {100 * max_loss:g} %, {_MORE[option.measure]}",
                )
            )
    return kept, ruled


_MORE = {"perplexity": "score more text", "score": "ask more items"}
_OF = {"perplexity": "perplexity", "score": "the original's score"}


def _order(option: Option, prefer: Prefer) -> tuple[float, int, float, str]:
    first = {
        "quality": option.loss.high, "size": float(option.need),
        "speed": math.inf if option.rate is None else -option.rate,
    }[prefer]  # fmt: skip
    return first, option.need, option.loss.estimate, option.label


def _reason(choice: Option, left: Sequence[Option], prefer: Prefer, constraint: Constraint) -> str:
    most = {"quality": "may lose least", "size": "takes the fewest bytes", "speed": "is fastest"}[prefer]
    text = f"of {len(left)} that meet the constraint it {most}: {choice.percent} of {_OF[choice.measure]}, "
    text += size(choice.need)
    if constraint.memory is not None:
        text += f" of {size(constraint.memory)}"
    if prefer == "quality":
        smaller = [o for o in left if o.need < choice.need and o.loss.low <= choice.loss.high]
        if smaller and choice.loss.se:
            tied = min(smaller, key=lambda o: o.need)
            text += f"; {tied.label} ({size(tied.need)}) is not shown to lose more"
    return text


def _second(option: Option, choice: Option, prefer: Prefer) -> str:
    if prefer == "quality":
        return f"meets the constraint, may lose more than {choice.label}: {option.percent}"
    if prefer == "size":
        return f"meets the constraint, takes {size(option.need - choice.need)} more"
    if option.rate is None:
        return "meets the constraint, its speed is not known"
    return f"meets the constraint, is {'as fast as' if option.rate == choice.rate else 'slower than'} {choice.label}"


def _nearest(options: Sequence[Option], constraint: Constraint) -> str:
    """What would have to give where nothing meets the constraint."""
    parts = ["no measured version meets the constraint"]
    fitting = [o for o in options if not too_much(o, constraint)]
    if fitting:
        best = min(fitting, key=lambda o: o.loss.high)
        parts.append(f"the best that fits is {best.label}, which loses {best.percent}")
    if constraint.max_loss is not None and (kept := _within_loss(options, constraint.max_loss)[0]):
        least = min(kept, key=lambda o: o.need)
        parts.append(f"the smallest shown to lose so little is {least.label}, which needs {size(least.need)}")
    return "; ".join(parts)


def _front(options: Sequence[Option]) -> tuple[Option, ...]:
    points = [Point(o.label, o.need, o.loss.estimate, o.loss.low, o.loss.high) for o in options]
    placed = standings(points)
    return tuple(sorted((o for o in options if placed[o.label] is Standing.FRONT), key=lambda o: o.need))
