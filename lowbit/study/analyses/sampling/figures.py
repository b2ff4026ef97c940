"""Figures of what was written: surfaces over the sampler, distances over temperature, and survival."""

from __future__ import annotations

import math

import numpy as np

from lowbit.evaluation.metrics import generations as gen
from lowbit.evaluation.metrics import survival
from lowbit.evaluation.metrics.generations import Texts
from lowbit.evaluation.sampler import Setting
from lowbit.evaluation.statistics import Interval, paired_mean
from lowbit.report import text
from lowbit.report.panel import Curves, Heat, Mark, Square
from lowbit.study.analyses.sampling.evidence import Wrote


def figures(wrote: Wrote) -> list[Curves | Heat]:
    """All that the settings allow: curves over temperature need two, survival at 0 needs greedy text."""
    found: list[Curves | Heat] = [_surface(wrote)]
    temperatures = {s.temperature for s in wrote.settings}
    found += [_distances(wrote, "total_variation")] if len(temperatures) > 1 else []
    found += [_distances(wrote, "kl")] if len(temperatures - {0.0}) > 1 else []
    pairs = (("greedy", "greedy text"), ("drawn", "text that was drawn, all settings above temperature 0"))
    for key, name in pairs:
        base = getattr(wrote.original, key)
        if base is not None:
            found.append(_survival(key, name, base, [(v.label, getattr(v, key)) for v in wrote.versions]))
    return found


def _surface(wrote: Wrote) -> Heat:
    squares = []
    for v in wrote.versions:
        for setting, base in wrote.original.texts.items():
            shift = gen.shift("text_nll_ref", base, v.texts[setting])
            value = " ".join(text.estimate(*shift[:3], signed=True))
            squares.append(Square(_short(setting), v.label, shift.estimate, f"{value} nat a token"))
    return Heat(
        "surface", "How much less likely the original finds the text, by setting",
        "Nats a token more than for what the original wrote itself with the same random numbers: orange is less "
        "likely, blue likelier, a stronger colour further away.",
        "temperature · top-k", "version", "shift", tuple(squares), diverging=True,
    )  # fmt: skip


def _short(setting: Setting) -> str:
    if setting.temperature == 0:
        return "greedy"
    return f"{setting.temperature:g}" + ("" if setting.top_k is None else f" · {setting.top_k}")


_DISTANCES = {
    "total_variation": ("Chance that the next token differs, by temperature", "total variation",
                        "Of the best coupling of both distributions, on the original's own text; no top-k."),
    "kl": ("KL of the next token, by temperature", "KL, nat",
           "KL(original || version) of what is drawn from on the original's own text; no top-k. Intervals of logs."),
}  # fmt: skip


def _distances(wrote: Wrote, field: str) -> Curves:
    title, y, caption = _DISTANCES[field]
    log = field == "kl"  # which means nothing between greedy choices
    temperatures = sorted({s.temperature for s in wrote.settings if s.temperature > 0 or not log})
    marks = []
    for v in wrote.versions:
        for t in temperatures:
            gap = v.gaps.get(Setting(t)) or next(gap for s, gap in v.gaps.items() if s.temperature == t)
            value = getattr(gap, field)
            mean = paired_mean(value, np.arange(len(value)))
            ends = _on_log(mean) if log else (mean.low, mean.high)
            marks.append(Mark(v.label, t, mean.estimate, *ends, note=f"T {t:g}"))
    return Curves(field.replace("_", "-"), title, caption, "temperature", y, tuple(marks), log_y=log)


def _on_log(i: Interval) -> tuple[float, float]:
    """The interval of a number above 0 by that of its logarithm (delta method): its ends are above 0 too."""
    wide = math.exp((i.high - i.estimate) / i.estimate) if i.estimate > 0 else 1.0
    return i.estimate / wide, i.estimate * wide


def _survival(key: str, name: str, base: Texts, versions: list[tuple[str, Texts]]) -> Curves:
    marks = []
    for label, mine in versions:
        where = gen.divergence(base, mine)
        marks.append(Mark(label, 0, 1.0, 1.0, 1.0, "token 0"))
        share = 1.0, 1.0, 1.0
        for step in survival.curve(where):
            share = step.share.estimate, step.share.low, step.share.high
            marks.append(Mark(label, step.position, *share, note=f"token {step.position}"))
        end = int(where.position.max())
        if marks[-1].x < end:
            marks.append(Mark(label, end, *share, note=f"token {end}"))
    return Curves(
        f"parting-{key}", f"Share of texts that are still the original's: {name}",
        "Kaplan-Meier over tokens written, same prompts and random numbers; texts that end or are cut count so far.",
        "tokens written", "share", tuple(marks), steps=True,
    )  # fmt: skip
