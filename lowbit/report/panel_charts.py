"""Figures of panels as Vega-Lite, in the colours of the page."""

from __future__ import annotations

import math
from typing import Any

import altair as alt

from lowbit.report import text
from lowbit.report.charts import COLOURS, NAMED_LINES, SHAPES, Chart, Rows, layered
from lowbit.report.panel import Curves, Heat
from lowbit.report.scales import log_domain, log_ticks


def chart(panel: str, figure: Curves | Heat) -> Chart:
    """The figure of a panel; its element is named after both."""
    drawn = _curves(figure) if isinstance(figure, Curves) else _heat(figure)
    return Chart(f"{panel}-{figure.key}", figure.title, figure.caption, drawn)


def _curves(figure: Curves) -> dict[str, Any]:
    names = list(dict.fromkeys(text.safe(m.series) for m in figure.marks))
    coloured = names[:NAMED_LINES]
    rows: Rows = [
        {
            "series": text.safe(m.series), "x": m.x, "value": m.value,
            "low": m.low if math.isfinite(m.low) else m.value, "high": m.high if math.isfinite(m.high) else m.value,
            "shown": " ".join(text.estimate(m.value, m.low, m.high)), "note": text.safe(m.note),
        }
        for m in figure.marks
        if math.isfinite(m.value) and (m.value > 0 or not figure.log_y)
    ]  # fmt: skip
    x = alt.X("x:Q", title=figure.x, scale=_scale([r["x"] for r in rows], figure.log_x), axis=_axis(rows, "x", figure))
    heights = [r[k] for r in rows for k in ("value", "low", "high")] + [v for _, v in figure.levels]
    y_scale = _scale([v for v in heights if v > 0 or not figure.log_y], figure.log_y)

    def y(field: str) -> alt.Y:
        return alt.Y(field, title=figure.y, scale=y_scale, axis=_axis(rows, "value", figure))

    legend = alt.Legend(columns=2, labelLimit=220)
    colours = COLOURS[: len(coloured)] + ["var(--faint)"] * (len(names) - len(coloured))
    colour = alt.Color("series:N", title=None, legend=legend, scale=alt.Scale(domain=names, range=colours))
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(names))]
    shape = alt.Shape("series:N", title=None, legend=legend, scale=alt.Scale(domain=names, range=shapes))
    noted = [alt.Tooltip("note:N", title="at")] if any(r["note"] for r in rows) else []
    tooltip = [alt.Tooltip("series:N", title="series"), alt.Tooltip("shown:N", title="value"), *noted]
    base = alt.Chart(alt.NamedData("marks"))
    layers: list[alt.Chart] = []
    if figure.diagonal:
        ends = alt.InlineData(values=[{"x": v, "value": v} for v in _ends(rows)])
        layers.append(
            alt.Chart(ends)
            .mark_line(strokeDash=[2, 3], stroke="var(--muted)", strokeWidth=1)
            .encode(x=x, y=y("value:Q"))
        )
    for name, value in figure.levels:
        at = alt.Chart(alt.InlineData(values=[{"value": value, "name": name}])).encode(y=y("value:Q"))
        layers.append(at.mark_rule(strokeDash=[5, 3], stroke="var(--muted)", strokeWidth=1))
        word = at.mark_text(align="right", baseline="bottom", dx=-2, dy=-2, fontStyle="italic", fill="var(--muted)")
        layers.append(word.encode(x=alt.value("width"), text="name:N"))
    if not figure.steps:
        layers.append(base.mark_rule(strokeWidth=1, opacity=0.7).encode(x=x, y=y("low:Q"), y2="high:Q", color=colour))
    if figure.lines:
        line = base.mark_line(strokeWidth=1.4, interpolate="step-after" if figure.steps else "linear")
        layers.append(line.encode(x=x, y=y("value:Q"), color=colour, tooltip=tooltip))
    if not figure.steps:
        points = base.mark_point(size=26, filled=True, opacity=1)
        layers.append(points.encode(x=x, y=y("value:Q"), color=colour, shape=shape, tooltip=tooltip))
    return layered(layers, {"marks": rows})


def _heat(figure: Heat) -> dict[str, Any]:
    """Squares of one colour, the stronger the larger; a colour each for both signs where the map is diverging."""
    rows: Rows = [
        {"x": text.safe(s.x), "y": text.safe(s.y), "value": s.value, "shown": text.safe(s.shown),
         "size": math.log(s.value) if figure.log else abs(s.value) if figure.diverging else s.value}
        for s in figure.squares
        if math.isfinite(s.value) and (s.value > 0 or not figure.log)
    ]  # fmt: skip
    xs, ys = (list(dict.fromkeys(r[k] for r in rows)) for k in ("x", "y"))
    sizes = [r["size"] for r in rows] or [0.0]
    low, high = (0.0 if figure.diverging else min(sizes)), max(sizes)
    strength = alt.Scale(domain=[low, high if high > low else low + 1], range=[0.04, 1.0])
    tooltip = [alt.Tooltip(f"{k}:N", title=t) for k, t in (("x", figure.x), ("y", figure.y), ("shown", figure.value))]
    layers = []
    for name, colour in (("above", COLOURS[1]), ("below", COLOURS[0])) if figure.diverging else (("all", COLOURS[0]),):
        layers.append(
            alt.Chart(alt.NamedData(name))
            .mark_rect(fill=colour, stroke="var(--line)")
            .encode(
                x=alt.X("x:N", title=figure.x, sort=xs, scale=alt.Scale(domain=xs), axis=_names(0, 90)),
                y=alt.Y("y:N", title=figure.y, sort=ys, scale=alt.Scale(domain=ys), axis=_names(0, 200)),
                fillOpacity=alt.FillOpacity("size:Q", scale=strength, legend=None),
                tooltip=tooltip,
            )
        )
    split = {"above": [r for r in rows if r["value"] > 0], "below": [r for r in rows if r["value"] <= 0], "all": rows}
    return layered(layers, {name: split[name] for name in (("above", "below") if figure.diverging else ("all",))})


def _names(angle: int, limit: int) -> alt.Axis:
    return alt.Axis(labelAngle=angle, labelLimit=limit, labelOverlap=angle == 0, grid=False)


def _scale(values: list[float], log: bool) -> alt.Scale:
    if log and values:
        low, high = log_domain(values)
        return alt.Scale(type="log", domain=[low, high], nice=False, clamp=True)
    return alt.Scale(zero=False, nice=True)


def _axis(rows: Rows, field: str, figure: Curves) -> alt.Axis:
    log = figure.log_x if field == "x" else figure.log_y
    values = [r[field] for r in rows]
    if log and values:
        return alt.Axis(values=log_ticks(*log_domain(values)), format="~g", grid=field != "x")
    return alt.Axis(format="~g", tickCount=6, grid=field != "x")


def _ends(rows: Rows) -> tuple[float, float]:
    everything = [r[k] for r in rows for k in ("x", "value")] or [0.0, 1.0]
    return min(everything), max(everything)
