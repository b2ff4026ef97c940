"""What each linear would cost in each format, as one HTML page: a map of kinds and blocks, and the numbers.

Works on the saved artefact (:mod:`lowbit.pipeline.sensitivity` describes its fields) and so needs no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import altair as alt

from lowbit.errors import StorageError
from lowbit.report import page, sections, text
from lowbit.report.charts import _FONT, Chart, Rows
from lowbit.report.markup import cell, head, paragraph, plain, row, section, table
from lowbit.report.scales import log_domain

_PATH = re.compile(r"^.*?\.(\d+)\.(.+)$")


def by_kind(sensitivity: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Kind of linear -> format -> predicted loss, summed over blocks (and experts), in the order of a block."""
    found: dict[str, dict[str, float]] = {}
    for site in sensitivity["sites"]:
        losses = found.setdefault(_place(site["name"])[1], dict.fromkeys(sensitivity["formats"], 0.0))
        for fmt, loss in site["loss"].items():
            losses[fmt] += loss
    return found


def write(sensitivity: Mapping[str, Any], path: Path) -> Path:
    """Writes the page under a temporary name, then renames it; raises StorageError where that cannot be."""
    content = render(sensitivity)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(content, encoding="utf-8", newline="\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"the page could not be written: {error.strerror or error}", where=str(path)) from error
    return path


def render(sensitivity: Mapping[str, Any]) -> str:
    """The whole page; it loads nothing and runs nothing but its own two scripts."""
    drawn = [heat_map(sensitivity), bars(sensitivity)]
    library, start = page.chart_library(), page._resource("start.js")
    formats = sensitivity["formats"]
    numbers = table(
        "sensitivity", [head("Linears"), *(head(fmt, "nat a token", numeric=True) for fmt in formats)],
        [
            row([cell(kind, kind="text"), *(cell(text.number(losses[fmt]), kind="num") for fmt in formats)])
            for kind, losses in by_kind(sensitivity).items()
        ],
    )  # fmt: skip
    how = (
        f"Predicted on {sensitivity['held']} of {sensitivity['windows']} windows of {sensitivity['length']} tokens of "
        f"{sensitivity['text']}, with codes by {sensitivity['encoder']}: half the Fisher information of each output "
        "times its squared error. Predictions add up while they are small; at 2 bits they rank."
    )
    return Template(page._resource("template.html")).substitute(
        policy=page.policy(library, start),
        title=plain(f"Sensitivity of {sensitivity['model']}"),
        byline=plain(f"Model {sensitivity['model_digest'][:12]}, text {sensitivity['text_digest'][:12]}."),
        live="", body="\n".join([section("Predicted loss", paragraph(how), sections.figures(drawn)),
                        section("The numbers", numbers)]),
        specs="\n".join(page._data(chart) for chart in drawn), library=library, start=start,
    )  # fmt: skip


def heat_map(sensitivity: Mapping[str, Any]) -> Chart:
    """Kind of linear by block; the darker, the larger the loss in the middle format, logarithmically."""
    fmt = _shown(sensitivity)
    sums: dict[tuple[int, str], float] = {}
    for site in sensitivity["sites"]:
        place = _place(site["name"])
        sums[place] = sums.get(place, 0.0) + site["loss"][fmt]
    low, high = log_domain(list(sums.values()))
    rows: Rows = [
        {"block": block, "kind": text.safe(kind), "loss": max(loss, low), "shown": text.number(loss)}
        for (block, kind), loss in sums.items()
    ]
    shade = alt.Scale(type="log", domain=[low, high], range=[0.06, 1.0], clamp=True)
    chart = alt.Chart(alt.NamedData("cells")).mark_rect(fill="var(--c1)", stroke="var(--paper)").encode(
        x=alt.X("block:O", title="Block (0 is next to the embedding)", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("kind:N", title=None, sort=list(by_kind(sensitivity)), axis=alt.Axis(labelLimit=180)),
        fillOpacity=alt.FillOpacity("loss:Q", scale=shade, legend=None),
        tooltip=[alt.Tooltip(f"{f}:N", title=t) for f, t in (("kind", "linear"), ("block", "block"), ("shown", "KL"))],
    )  # fmt: skip
    caption = f"Predicted KL (nat a token) of {fmt}, from {text.number(low)} (pale) to {text.number(high)} (full)."
    return Chart("sensitivity-map", f"Where {fmt} hurts", caption, _spec(chart, {"cells": rows}))


def bars(sensitivity: Mapping[str, Any]) -> Chart:
    """The same loss by kind of linear, summed over blocks."""
    fmt = _shown(sensitivity)
    rows: Rows = [
        {"kind": text.safe(kind), "loss": losses[fmt], "shown": text.number(losses[fmt])}
        for kind, losses in by_kind(sensitivity).items()
    ]
    chart = alt.Chart(alt.NamedData("kinds")).mark_bar(fill="var(--c1)").encode(
        x=alt.X("loss:Q", title="Predicted KL (nat a token)", axis=alt.Axis(tickCount=5, format="~g")),
        y=alt.Y("kind:N", title=None, sort=[r["kind"] for r in rows], axis=alt.Axis(labelLimit=180)),
        tooltip=[alt.Tooltip("kind:N", title="linear"), alt.Tooltip("shown:N", title="KL")],
    )  # fmt: skip
    caption = f"Predicted KL of {fmt}, summed over all blocks."
    return Chart("sensitivity-kinds", "By kind of linear", caption, _spec(chart, {"kinds": rows}))


def _shown(sensitivity: Mapping[str, Any]) -> str:
    """The format that the charts show: the middle one."""
    formats: list[str] = sensitivity["formats"]
    return formats[(len(formats) - 1) // 2]


def _place(site: str) -> tuple[int, str]:
    """Block and kind of a site; experts of one layer are one kind."""
    match = _PATH.match(site)
    block, kind = (int(match[1]), match[2]) if match else (0, site)
    return block, re.sub(r"\.experts\.\d+\.", ".experts.*.", f".{kind}")[1:]


def _spec(chart: alt.Chart, datasets: dict[str, Rows]) -> dict[str, Any]:
    axis = alt.AxisConfig(
        labelColor="var(--ink)", titleColor="var(--ink)", titleFontWeight="normal", gridColor="var(--line)",
        domainColor="var(--muted)", tickColor="var(--muted)",
    )  # fmt: skip
    chart = chart.properties(width="container", height=300, background="transparent")
    spec: dict[str, Any] = chart.configure(font=_FONT, axis=axis, view=alt.ViewConfig(stroke=None)).to_dict()
    return {**spec, "datasets": datasets}
