"""The sections of the page, in their order, each a function from the report to markup."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.report import text
from lowbit.report.charts import Chart
from lowbit.report.markup import Html, cell, details, head, join, paragraph, plain, row, section, table
from lowbit.report.model import Candidate, FlipRow, Report
from lowbit.report.pareto import Standing, standings
from lowbit.report.summary import KL, by_size, flip_counts, main_table, notes, points, sentence

MAX_FLIPS = 12
"""Flips listed a candidate, the most surprising first; the counts are over all of them."""

_MAX_SENTENCES = 8
_CONTEXT_CHARACTERS = 120
_VERDICT_CLASSES = frozenset({"worse", "better", "same"})


def overview(report: Report) -> Html:
    """One sentence a candidate, the main table, and what qualifies it."""
    shown = main_table(report)
    heads = [head(c.title, c.unit, numeric=c.numeric) for c in shown.columns]
    rows = []
    for line in shown.rows:
        *numbers, verdict = line.cells
        kinds = ["num" if c.numeric else "" for c in shown.columns]
        cells = [cell(*c, kind=kind) for c, kind in zip(numbers, kinds, strict=False)]
        cells.append(cell(*verdict, kind=line.verdict if line.verdict in _VERDICT_CLASSES else ""))
        rows.append(row(cells, "reference" if line.is_reference else ""))
    content = join(
        [
            _sentences(report),
            table("overview", heads, rows, wide=True),
            *(paragraph(line) for line in notes(report)),
            _findings(report),
        ],
        "\n",
    )
    return section("Every version beside the original", content)


def figures(drawn: Sequence[Chart]) -> Html:
    """Figures side by side where there is room."""
    each = [
        Html(
            f'<figure><h3>{plain(c.title)}</h3><div class="chart" id="{plain(c.key)}"{_room(c)}></div>'
            f"<figcaption>{plain(c.caption)}</figcaption></figure>"
        )
        for c in drawn
    ]
    return Html(f'<div class="figures">{join(each)}</div>') if each else Html("")


def _room(c: Chart) -> str:
    """The height that a chart will have, so that the page does not jump when it is drawn."""
    return f' style="min-height:{c.spec.get("height", 300) + 52}px"'


def profiles(report: Report) -> Html:
    """The numbers behind the two profile charts, one row a candidate."""
    blocks = {c.label: {f"block {b.block}": (b.value, b.low, b.high) for b in c.kl_by_block} for c in by_size(report)}
    bands = {
        c.label: {f"{b.low_pos}–{b.high_pos - 1}": (b.value, b.low, b.high) for b in c.kl_by_position}
        for c in by_size(report)
    }
    made = (("KL by block", "kl-by-block", blocks), ("KL by position", "kl-by-position", bands))
    return join(
        (
            details(f"{title}: the numbers (nat, 95 % CI)", _matrix(key, rows))
            for title, key, rows in made
            if any(rows.values())
        ),
        "\n",
    )


def flips(report: Report) -> Html:
    """Counts of changed first choices, then for each candidate the ones that the reference was surest of."""
    if not any(c.flips or flip_counts(c) != text.MISSING for c in report.candidates):
        return Html("")
    heads = [
        head("Candidate"),
        head("Flips", "lost/gained/other", numeric=True),
        head("Largest margin lost", numeric=True),
    ]
    counts = [
        row(
            [
                cell(c.label),
                cell(flip_counts(c), kind="num"),
                cell(text.number(max((f.margin_ref for f in c.flips if f.kind == "lost"), default=None)), kind="num"),
            ]
        )
        for c in by_size(report)
    ]
    listed = [c for c in by_size(report) if c.flips]
    return join(
        [
            paragraph(
                "Tokens whose most likely choice changed. Lost: only the reference was right; gained: only the "
                "candidate; other: neither. The margin is the reference's probability of its first choice less that "
                "of its second: a flip at a large margin is damage, one near 0 a coin toss."
            ),
            table("flip-counts", heads, counts),
            *(details(_flip_title(c), _flip_table(c), is_open=c is listed[0]) for c in listed),
        ],
        "\n",
    )


def provenance(report: Report) -> Html:
    """Command, scoring protocol, configuration, cost and identity: what is needed to repeat it."""
    p, env = report.protocol, report.environment
    scored = (
        ("text", p.text),
        ("text digest", p.digest),
        ("windows", f"{p.windows:,} of {p.length:,} tokens"),
        ("tokens scored", f"{p.tokens:,} in {p.clusters:,} clusters"),
    )
    protocol = (
        *(scored if report.has_tokens else ()),
        ("dtype", p.dtype),
        ("multiplicity rule", report.multiplicity_rule),
    )
    heads = [
        head("Version"),
        head("Recipe"),
        head("Time to make", numeric=True),
        head("Peak memory", numeric=True),
        head("Stored bytes", numeric=True),
        head("Digest (sha256)"),
    ]
    made = [
        row(
            [
                cell(c.label),
                cell(c.recipe),
                cell(text.duration(c.seconds) if not c.is_reference else text.MISSING, kind="num"),
                cell(text.size(c.peak_bytes) if not c.is_reference else text.MISSING, kind="num"),
                cell(f"{c.bytes_total:,}", kind="num"),
                cell(c.digest, kind="mono"),
            ],
            "reference" if c.is_reference else "",
        )
        for c in (report.reference, *by_size(report))
    ]
    return join(
        [
            Html(f"<pre><code>{plain(report.command)}</code></pre>"),
            _pairs("Scoring protocol", "protocol", protocol),
            Html("<h3>Versions of the model</h3>"),
            table("versions", heads, made),
            _pairs("Configuration", "configuration", report.configuration),
            _pairs("Digests", "digests", report.digests),
            _pairs("Environment", "environment", (("machine", env.machine), *env.versions)),
        ],
        "\n",
    )


def _sentences(report: Report) -> Html:
    """Candidates on the KL front first; beyond a handful the others fold away."""
    place = standings(points(report.candidates, KL))
    ordered = sorted(by_size(report), key=lambda c: place.get(c.label) is not Standing.FRONT)
    front = sum(place.get(c.label) is Standing.FRONT for c in ordered)
    first = len(ordered) if len(ordered) <= _MAX_SENTENCES else min(max(front, 1), _MAX_SENTENCES)
    items = [
        Html(f'<li data-about="{plain(c.label)}"><strong>{plain(c.label)}</strong>: {plain(sentence(report, c))}</li>')
        for c in ordered
    ]
    shown = Html(f"<ul>{join(items[:first], chr(10))}</ul>")
    rest = Html(f"<ul>{join(items[first:], chr(10))}</ul>")
    return (
        join([shown, details(f"The {len(items) - first} other candidates in a sentence each", rest)])
        if items[first:]
        else shown
    )


def _findings(report: Report) -> Html:
    titles = ("n", "Clusters", "p", "p adjusted")
    heads = [
        head("Candidate"),
        head("Metric"),
        head("Value", "95 % CI", numeric=True),
        *(head(t, numeric=True) for t in titles),
        head("Verdict"),
        head("Note"),
    ]
    rows = [
        row(
            [
                cell(c.label),
                cell(f.metric.replace("_", " ")),
                cell(f"{value} {f.unit}", interval, kind="num"),
                *(
                    cell(x, kind="num")
                    for x in (f"{f.n:,}", f"{f.clusters:,}", text.p_value(f.p), text.p_value(f.p_adjusted))
                ),
                cell(f.verdict),
                cell(f.note, kind="text"),
            ]
        )
        for c in by_size(report)
        for f in c.findings
        for value, interval in [text.estimate(f.value, f.low, f.high)]
    ]
    return (
        details(f"All {len(rows)} findings with n, clusters and p values", table("findings", heads, rows))
        if rows
        else Html("")
    )


def _matrix(key: str, rows: dict[str, dict[str, tuple[float, float, float]]]) -> Html:
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    heads = [head("Candidate"), *(head(name, numeric=True) for name in columns)]
    lines = [
        row(
            [
                cell(label),
                *(
                    cell(*text.estimate(*values[n]), kind="num") if n in values else cell(text.MISSING, kind="num")
                    for n in columns
                ),
            ]
        )
        for label, values in rows.items()
        if values
    ]
    return table(key, heads, lines)


def _flip_title(c: Candidate) -> str:
    shown = min(len(c.flips), MAX_FLIPS)
    return (
        f"{c.label}: the {shown} most surprising of {len(c.flips)} listed"
        if shown < len(c.flips)
        else f"{c.label}: {shown} listed"
    )


def _flip_table(c: Candidate) -> Html:
    heads = [
        head("Margin", numeric=True),
        head("Kind"),
        head("Text has"),
        head("Reference says"),
        head("Candidate says"),
        head("After the text"),
    ]
    worst = sorted(c.flips, key=lambda f: -f.margin_ref)[:MAX_FLIPS]
    return table(f"flips of {c.label}", heads, [_flip_row(f) for f in worst], about=c.label)


def _flip_row(f: FlipRow) -> Html:
    before = f.context if len(f.context) <= _CONTEXT_CHARACTERS else "…" + f.context[-_CONTEXT_CHARACTERS:]
    return row(
        [
            cell(f"{f.margin_ref:.3f}", kind="num"),
            cell(f.kind),
            *(cell(_token(word), kind="mono") for word in (f.target, f.reference_choice, f.candidate_choice)),
            cell(before, kind="text"),
        ],
        flip=f.kind,
    )


def _token(word: str) -> str:
    """A token with its spaces visible: many differ in nothing else."""
    return word.replace(" ", "␣") or "(empty)"


def _pairs(title: str, key: str, pairs: Sequence[tuple[str, str]]) -> Html:
    if not pairs:
        return Html("")
    rows = [row([cell(name), cell(value, kind="text")]) for name, value in pairs]
    return join([Html(f"<h3>{plain(title)}</h3>"), table(key, [head("Name"), head("Value")], rows, fixed=True)])
