"""Samplers: what low-bit versions write over temperature, top-k and length, beside their original (arXiv:2309.05210).

Every version wrote from the same prompts with the same random numbers, so that texts differ only where models do.
"""

from __future__ import annotations

import numpy as np

from lowbit.errors import StudyError
from lowbit.evaluation.hypotheses import ALPHA
from lowbit.evaluation.metrics import generations as gen
from lowbit.evaluation.statistics import Interval, detectable, holm, p_value, paired_mean
from lowbit.report import text
from lowbit.report.panel import Panel
from lowbit.study.analyses.sampling import tables
from lowbit.study.analyses.sampling.claims import claims, ratio, speed
from lowbit.study.analyses.sampling.evidence import Version, Wrote, of_model
from lowbit.study.analyses.sampling.figures import figures
from lowbit.study.view import View


def panels(view: View) -> list[Panel]:
    """A panel a model whose texts are there. Raises StudyError for a study that writes none."""
    if all(model.grid.texts is None for model in view.models):
        raise StudyError("nothing is written in this study", where=view.name, fix="a table [sampling] in its file")
    found = []
    for i, model in enumerate(view.models):
        if (wrote := of_model(model)) is not None:
            title = view.titled("What the versions write, over samplers", model)
            shown = [tables.main(wrote), tables.costs(wrote), *tables.by_length(wrote), tables.by_setting(wrote)]
            found.append(
                Panel(f"sampling-{i}", title, tuple(lead(wrote)), tuple(claims(wrote)), tuple(shown),
                      tuple(figures(wrote)), tuple(_notes(wrote)))
            )  # fmt: skip
    return found


def lead(wrote: Wrote) -> list[str]:
    """Likelihood, the first difference, and speed, each with interval and n."""
    base = wrote.original
    shifts = [gen.shift("text_nll_ref", base.all, v.all) for v in wrote.versions]
    shown: dict[str, list[str]] = {"less likely": [], "likelier": [], "": []}
    for v, shift, p in zip(wrote.versions, shifts, holm([p_value(i) for i in shifts]), strict=True):
        kind = "" if p >= ALPHA else "less likely" if shift.estimate > 0 else "likelier"
        shown[kind].append(f"{v.label} {_signed(shift)}")
    n = f"{wrote.prompts} prompts, {len(base.all.prompt)} texts a version; Holm over {len(shifts)} versions"
    lines = [
        f"The original finds {kind} than its own what these write (nats a token; {n}): {'; '.join(names)}."
        for kind, names in shown.items() if kind and names
    ]  # fmt: skip
    if shown[""]:
        least = max(detectable(i) for i in shifts)
        lines.append(
            f"No shift of likelihood is shown for {'; '.join(shown[''])} (nats a token; {n}); "
            f"one of {text.number(least)} would have been found in any of them with 80 % power before adjustment."
        )
    if base.greedy is not None:
        parts = [(v.label, tables.parting(base.greedy, v.greedy)) for v in wrote.versions]
        listed = "; ".join(f"{label} {at.main} {at.sub}" for label, at in parts)
        lines.append(
            f"Greedy text first differs from the original's at token (median, {wrote.prompts} prompts): {listed}."
        )
    far = "; ".join(f"{v.label} {_farthest(v)}" for v in wrote.versions)
    lines.append(f"The next token is most often another (total variation, no top-k, on the original's texts): {far}.")
    paces = "; ".join(f"{v.label} {' '.join(ratio(speed(v)))}" for v in wrote.versions)
    rounds = len(base.costs.rounds)
    lines.append(f"One text at a time, decoding runs at so many times the original's speed ({rounds} rounds): {paces}.")
    return lines


def _notes(wrote: Wrote) -> list[str]:
    costs = wrote.original.costs
    first = costs.rounds[0].reference
    return [
        f"{wrote.prompts} prompts, {len(wrote.settings)} settings, at most {wrote.steps} new tokens. Intervals are "
        "95 %, clustered by prompt, and not adjusted; the verdicts of claims are adjusted together (Holm, 5 %).",
        "Differences are of texts of one prompt, setting and seed, with weights decoded once as everything is scored. "
        "Likelier is not better by itself: a text in a loop is likely. Distinct-2 has no interval.",
        f"Speed is of a prompt of {first.prompt_tokens} tokens and {first.decode_tokens} more, one text at a time, "
        f"{costs.threads} thread{'s' * (costs.threads > 1)}, by the kernels that lowbit generate chooses here, version "
        "and original in turn; 16 bit runs in the dtype that is named. It says nothing of other machines or kernels, "
        "bitsandbytes' own among them.",
        "Peak is how far the process grew while it loaded the model and wrote; a dash where it had room from before.",
    ]


def _farthest(version: Version) -> str:
    """The temperature at which the next token differs most, and how much, in percent."""
    plain = {s: g for s, g in version.gaps.items() if s.top_k is None} or version.gaps
    setting = max(plain, key=lambda s: float(plain[s].total_variation.mean()))
    value = 100 * plain[setting].total_variation
    mean = paired_mean(value, np.arange(len(value)))
    return f"{' '.join(text.estimate(*mean[:3]))} % at T {setting.temperature:g}"


def _signed(i: Interval) -> str:
    return " ".join(text.estimate(*i[:3], signed=True))
