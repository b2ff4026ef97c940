"""A report as one HTML file that needs nothing else: no network, no server, and no JavaScript for its tables.

Everything that came from outside is escaped (``markup.plain``, or JSON with ``<`` spelled as an escape), and the
content security policy names the digests of the page's own two scripts: nothing else in the file can run, and
nothing can be loaded. While a study runs the same page may be served (``lowbit.report.watch``): it then also asks
its own server for what is new.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import NamedTuple

from lowbit.errors import StorageError
from lowbit.report import alert_section, panel_section, sections, task_section
from lowbit.report.charts import Chart, charts
from lowbit.report.markup import Html, join, plain, section
from lowbit.report.model import Report, StudyReport
from lowbit.report.panel_charts import chart


class Content(NamedTuple):
    """What of a page depends on the report: its title and byline in words, and what stands under them."""

    title: str
    byline: str
    main: Html


def write(report: StudyReport, path: Path) -> Path:
    """Writes the page to ``path`` under a temporary name, then renames it; returns ``path``.

    Raises StorageError where the folder cannot be written. Well under a second, but for the chart library, which
    is bundled once a process in a few seconds.
    """
    content = render(report)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise StorageError(
            f"the report could not be written: {e.strerror or e}",
            where=str(path),
            why="Nothing was left behind, and an older report there is untouched.",
            fix="free some space, or name a folder that you may write to",
        ) from e
    return path


def render(report: StudyReport) -> str:
    """The whole page; the same report gives the same text. About 0.9 MB of it is the chart library."""
    return whole(content(report))


def whole(content: Content, *, live: str = "") -> str:
    """A page around its content; a ``live`` one, of that version, asks its own server for news, and nobody else."""
    library, start = chart_library(), _resource("start.js")
    if live:
        start += _resource("live.js")
    return Template(_resource("template.html")).substitute(
        policy=policy(library, start, live=bool(live)),
        title=plain(content.title),
        byline=plain(content.byline),
        live=f'<section id="live" class="live" data-version="{plain(live)}" hidden></section>' if live else "",
        body=content.main,
        specs="",
        library=library,
        start=start,
    )


def policy(library: str, start: str, *, live: bool = False) -> str:
    """The content security policy of a page with these two scripts."""
    asks = "connect-src 'self'; " if live else ""
    return (
        f"default-src 'none'; script-src {_hash(library)} {_hash(start)}; {asks}"
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def content(report: StudyReport) -> Content:
    """From what was concluded to what it rests on: alerts, contents where there is much, panels, then the models.

    The same report gives the same markup.
    """
    several = len(report.reports) > 1
    drawn: list[Chart] = [chart(panel.key, figure) for panel in report.panels for figure in panel.figures]
    panels = [panel_section.panel(panel) for panel in report.panels]
    models = []
    for number, one in enumerate(report.reports):
        own = [c._replace(key=f"m{number}-{c.key}") if several else c for c in charts(one)]
        drawn += own
        models.append(_model(one, own, f"model-{number}", titled=several))
    byline = f"Study {report.name}, {report.created}."
    if len(report.reports) == 1:
        title, byline = report.reports[0].title, f"{byline} Reference: {report.reports[0].reference.label}."
    else:
        title = f"{report.name}: {len(report.reports)} models" if several else f"{report.name}: nothing scored yet"
    head = [alert_section.alerts(report), _contents(report)]
    main = join([part for part in (*head, *panels, *models, *map(_data, drawn)) if part], "\n")
    return Content(title, byline, main)


def _contents(report: StudyReport) -> Html:
    """Links to the panels and models of a page that has more than one model's report; nothing for that alone."""
    panels = [(f"panel-{panel.key}", panel.title) for panel in report.panels]
    models = [(f"model-{n}", one.title) for n, one in enumerate(report.reports)]
    links = [*panels, *models]
    if len(links) < 2:
        return Html("")
    items = [Html(f'<li><a href="#{plain(key)}">{plain(title)}</a></li>') for key, title in links]
    return Html(f'<nav class="contents" aria-label="Contents"><h2>Contents</h2><ol>{join(items)}</ol></nav>')


def _model(report: Report, drawn: list[Chart], key: str, *, titled: bool) -> Html:
    """All that stands in one model's report."""

    def figures(kind: str) -> Html:
        return sections.figures([c for c in drawn if kind in c.key])

    parts = [
        *([sections.overview(report)] if report.has_tokens else []),
        section("What it can still do", task_section.tasks(report)),
        section("Size against loss", figures("pareto-")),
        section("Where the loss is", figures("kl-"), sections.profiles(report)),
        section("Changed choices", sections.flips(report), key=f"{key}-flips", kind="flips"),
        section("How this was made", sections.provenance(report)),
    ]
    head = Html(f'<h1 class="model" id="{key}">{plain(report.title)}</h1>') if titled else Html(f'<a id="{key}"></a>')
    return join([head, *parts], "\n")


@lru_cache(maxsize=1)
def chart_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, bundled by the installed vl-convert (BSD-3-Clause)."""
    import vl_convert  # starts a JavaScript engine, so only where a page is written

    script: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _data(chart: Chart) -> Html:
    spec = json.dumps(chart.spec, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    safe = spec.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Html(f'<script type="application/json" data-chart="{plain(chart.key)}">{safe}</script>')


def _hash(script: str) -> str:
    """The script as a source of a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _resource(name: str) -> str:
    return files("lowbit.report").joinpath(name).read_text(encoding="utf-8")
