"""The head of the page: what got worse, what did not, what failed and what is missing."""

from __future__ import annotations

from lowbit.report import text
from lowbit.report.alerts import JUDGEMENTS, Change, Standing, lead, standings
from lowbit.report.markup import Html, cell, details, head, join, paragraph, plain, row, section, table
from lowbit.report.model import StudyReport
from lowbit.report.work import CellWork, Work

KEY = "alerts"
_TITLES = {"worse": "Worse", "better": "Better", "same": "Within the margin", "unclear": "Not told apart"}
_ROWS = 12
"""Versions in sight; the others are behind a line to open."""
_NAMED = 3


def alerts(study: StudyReport) -> Html:
    """Sentences, a table of the versions, and what failed; nothing where there is nothing to say."""
    found = standings(study)
    several = len(study.reports) > 1
    parts = [_lead(found), *_versions(found, several)] if found else []
    if not study.reports:
        parts.append(paragraph("Nothing is scored yet: every number is a difference from an original.", "nothing"))
    if study.work is not None:
        parts += _missing(study.work)
    return section("What changed, and what is missing", *parts, key=KEY)


def _lead(found: list[Standing]) -> Html:
    items = [Html(f'<li class="{kind}">{plain(words)}</li>') for kind, words in lead(found)]
    return Html(f'<ul class="tally">{join(items)}</ul>')


def _versions(found: list[Standing], several: bool) -> list[Html]:
    parts = [_table("alerts", found[:_ROWS], several)]
    if rest := found[_ROWS:]:
        parts.append(details(f"The {len(rest)} other versions", _table("more alerts", rest, several)))
    note = "Verdicts are after adjustment for all tests of a table; each column lists the largest changes first."
    return [*parts, paragraph(note)]


def _table(key: str, found: list[Standing], several: bool) -> Html:
    heads = [head("Version"), *([head("Model")] if several else []), *(head(_TITLES[j]) for j in JUDGEMENTS)]
    return table(key, heads, [_row(s, several) for s in found])


def _row(s: Standing, several: bool) -> Html:
    cells = [cell(s.candidate), *([cell(s.model)] if several else [])]
    return row([*cells, *(_cell(j, s.of(j)) for j in JUDGEMENTS)])


def _cell(judgement: str, changes: list[Change]) -> Html:
    if not changes:
        return cell(text.MISSING)
    told = judgement in ("worse", "better")
    shown = "; ".join(c.words if told else c.name for c in changes[:_NAMED]) + _more(changes)
    return cell(str(len(changes)), shown, kind=f"text {judgement}" if told else "text")


def _more(changes: list[Change]) -> str:
    return f"; and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""


def _missing(work: Work) -> list[Html]:
    """What failed, with its reason, and what is not done."""
    parts = []
    if broken := work.of("failed", "blocked"):
        heads = [head("Cell"), head("State"), head("Why")]
        parts += [Html("<h3>Failed</h3>"), table("failed", heads, [_failed(c) for c in broken])]
        parts.append(paragraph("lowbit study run tries failed cells again."))
    if left := work.of("running", "waiting"):
        listed = join([Html(f"<li>{plain(c.label)}{' (running)' * (c.status == 'running')}</li>") for c in left])
        parts.append(details(f"Not done: {len(left)} of {len(work.cells)} cells", Html(f"<ul>{listed}</ul>")))
    return parts


def _failed(c: CellWork) -> Html:
    why = " ".join(c.why.split())
    return row([cell(c.label), cell(c.status, kind="worse" if c.status == "failed" else ""), cell(why, kind="text")])
