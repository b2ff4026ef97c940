"""Panels on the page."""

from __future__ import annotations

from lowbit.report.markup import Html, cell, details, drawn, head, join, paragraph, plain, row, section, table
from lowbit.report.panel import Claim, Panel
from lowbit.report.panel_charts import chart
from lowbit.report.sections import figures
from lowbit.report.table import Table

_VERDICT_CLASSES = {"supported": "same", "contradicted": "worse"}


def panel(shown: Panel) -> Html:
    """Sentences, claims with their verdicts, figures, tables, notes."""
    listed = [Html(f"<li>{plain(line)}</li>") for line in shown.lead]
    charts = [chart(shown.key, figure) for figure in shown.figures]
    return section(
        shown.title,
        *([Html(f"<ul>{join(listed, chr(10))}</ul>")] if listed else []),
        *([_claims(shown)] if shown.claims else []),
        figures(charts),
        *(_titled(f"{shown.key} {t.title}", t.title, t.table, t.folded) for t in shown.tables),
        *(paragraph(line) for line in shown.notes),
        key=f"panel-{shown.key}",
    )


def _titled(name: str, title: str, shown: Table, folded: bool) -> Html:
    if folded:
        return details(title, drawn(name, shown))
    return join([Html(f"<h3>{plain(title)}</h3>"), drawn(name, shown)])


def _claims(shown: Panel) -> Html:
    heads = [head("Claim", "source"), head("Found here", "95 % CI"), head("Verdict")]
    return table(f"{shown.key} claims", heads, [_claim(c) for c in shown.claims])


def _claim(c: Claim) -> Html:
    verdict = cell(c.verdict, kind=_VERDICT_CLASSES.get(c.verdict, ""))
    return row([cell(c.claim, c.source, kind="text"), cell(c.found, kind="text"), verdict])
