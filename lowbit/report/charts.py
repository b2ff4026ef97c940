"""The report's charts as Vega-Lite, with every colour a CSS variable.

Drawn as SVG, a mark filled with ``var(--c1)`` follows the page between light, dark and paper without being
drawn again. The page supplies the variables (see ``template.html``) and the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import altair as alt

from lowbit.report import text
from lowbit.report.model import Report
from lowbit.report.pareto import Point, Standing, standings
from lowbit.report.scales import log_domain, log_ticks, symlog, symlog_constant, symlog_domain, symlog_ticks
from lowbit.report.summary import DELTA_LOG_PPL, KL, by_size, points

NAMED_LINES = 6
"""As many lines as colours that colour-blind readers tell apart (Okabe and Ito); the others are drawn grey."""

COLOURS = [f"var(--c{i})" for i in range(1, NAMED_LINES + 1)]
SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross"]
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Rows = list[dict[str, Any]]
"""Data of a chart: one JSON object a mark."""


class Chart(NamedTuple):
    """One figure: ``key`` names its element, ``caption`` says what is seen, ``spec`` is Vega-Lite as JSON."""

    key: str
    title: str
    caption: str
    spec: dict[str, Any]


class _Axis(NamedTuple):
    """A vertical axis: how to encode a field on it, and where a value lies (0 bottom, 1 top)."""

    encode: Callable[[str], alt.Y]
    height: Callable[[float], float]


def charts(report: Report) -> list[Chart]:
    """Every chart that the report has data for, in the order of the page."""
    made = (pareto_kl(report), pareto_log_ppl(report), by_block(report), by_position(report))
    return [chart for chart in made if chart is not None]


def pareto_kl(report: Report) -> Chart | None:
    """KL, logarithmic, against stored bytes; None where no candidate has it."""
    found = points(report.candidates, KL)
    if not found:
        return None
    axis = _log_axis([x for p in found for x in (p.value, p.high)] + _floor(report))
    caption = (
        "Lower and further left is better; bars are 95 % intervals. Size is measured: every stored byte. "
        f"The dotted vertical line is the reference ({text.size(report.reference.bytes_total)})."
    )
    if zero := [p.label for p in found if p.value <= 0]:
        caption += f" KL is 0, drawn at the lower edge: {', '.join(zero)}."
    levels = [layer for x in _floor(report) for layer in _level(x, "noise floor", axis)]
    return Chart("pareto-kl", "KL against size", caption, _pareto(report, found, axis, levels))


def pareto_log_ppl(report: Report) -> Chart | None:
    """Delta log-perplexity, symmetric-logarithmic, against stored bytes; None where no candidate has it."""
    found = points(report.candidates, DELTA_LOG_PPL)
    if not found:
        return None
    constant = symlog_constant([p.value for p in found])
    low, high = symlog_domain([x for p in found for x in (p.value, p.low, p.high)], constant)
    encode = partial(
        alt.Y,
        title="Δ log-perplexity (nat a token)",
        scale=alt.Scale(type="symlog", constant=constant, domain=[low, high], nice=False),
        axis=alt.Axis(values=symlog_ticks(low, high, constant), format="~g"),
    )
    bottom, top = symlog(low, constant), symlog(high, constant)
    axis = _Axis(encode, lambda v: (symlog(v, constant) - bottom) / (top - bottom))
    caption = (
        f"Paired difference from the reference, which is at 0. The axis is linear within ±{constant:g} "
        "and logarithmic beyond. Bars are 95 % intervals."
    )
    spec = _pareto(report, found, axis, _level(0.0, "reference", axis))
    return Chart("pareto-ppl", "Log-perplexity against size", caption, spec)


def by_block(report: Report) -> Chart | None:
    """KL of the model in which one block alone is quantized; None where it was not measured."""
    rows = [
        {"x": b.block, "where": f"block {b.block}", **_estimate(c.label, b.value, b.low, b.high)}
        for c in by_size(report)
        for b in c.kl_by_block
    ]
    x = alt.X(
        "x:Q",
        title="Block (0 is next to the embedding)",
        scale=alt.Scale(nice=False),
        axis=alt.Axis(tickMinStep=1, format="d"),
    )
    caption = "Each point is a model in which only this block is quantized. Bars are 95 % intervals."
    return Chart("kl-block", "KL by block", caption, _profile(report, rows, x)) if rows else None


def by_position(report: Report) -> Chart | None:
    """KL by position in the window, in bands; None where it was not measured."""
    rows = [
        {
            "x": b.low_pos,
            "where": f"positions {b.low_pos} to {b.high_pos - 1}, {b.n:,} tokens",
            **_estimate(c.label, b.value, b.low, b.high),
        }
        for c in by_size(report)
        for b in c.kl_by_position
    ]
    x = alt.X(
        "x:O", title="Position in the window (first of each band)", axis=alt.Axis(labelOverlap=True, labelAngle=0)
    )
    caption = "Mean over the tokens of a band of positions: does the loss grow with context? Bars are 95 % intervals."
    return Chart("kl-position", "KL by position", caption, _profile(report, rows, x)) if rows else None


def named(report: Report) -> list[str]:
    """Labels of the candidates whose lines get a colour: of the KL front, evenly over size, then of the others."""
    place = standings(points(report.candidates, KL))
    labels = [c.label for c in by_size(report)]
    front = [label for label in labels if place.get(label) is Standing.FRONT]
    if len(front) > NAMED_LINES:
        front = [front[round(i * (len(front) - 1) / (NAMED_LINES - 1))] for i in range(NAMED_LINES)]
    chosen = [*front, *(label for label in labels if label not in front)][:NAMED_LINES]
    return [label for label in labels if label in chosen]


def _pareto(report: Report, found: list[Point], axis: _Axis, levels: Sequence[alt.Chart]) -> dict[str, Any]:
    place = standings(found)
    unit, factor = text.size_unit(report.reference.bytes_total)
    recipes = {c.label: c.recipe for c in report.candidates}
    rows: Rows = [
        {
            "size": p.size / factor,
            "bytes": text.size(p.size),
            "recipe": text.safe(recipes[p.label]),
            "standing": str(place[p.label]),
            **_estimate(p.label, p.value, p.low, p.high),
        }
        for p in found
    ]
    front = sorted((r for r in rows if r["standing"] == Standing.FRONT), key=lambda r: float(r["size"]))
    whole = report.reference.bytes_total / factor
    sizes = [whole, *(r["size"] for r in rows)]
    low, high = min(sizes), max(sizes)
    margin = 0.06 * (high - low or high)
    x = alt.X(
        "size:Q",
        title=f"Size on disk ({unit})",
        scale=alt.Scale(domain=[max(0.0, low - margin), high + margin], nice=False),
        axis=alt.Axis(tickCount=6, grid=False),
    )
    kinds = [str(s) for s in Standing]
    colour = alt.Color("standing:N", title=None, scale=alt.Scale(domain=kinds, range=[*COLOURS[:2], "var(--muted)"]))
    shape = alt.Shape("standing:N", title=None, scale=alt.Scale(domain=kinds, range=SHAPES[:3]))
    tooltip = _tooltip(label="candidate", recipe="recipe", bytes="size", shown="value", standing="standing")
    cloud, y = alt.Chart(alt.NamedData("points")), axis.encode
    layers = [
        alt.Chart(_values({"size": whole})).mark_rule(strokeDash=[1, 3], stroke="var(--muted)").encode(x=x),
        *levels,
        alt.Chart(alt.NamedData("front")).mark_line(stroke=COLOURS[0], strokeWidth=1.2).encode(x=x, y=y("value:Q")),
        cloud.mark_rule(strokeWidth=1.2).encode(x=x, y=y("low:Q"), y2="high:Q", color=colour, tooltip=tooltip),
        cloud.mark_point(size=42, filled=True, opacity=1).encode(
            x=x, y=y("value:Q"), color=colour, shape=shape, tooltip=tooltip
        ),
        alt.Chart(alt.NamedData("names"))
        .mark_text(align="left", dx=7, dy=-8, fill="var(--ink)", limit=120)
        .encode(x=x, y=y("value:Q"), text="label:N"),
    ]
    names = _spaced(front, lambda r: ((r["size"] - low) / (high - low or 1.0), axis.height(r["value"])))
    return layered(layers, {"points": rows, "front": front, "names": names})


def _profile(report: Report, rows: Rows, x: alt.X) -> dict[str, Any]:
    """Lines of KL over something; a named candidate has colour, marks and intervals, the others are grey lines."""
    chosen = named(report)
    axis = _log_axis([r["value"] for r in rows] + [r["high"] for r in rows if r["label"] in chosen] + _floor(report))
    labels = [text.safe(label) for label in chosen]
    here = [r for r in rows if r["label"] in labels]
    others = [r for r in rows if r["label"] not in labels]
    legend = alt.Legend(columns=2, labelLimit=150)
    colour = alt.Color(
        "label:N", title=None, legend=legend, scale=alt.Scale(domain=labels, range=COLOURS[: len(labels)])
    )
    shape = alt.Shape("label:N", title=None, legend=legend, scale=alt.Scale(domain=labels, range=SHAPES[: len(labels)]))
    tooltip = _tooltip(label="candidate", where="where", shown="KL (nat)")
    y, main = axis.encode, alt.Chart(alt.NamedData("named"))
    layers = [
        alt.Chart(alt.NamedData("others"))
        .mark_line(stroke="var(--faint)", strokeWidth=1)
        .encode(x=x, y=y("value:Q"), detail="label:N", tooltip=tooltip),
        *(layer for value in _floor(report) for layer in _level(value, "noise floor", axis)),
        main.mark_rule(strokeWidth=1, opacity=0.7).encode(x=x, y=y("low:Q"), y2="high:Q", color=colour),
        main.mark_line(strokeWidth=1.4).encode(x=x, y=y("value:Q"), color=colour),
        main.mark_point(size=22, filled=True, opacity=1).encode(
            x=x, y=y("value:Q"), color=colour, shape=shape, tooltip=tooltip
        ),
    ]
    return layered(layers if others else layers[1:], {"named": here, **({"others": others} if others else {})})


def _log_axis(values: Sequence[float]) -> _Axis:
    low, high = log_domain(values)
    encode = partial(
        alt.Y,
        title="KL from the reference (nat a token)",
        scale=alt.Scale(type="log", domain=[low, high], nice=False, clamp=True),
        axis=alt.Axis(values=log_ticks(low, high), format="~g"),
    )
    return _Axis(encode, lambda v: math.log(max(v, low) / low) / math.log(high / low))


def _level(value: float, name: str, axis: _Axis) -> list[alt.Chart]:
    """A dashed horizontal line and its name at the right end."""
    base = alt.Chart(_values({"value": value, "name": name})).encode(y=axis.encode("value:Q"))
    rule = base.mark_rule(strokeDash=[5, 3], stroke="var(--muted)", strokeWidth=1)
    word = base.mark_text(align="right", baseline="bottom", dx=-2, dy=-2, fontStyle="italic", fill="var(--muted)")
    return [rule, word.encode(x=alt.value("width"), text="name:N")]


def _spaced(rows: Rows, place: Callable[[dict[str, Any]], tuple[float, float]]) -> Rows:
    """The rows whose names fit beside those already taken; ``place`` gives (x, y) in [0, 1] of the plot."""
    kept: Rows = []
    for row in rows:
        x, y = place(row)
        clear = all(abs(x - u) > 0.28 or abs(y - v) > 0.06 for u, v in map(place, kept))
        if clear and x < 0.8:  # further right a name would leave the plot
            kept.append(row)
    return kept


def _floor(report: Report) -> list[float]:
    return [report.noise_floor] if report.noise_floor and report.noise_floor > 0 else []


def _estimate(label: str, value: float, low: float, high: float) -> dict[str, Any]:
    known = math.isfinite(low) and math.isfinite(high)
    shown = " ".join(text.estimate(value, low, high))
    return {
        "label": text.safe(label),
        "value": value,
        "low": low if known else value,
        "high": high if known else value,
        "shown": shown,
    }


def _values(row: dict[str, Any]) -> alt.InlineData:
    return alt.InlineData(values=[row])


def _tooltip(**titles: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{field}:N", title=title) for field, title in titles.items()]


def layered(layers: Sequence[alt.Chart], datasets: dict[str, Rows]) -> dict[str, Any]:
    """Layers over named data as one chart of the page."""
    chart = alt.layer(*layers).properties(width="container", height=300, background="transparent")
    chart = chart.configure(
        font=_FONT,
        axis=alt.AxisConfig(
            labelColor="var(--ink)",
            titleColor="var(--ink)",
            titleFontWeight="normal",
            labelFontSize=11,
            titleFontSize=12,
            gridColor="var(--line)",
            domainColor="var(--muted)",
            tickColor="var(--muted)",
        ),
        legend=alt.LegendConfig(
            orient="bottom", labelColor="var(--ink)", labelFontSize=11, symbolSize=50, symbolOpacity=1
        ),
        view=alt.ViewConfig(stroke=None),
        text=alt.MarkConfig(fontSize=11),
    )
    spec: dict[str, Any] = chart.to_dict()
    return {**spec, "datasets": {**spec.get("datasets", {}), **datasets}}
