"""The page and the terminal say what the report holds, escape what they are given, and stay small."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import altair as alt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import StorageError, StudyError
from lowbit.evaluation.metrics import agreement, kl, perplexity
from lowbit.report import page, show, summary, terminal, text, write
from lowbit.report.charts import NAMED_LINES, charts, named
from lowbit.report.model import Candidate, Report, StudyReport
from lowbit.report.panel import Panel
from lowbit.report.pareto import Point, Standing, standings
from lowbit.report.scales import log_ticks, symlog, symlog_constant, symlog_ticks

Study = Callable[..., Report]


class Tables(HTMLParser):
    """Cell texts of every table by its name, as a browser without scripts reads them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self._table = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append(values)
        if tag == "table":
            self._table = values["data-table"] or ""
            self.rows[self._table] = []
        if tag == "tr":
            self.rows[self._table].append([])
        if tag in ("td", "th"):
            self.rows[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = ""

    def handle_data(self, data: str) -> None:
        if self._table and self.rows[self._table] and self.rows[self._table][-1] and data.strip():
            self.rows[self._table][-1][-1] += data if not self.rows[self._table][-1][-1] else f" {data}"


TRUE_LIBRARY = page.chart_library


@pytest.fixture(autouse=True)
def _short_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundling Vega takes seconds; only the size test needs the true one."""
    monkeypatch.setattr(page, "chart_library", lambda: "window.vegaEmbed = null;")


def test_main_table_has_a_row_a_version_with_value_and_interval(study: Study) -> None:
    report = study(7)
    rows = Tables(page.render(StudyReport.alone(report))).rows["overview"]
    assert len(rows) == 1 + 1 + 7
    assert [r[0].split()[0] for r in rows[2:]] == [
        c.label for c in sorted(report.candidates, key=lambda c: c.bytes_total)
    ]
    awq = next(r for r in rows if r[0].startswith("awq-nf4"))
    c = next(c for c in report.candidates if c.label == "awq-nf4")
    f = c.finding("kl")
    assert f is not None
    value, low, high = (float(x) for x in re.findall(r"[\d.]+", awq[5]))
    assert (value, low, high) == pytest.approx((f.value, f.low, f.high), rel=0.01)
    assert c.digest[:12] in awq[0]
    assert awq[-1].startswith("worse")


def test_every_section_has_its_rows(study: Study) -> None:
    report = study(7)
    rows = Tables(page.render(StudyReport.alone(report))).rows
    assert len(rows["findings"]) == 1 + 7 * 4
    assert len(rows["flip-counts"]) == 1 + 7
    assert len(rows["flips of awq-nf4"]) == 1 + 12
    margins = [float(r[0]) for r in rows["flips of awq-nf4"][1:]]
    assert margins == sorted(margins, reverse=True)
    assert len(rows["kl-by-block"]) == len(rows["kl-by-position"]) == 1 + 7
    assert len(rows["kl-by-block"][1]) == 1 + 30
    assert rows["versions"][1][0] == "fp16"
    assert rows["versions"][1][-1] == report.reference.digest  # whole, not shortened


def test_no_difference_without_what_qualifies_it(study: Study) -> None:
    html = page.render(StudyReport.alone(study(7)))
    for words in ("65,536 tokens", "128 clusters", "Holm", "0.000240 nat", "Minimum detectable effect", "95 % CI"):
        assert words in html


def test_the_noise_floor_is_named_where_unknown_or_zero(study: Study) -> None:
    assert "not measured" in page.render(StudyReport.alone(study(3, noise_floor=None)))
    assert "bit for bit" in page.render(StudyReport.alone(study(3, noise_floor=0.0)))


@pytest.mark.parametrize("models", [1, 2])
def test_what_was_concluded_stands_before_what_it_rests_on(study: Study, models: int) -> None:
    reports = tuple(study(0, title=f"Model {i}") for i in range(models))
    shown = page.content(StudyReport("s", "", "c", reports, (Panel("found", "Found", lead=("It is so.",)),))).main
    assert re.findall('href="#(.*?)"', shown) == ["panel-found", *(f"model-{i}" for i in range(models))]
    assert re.findall('id="(panel-found|model-.)"', shown)[:2] == ["panel-found", "model-0"]


def test_hostile_text_stays_text(hostile_study: Report) -> None:
    html = page.render(StudyReport.alone(hostile_study))
    seen = Tables(html)
    assert "img" not in seen.tags
    assert len([s for s in seen.scripts if s.get("type") != "application/json"]) == 2
    assert "alert(1)" in html  # shown, not dropped
    assert "\x1b" not in html
    assert "\u202e" not in html
    for spec in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html):
        json.loads(spec)


@pytest.mark.parametrize("style", ["plain", "md"])
def test_hostile_text_cannot_drive_a_terminal(
    hostile_study: Report, style: terminal.Style, capsys: pytest.CaptureFixture[str]
) -> None:
    show(hostile_study, style)
    out = capsys.readouterr().out
    assert "alert(1)" in out
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_the_policy_allows_the_two_scripts_and_nothing_else(study: Study) -> None:
    html = page.render(StudyReport.alone(study(1)))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert policy[1].count("sha256-") == 2
    scripts = policy[1].split("script-src")[1].split(";")[0]
    assert "unsafe" not in scripts
    assert not re.search(r"""(?:src|href)=["']?(?!data:)[a-z]+:""", html)


def test_forty_candidates_stay_under_two_megabytes_and_two_seconds(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "chart_library", TRUE_LIBRARY)
    report = study(40)
    page.chart_library()
    charts(report)  # altair loads its schema once a process
    start = time.process_time()
    html = page.render(StudyReport.alone(report))
    seconds = time.process_time() - start
    assert len(html.encode()) < 2_000_000
    assert html.count("sha256-") == 2
    assert seconds < 4, "type checks at run time double it; without them it must stay under 2 s"


def test_the_same_report_gives_the_same_page(study: Study) -> None:
    assert page.render(StudyReport.alone(study(5))) == page.render(StudyReport.alone(study(5)))


def test_an_empty_study_is_a_page_without_charts(study: Study) -> None:
    html = page.render(StudyReport.alone(study(0)))
    assert len(Tables(html).rows["overview"]) == 2
    assert '<script type="application/json"' not in html


def test_identical_candidate_draws_at_the_edge_and_says_so(study: Study) -> None:
    report = study(3)
    first = report.candidates[0]
    zero = tuple(dataclasses.replace(f, value=0.0, low=0.0, high=0.0, verdict="same") for f in first.findings)
    report = dataclasses.replace(
        report, candidates=(dataclasses.replace(first, findings=zero), *report.candidates[1:]), noise_floor=0.0
    )
    html = page.render(StudyReport.alone(report))
    assert f"KL is 0, drawn at the lower edge: {first.label}" in html
    assert "NaN" not in page.content(StudyReport.alone(report)).main
    row = next(r for r in Tables(html).rows["overview"] if r[0].startswith(first.label))
    assert row[3] == "0 [0, 0]"


def test_candidates_without_findings_are_listed_as_not_scored(study: Study) -> None:
    bare = dataclasses.replace(study(1).candidates[0], findings=(), flips=(), kl_by_block=(), kl_by_position=())
    report = dataclasses.replace(study(1), candidates=(bare,))
    assert charts(report) == []
    assert "not scored" in summary.sentence(report, bare)
    page.render(StudyReport.alone(report))


def test_write_replaces_whole_files_only(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "report.html"
    assert write(StudyReport.alone(study(2)), target) == target
    old = target.read_text()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write(StudyReport.alone(study(3)), target)
    assert target.read_text() == old
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]


def test_write_into_a_file_names_the_path(study: Study, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        write(StudyReport.alone(study(1)), tmp_path / "file" / "report.html")


def test_every_chart_is_valid_vega_lite(study: Study) -> None:
    drawn = charts(study(12))
    assert [c.key for c in drawn] == ["pareto-kl", "pareto-ppl", "kl-block", "kl-position"]
    for c in drawn:
        alt.LayerChart.from_dict(c.spec)  # validates against the schema
        used = set(re.findall(r'"data": \{"name": "([^"]+)"\}', json.dumps(c.spec)))
        assert used <= set(c.spec["datasets"]), c.key


def test_pareto_chart_draws_every_candidate_with_its_interval(study: Study) -> None:
    report = study(40)
    chart = charts(report)[0]
    rows = {r["label"]: r for r in chart.spec["datasets"]["points"]}
    assert set(rows) == {c.label for c in report.candidates}
    for c in report.candidates:
        f = c.finding("kl")
        assert f is not None
        assert (rows[c.label]["value"], rows[c.label]["low"], rows[c.label]["high"]) == (f.value, f.low, f.high)
        assert rows[c.label]["size"] == pytest.approx(c.bytes_total / 1e6)
    front = [r["value"] for r in chart.spec["datasets"]["front"]]
    assert front == sorted(front, reverse=True)


def test_at_most_six_lines_have_a_colour_and_all_are_drawn(study: Study) -> None:
    report = study(40)
    block = next(c for c in charts(report) if c.key == "kl-block")
    assert len(named(report)) == NAMED_LINES
    assert {r["label"] for r in block.spec["datasets"]["named"]} == set(named(report))
    assert len({r["label"] for r in block.spec["datasets"]["others"]}) == 40 - NAMED_LINES


def test_metric_names_are_those_of_the_evaluation() -> None:
    assert kl.KL.name == summary.KL
    assert perplexity.DELTA_LOG_PERPLEXITY.name == summary.DELTA_LOG_PPL
    assert agreement.TOP1_KEPT.name == summary.TOP1_KEPT
    assert agreement.DELTA_TOP1_ACCURACY.name == summary.DELTA_ACCURACY


POINTS = st.lists(
    st.tuples(st.integers(10_000, 90_000), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=9
).map(
    lambda rows: [Point(str(i), s, float(v), float(v - h), float(v + h)) for i, (s, v, h) in enumerate(rows)],
)


@given(POINTS)
def test_standings_match_their_definition(points: list[Point]) -> None:
    place = standings(points)
    for p in points:
        smaller = [q for q in points if q.size <= 1.001 * p.size and q.value <= p.value]
        better = [q for q in smaller if q.value < p.value or 1.001 * q.size < p.size]
        expected = (
            Standing.FRONT
            if not better
            else Standing.TIED
            if max(0, *(p.low - q.high for q in better), 0) == 0
            else Standing.DOMINATED
        )
        assert place[p.label] is expected
    best = min(points, key=lambda p: (p.value, p.size))
    assert place[best.label] is Standing.FRONT


def test_sizes_apart_by_a_header_win_no_place_on_the_front() -> None:
    place = standings([Point("a", 100_000, 0.1, 0.09, 0.11), Point("b", 99_990, 0.2, 0.19, 0.21)])
    assert place == {"a": Standing.FRONT, "b": Standing.DOMINATED}


def test_reports_refuse_what_cannot_be_told_apart(study: Study) -> None:
    report = study(2)
    with pytest.raises(StudyError, match="rtn-int8-row"):
        dataclasses.replace(report, candidates=(report.candidates[0], report.candidates[0]))
    with pytest.raises(StudyError, match="is_reference"):
        dataclasses.replace(report, reference=dataclasses.replace(report.reference, is_reference=False))


def test_a_column_for_the_model_only_where_models_differ(study: Study) -> None:
    report = study(2)
    titles = [c.title for c in summary.main_table(report).columns]
    other = dataclasses.replace(report.candidates[0], model_label="other")
    mixed = dataclasses.replace(report, candidates=(other, report.candidates[1]))
    assert "Model" not in titles
    assert "Model" in [c.title for c in summary.main_table(mixed).columns]


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (0.0213, 0.0204, 0.0222, ("0.0213", "[0.0204, 0.0222]")),
        (-0.0196, -0.0343, -0.0049, ("−0.020", "[−0.034, −0.005]")),
        (75.86, 75.66, 76.06, ("75.86", "[75.66, 76.06]")),
        (0.0, 0.0, 0.0, ("0", "[0, 0]")),
        (0.5, math.nan, math.nan, ("0.500", "")),
        (math.nan, 0.0, 1.0, ("–", "")),
    ],
)
def test_estimates_keep_the_digits_that_the_interval_supports(
    value: float, low: float, high: float, shown: tuple[str, str]
) -> None:
    assert text.estimate(value, low, high) == shown


@given(st.floats(-1e3, 1e3), st.floats(1e-9, 1e2))
def test_rounding_an_estimate_moves_it_by_little_of_its_interval(value: float, half: float) -> None:
    main, interval = text.estimate(value, value - half, value + half)
    read = [float(x.replace("−", "-")) for x in (main, *interval.strip("[]").split(", "))]
    allowed = max(0.17 * half, 0.06 * (abs(value) + half) if "e" in main + interval else 0.0)
    assert all(abs(a - b) <= allowed for a, b in zip(read, (value, value - half, value + half), strict=True))


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.00 kB"), (87_100_000, "87.1 MB"), (1_940_000_000, "1.94 GB")],
)
def test_sizes_are_decimal(nbytes: int, shown: str) -> None:
    assert text.size(nbytes) == shown


def test_durations() -> None:
    assert [text.duration(s) for s in (0.5, 38.2, 840.0, 7500.0, math.nan)] == [
        "0.500 s",
        "38.2 s",
        "14 min",
        "2 h 05 min",
        "–",
    ]


@given(st.floats(1e-9, 1e3), st.floats(1.5, 1e9))
def test_log_ticks_are_inside_and_few(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert all(low <= t <= low * ratio for t in ticks)
    assert ticks == sorted(ticks)
    assert len(ticks) <= 9
    assert ticks or ratio < 2.6


def test_symlog_axis_has_zero_and_both_signs() -> None:
    constant = symlog_constant([0.003, -0.2, 0.0])
    assert constant == 0.001
    assert symlog_ticks(-0.3, 0.05, constant) == [-0.1, -0.01, -0.001, 0.0, 0.001, 0.01]
    assert symlog(-0.2, constant) == -symlog(0.2, constant)
    assert symlog_constant([1e-9, 1.0]) == 1e-4  # a value near zero does not stretch the axis


def test_plain_text_is_aligned_and_markdown_is_a_table(study: Study) -> None:
    report = study(7)
    lines = terminal.plain(report).splitlines()
    assert len({line.index("MB") for line in lines[2:9]}) == 1
    cells = [re.split(r"(?<!\\)\|", line) for line in terminal.markdown(report).splitlines()[:9]]
    assert {len(c) for c in cells} == {12}
    assert "rtn-int8-row" in terminal.markdown(report)


def test_markdown_escapes_what_would_break_the_table(study: Study) -> None:
    report = study(1)
    odd = dataclasses.replace(report.candidates[0], label="a|b*c")
    assert "a\\|b\\*c" in terminal.markdown(dataclasses.replace(report, candidates=(odd,)))


def test_json_holds_the_report(study: Study) -> None:
    report = study(2)
    odd = dataclasses.replace(report.candidates[0].findings[0], mde=math.inf)
    report = dataclasses.replace(
        report, candidates=(dataclasses.replace(report.candidates[0], findings=(odd,)), report.candidates[1])
    )
    read = json.loads(terminal.to_json(report))
    assert read["candidates"][0]["findings"][0]["mde"] is None
    assert read["candidates"][1]["findings"][3]["flips"]["lost"] > 0
    assert read["reference"]["digest"] == report.reference.digest


def test_auto_is_a_table_on_a_screen_and_plain_in_a_pipe(
    study: Study,
    hostile_study: Report,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "180")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(study(3))
    assert capsys.readouterr().out == terminal.plain(study(3)) + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show(study(3))
    screen = capsys.readouterr().out
    assert "\x1b[" in screen
    for c in study(3).candidates:
        assert c.label in screen
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show(hostile_study)
    assert "\x1b[31m" not in capsys.readouterr().out


def test_a_narrow_terminal_drops_columns_and_says_which(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    show(study(3))
    wide = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    show(study(3))
    narrow = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "Left out" not in wide
    assert "1989/994/1989" in wide
    assert "Left out on 100 columns: Flips" in narrow
    assert "1989/994/1989" not in narrow
    assert "[+0.00035, +0.00083]" in narrow  # what stays is whole
    assert max(map(len, narrow.splitlines())) <= 100


def test_a_report_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, lowbit.report.page, lowbit.report.terminal;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_candidates_find_their_metric(study: Study) -> None:
    c: Candidate = study(1).candidates[0]
    assert c.finding("nothing") is None
    kept = c.finding("top1_kept")
    assert kept is not None
    assert kept.unit == "%"
