"""Figures of panels as Vega-Lite, in the colours of the page."""

from __future__ import annotations

import math
from typing import Any

import altair as alt

from lowbit.report import text
from lowbit.report.charts import COLOURS, NAMED_LINES, SHAPES, Chart, Rows, layered
from lowbit.report.panel import Curves, Heat
from lowbit.report.scales import log_domain, log_ticks

_NAMED = 2 * NAMED_LINES
"""Series told apart: six colours with full marks, then the same six dashed with hollow ones; others are grey."""

_WRITTEN = 84
"""Squares in which the number is written, where no row has more than nine."""

_WIDTH = 400.0  # of a plot on the page, in pixels and about


def chart(panel: str, figure: Curves | Heat) -> Chart:
    """The figure of a panel; its element is named after both."""
    drawn, more = _curves(figure) if isinstance(figure, Curves) else _heat(figure)
    return Chart(f"{panel}-{figure.key}", figure.title, f"{figure.caption} {more}".strip(), drawn)


def _curves(figure: Curves) -> tuple[dict[str, Any], str]:
    rows: Rows = [
        {
            "series": text.safe(m.series), "x": m.x, "value": m.value,
            "low": m.low if math.isfinite(m.low) else m.value, "high": m.high if math.isfinite(m.high) else m.value,
            "shown": " ".join(text.estimate(m.value, m.low, m.high)), "note": text.safe(m.note),
        }
        for m in figure.marks
        if math.isfinite(m.value) and (m.value > 0 or not figure.log_y) and (m.x > 0 or not figure.log_x)
    ]  # fmt: skip
    names = list(dict.fromkeys(r["series"] for r in rows))
    cloud = not figure.lines and len(names) == len(rows) > NAMED_LINES  # a mark a series: names stand beside the marks
    named = names[:_NAMED]
    grey = len(names) - len(named)
    heights = [r[k] for r in rows for k in ("value", "low", "high")] + [v for _, v in figure.levels]
    across = [r["x"] for r in rows]
    if figure.diagonal:
        across = heights = [*across, *heights]
    x = alt.X(
        "x:Q", title=figure.x, scale=_scale(across, figure.log_x, 8), axis=_axis(across, figure.log_x, grid=False)
    )
    y_scale, y_axis = _scale(heights, figure.log_y, 4), _axis(heights, figure.log_y, grid=True)

    def y(field: str) -> alt.Y:
        return alt.Y(field, title=figure.y, scale=y_scale, axis=y_axis)

    width = max(map(len, named), default=0)
    legend = None if cloud else alt.Legend(columns=1 if width > 34 else 2, labelLimit=420, values=named)

    def by(channel: Any, first: list[Any], second: list[Any], other: Any) -> Any:
        """How series are told apart: one value for each of the first six, the second six, and all others."""
        values = [first[0]] * len(names) if cloud else [*first, *second, *[other] * grey][: len(names)]
        return channel("series:N", title=None, legend=legend, scale=alt.Scale(domain=names, range=values))

    stroke = by(alt.Stroke, COLOURS, COLOURS, "var(--faint)")
    fill = by(alt.Fill, COLOURS, ["var(--paper)"] * NAMED_LINES, "var(--faint)")
    shape = by(alt.Shape, SHAPES, SHAPES, SHAPES[0])
    dash = by(alt.StrokeDash, [[1, 0]] * NAMED_LINES, [[5, 3]] * NAMED_LINES, [1, 0])
    noted = [alt.Tooltip("note:N", title="at")] if any(r["note"] for r in rows) else []
    tooltip = [alt.Tooltip("series:N", title="series"), alt.Tooltip("shown:N", title="value"), *noted]
    base = alt.Chart(alt.NamedData("marks"))
    layers: list[alt.Chart] = []
    if figure.diagonal:
        ends = alt.InlineData(values=[{"x": v, "value": v} for v in (min(across), max(across))] if across else [])
        line = alt.Chart(ends).mark_line(strokeDash=[2, 3], stroke="var(--muted)", strokeWidth=1)
        layers.append(line.encode(x=x, y=y("value:Q")))
    for name, value in figure.levels:
        at = alt.Chart(alt.InlineData(values=[{"value": value, "name": text.safe(name)}])).encode(y=y("value:Q"))
        layers.append(at.mark_rule(strokeDash=[5, 3], stroke="var(--muted)", strokeWidth=1))
        word = at.mark_text(align="right", baseline="bottom", dx=-2, dy=-2, fontStyle="italic", fill="var(--muted)")
        layers.append(word.encode(x=alt.value("width"), text="name:N"))
    if not figure.steps:
        whisker = base.mark_rule(strokeWidth=1, opacity=0.55)
        layers.append(whisker.encode(x=x, y=y("low:Q"), y2="high:Q", stroke=stroke, tooltip=tooltip))
    if figure.lines:
        line = base.mark_line(strokeWidth=1.5, interpolate="step-after" if figure.steps else "linear")
        layers.append(line.encode(x=x, y=y("value:Q"), stroke=stroke, strokeDash=dash, tooltip=tooltip))
    if not figure.steps:
        points = base.mark_point(size=28, strokeWidth=1.3, opacity=1)
        layers.append(points.encode(x=x, y=y("value:Q"), stroke=stroke, fill=fill, shape=shape, tooltip=tooltip))
    if cloud:
        words = base.mark_text(align="left", dx=6, dy=-6, fill="var(--ink)", fontSize=10, limit=130)
        layers.append(words.encode(x=x, y=y("value:Q"), text="series:N"))
    return layered(layers, {"marks": rows}), f"Grey: the {grey} other series." if grey and not cloud else ""


def _heat(figure: Heat) -> tuple[dict[str, Any], str]:
    """Squares of one colour, the stronger the larger; a colour each for both signs where the map is diverging."""
    rows: Rows = [
        {"x": text.safe(s.x), "y": text.safe(s.y), "value": s.value, "shown": text.safe(s.shown),
         "number": text.number(s.value, signed=figure.diverging),
         "size": math.log(s.value) if figure.log else abs(s.value) if figure.diverging else s.value}
        for s in figure.squares
        if math.isfinite(s.value) and (s.value > 0 or not figure.log)
    ]  # fmt: skip
    xs, ys = (list(dict.fromkeys(r[k] for r in rows)) for k in ("x", "y"))
    written = len(rows) <= _WRITTEN and len(xs) <= 9
    sizes = [r["size"] for r in rows] or [0.0]
    low, high = (0.0 if figure.diverging else min(sizes)), max(sizes)
    strongest = 0.6 if written else 1.0  # numbers are to be read on it
    strength = alt.Scale(domain=[low, high if high > low else low + 1], range=[0.04, strongest])
    tooltip = [alt.Tooltip(f"{k}:N", title=t) for k, t in (("x", figure.x), ("y", figure.y), ("shown", figure.value))]
    x = alt.X("x:N", title=figure.x, sort=xs, scale=alt.Scale(domain=xs), axis=_under(xs))
    y_axis = alt.Axis(labelLimit=230, maxExtent=320, grid=False, ticks=False, domain=False)
    height = max(70, min(26 * len(ys) + 10, 560))
    named = figure.y if 7 * len(figure.y) < height else None  # a title longer than its axis would hang over
    y = alt.Y("y:N", title=named, sort=ys, scale=alt.Scale(domain=ys), axis=y_axis)
    signs = (("above", COLOURS[1]), ("below", COLOURS[0])) if figure.diverging else (("all", COLOURS[0]),)
    split = {"above": [r for r in rows if r["value"] > 0], "below": [r for r in rows if r["value"] <= 0], "all": rows}
    layers = []
    for name, colour in signs:
        squares = alt.Chart(alt.NamedData(name)).mark_rect(fill=colour, stroke="var(--line)")
        opacity = alt.FillOpacity("size:Q", scale=strength, legend=None)
        layers.append(squares.encode(x=x, y=y, fillOpacity=opacity, tooltip=tooltip))
        if written:
            words = alt.Chart(alt.NamedData(name)).mark_text(fill="var(--ink)", fontSize=11)
            layers.append(words.encode(x=x, y=y, text="number:N", tooltip=tooltip))
    spec = layered(layers, {name: split[name] for name, _ in signs})
    spec["height"] = height
    return spec, _key(figure, [r["value"] for r in rows])


def _key(figure: Heat, values: list[float]) -> str:
    """What the colours mean."""
    if not values:
        return ""
    if figure.diverging:
        most = text.number(max(map(abs, values)))
        return f"{figure.value}: orange above 0, blue below, full at {most} either way."
    kind = ", logarithmically" if figure.log else ""
    return f"{figure.value}: from {text.number(min(values))} (pale) to {text.number(max(values))} (full){kind}."


def _under(names: list[str]) -> alt.Axis:
    """The axis of columns: labels that are too wide stand slanted, numbers that are too many are thinned out."""
    wide = max(map(len, names), default=0) * 6.5 > _WIDTH / max(len(names), 1)
    if wide and not all(name.replace(".", "").replace("-", "").isdigit() for name in names):
        return alt.Axis(labelAngle=-35, labelLimit=150, labelAlign="right", grid=False, ticks=False, domain=False)
    return alt.Axis(
        labelAngle=0, labelLimit=110, labelOverlap=True, labelSeparation=5, grid=False, ticks=False, domain=False
    )


def _scale(values: list[float], log: bool, padding: int) -> alt.Scale:
    positive = [v for v in values if v > 0]
    if log and positive:
        low, high = log_domain(positive)
        return alt.Scale(type="log", domain=[low, high], nice=False, clamp=True)
    if not values:
        return alt.Scale()
    return alt.Scale(domain=[min(values), max(values)], zero=False, nice=False, padding=padding)


def _axis(values: list[float], log: bool, *, grid: bool) -> alt.Axis:
    spelling = "~s" if max(map(abs, values), default=0.0) >= 1e4 else "~r"  # never 1e+1
    positive = [v for v in values if v > 0]
    if log and positive:
        return alt.Axis(values=log_ticks(*log_domain(positive)), format=spelling, grid=grid)
    return alt.Axis(format=spelling, tickCount=6, grid=grid)
