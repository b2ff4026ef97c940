"""What arXiv:2309.05210 says of bitsandbytes' formats and samplers, judged by what was written here.

All tests of a model are adjusted together (Holm); a claim of "every other" is judged by the one that speaks least for
it. Speeds of two versions were not measured in turn; each is measured beside the original, and the ratios compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lowbit.evaluation import hypotheses as hyp
from lowbit.evaluation.hypotheses import CLAIMS, Measured
from lowbit.evaluation.metrics import generations as gen
from lowbit.evaluation.statistics import Interval
from lowbit.report import text
from lowbit.report.panel import Claim
from lowbit.study.analyses.sampling.evidence import Version, Wrote

SOURCE = "arXiv:2309.05210"
BAND = (0.5, 0.8)
FOUR_BITS = (3.5, 5.0)
EIGHT_BITS = (7.5, 9.5)


class _Asked(NamedTuple):
    measured: Measured
    claim: str
    found: str


def claims(wrote: Wrote) -> list[Claim]:
    """The claims that these versions and settings can speak of, with verdicts."""
    asked = [*_alike(wrote), *_band(wrote), *_slowest(wrote), *_fastest(wrote)]
    judged = hyp.judge([a.measured for a in asked])
    return [Claim(SOURCE, a.claim, a.found, j.verdict) for a, j in zip(asked, judged, strict=True)]


def speed(version: Version, what: str = "decode_rate") -> Interval:
    """log(its rate / the original's), by round."""
    rates = {
        side: np.array([getattr(getattr(r, side), what) for r in version.costs.rounds])
        for side in ("candidate", "reference")
    }
    return hyp.extremal(rates, "candidate")[0]


def ratio(log: Interval) -> tuple[str, str]:
    """A ratio and its interval, from that of its logarithm."""
    return text.estimate(*(math.exp(x) for x in log[:3]))


def shown(interval: Interval, unit: str) -> str:
    """The estimate, its interval, its unit and n, in one line."""
    value, ends = text.estimate(*interval[:3], signed=True)
    return f"{value} {ends} {unit}; {interval.clusters} prompts"


def _alike(wrote: Wrote) -> list[_Asked]:
    """Versions whose recipes differ in nf4 and fp4 alone."""
    by_recipe = {v.recipe: v for v in wrote.versions}
    found = []
    for recipe, one in by_recipe.items():
        twin = by_recipe.get(recipe.replace("nf4", "fp4"))
        if "nf4" not in recipe or twin is None:
            continue
        between = gen.shift("text_nll_ref", one.all, twin.all)
        claim = f"{one.label} and {twin.label} write equally well: equally likely text, within " \
                f"{CLAIMS.alike.margin:g} nat a token"  # fmt: skip
        found.append(_Asked(Measured(CLAIMS.alike, between), claim, shown(between, "nat a token, fp4 less nf4")))
    return found


def _band(wrote: Wrote) -> list[_Asked]:
    """Temperatures in the band against all others: by what was written, and by the distributions themselves."""
    versions = [v for v in wrote.versions if FOUR_BITS[0] <= v.bits <= FOUR_BITS[1]]
    temperatures = sorted({s.temperature for s in wrote.settings})
    inside = [t for t in temperatures if BAND[0] <= t <= BAND[1]]
    if not versions or not inside or len(inside) == len(temperatures):
        return []
    shifts, distances = {}, {}
    for t in temperatures:
        here = [s for s in wrote.settings if s.temperature == t]
        pairs = [(v, s) for v in versions for s in here]
        base = wrote.original.texts
        shifts[t] = np.mean([gen.shift_by_prompt("text_nll_ref", base[s], v.texts[s]) for v, s in pairs], axis=0)
        distances[t] = np.mean([v.gaps[s].total_variation for v, s in pairs], axis=0)
    others = ", ".join(f"{t:g}" for t in temperatures if t not in inside)
    claim = f"4-bit versions depart more from the original at temperatures {BAND[0]:g} to {BAND[1]:g} than at others"
    return [
        _Asked(Measured(CLAIMS.band, interval), f"{claim}: {how}", f"{shown(interval, unit)}, against {others}")
        for interval, how, unit in (
            (hyp.sensitivity(shifts, BAND), "likelihood lost by what they write", "nat a token"),
            (hyp.sensitivity(distances, BAND).scaled(100.0), "total variation of the next token", "points"),
        )
    ]


def _slowest(wrote: Wrote) -> list[_Asked]:
    """8-bit versions against all others, by their speeds relative to the original's."""
    eight = [v for v in wrote.versions if EIGHT_BITS[0] <= v.bits <= EIGHT_BITS[1]]
    mode = next((v for v in eight if "llmint8" in v.recipe), eight[0] if eight else None)
    rivals = [v for v in wrote.versions if v not in eight]
    if mode is None or not rivals:
        return []
    own = speed(mode)
    gaps = [own, *(hyp.unpaired(own, speed(v)) for v in rivals)]
    least = hyp.worst(gaps, "below")
    name = [wrote.original.label, *(v.label for v in rivals)][_index(gaps, least)]
    claim = f"int8 decodes slower than every other mode: {mode.label}"
    return [_Asked(Measured(CLAIMS.slowest, least, len(gaps)), claim, _times(least, name, mode))]


def _fastest(wrote: Wrote) -> list[_Asked]:
    """The original against every version, in turn."""
    gaps = [_negative(speed(v)) for v in wrote.versions]
    least = hyp.worst(gaps, "above")
    rival = wrote.versions[_index(gaps, least)]
    claim = f"{CLAIMS.fastest.claim}: here in {wrote.original.costs.dtype}"
    return [_Asked(Measured(CLAIMS.fastest, least, len(gaps)), claim, _times(least, rival.label, rival))]


def _times(log: Interval, rival: str, timed: Version) -> str:
    value, ends = ratio(log)
    threads = timed.costs.threads
    return f"{value} {ends} times the speed of {rival}; {log.clusters} rounds, {threads} thread{'s' * (threads > 1)}"


def _negative(i: Interval) -> Interval:
    return i._replace(estimate=-i.estimate, low=-i.high, high=-i.low)


def _index(intervals: Sequence[Interval], one: Interval) -> int:
    return next(k for k, i in enumerate(intervals) if i is one)
