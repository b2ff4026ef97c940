"""The page in a real Chromium: no script error, no request, charts drawn, readable, and clicks do what they say."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowbit.evaluation.task_findings import TaskFinding
from lowbit.report import watch, write
from lowbit.report.model import Report, StudyReport
from lowbit.report.panel import Curves, Heat, Mark, Panel, Square
from lowbit.study.engine import Cell, add_cells
from lowbit.study.progress import work
from lowbit.study.rows import Progress, Usage
from lowbit.study.store import Store
from lowbit.study.worker import Stage

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install 'lowbit[dev]')")

CHROMIUM = os.environ.get("LOWBIT_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH and LOWBIT_CHROMIUM is not set"),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
CHARTS = ("pareto-kl", "pareto-ppl", "kl-block", "kl-position")
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(22, 24, 27)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(study: Callable[..., Report], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(StudyReport.alone(study(40)), tmp_path_factory.mktemp("report") / "report.html").as_uri()


class Visit:
    """One page, opened; ``troubles`` collects whatever must not happen."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.troubles: list[str] = []
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda e: self.troubles.append(f"script error: {e}"))
        self.page.on("console", lambda m: self.troubles.append(f"console {m.type}: {m.text}"))
        self.page.on("dialog", lambda d: (self.troubles.append(f"dialog: {d.message}"), d.dismiss()))
        self.page.on("request", lambda r: self._asked(r.url, address))
        self.page.goto(address)

    def _asked(self, url: str, address: str) -> None:
        """A page asks for itself; a served one also for what is new, from nowhere else."""
        served = (f"{address}state", f"{address}content") if address.startswith("http:") else ()
        if url != address and url not in served:
            self.troubles.append(f"request: {url[:99]}")

    def first_column(self, table: str) -> list[str]:
        """The names in a table, as they stand and where they can be seen."""
        cells = self.page.locator(f"table[data-table='{table}'] tbody tr:visible td:first-child")
        return [text.split("\n")[0] for text in cells.all_inner_texts()]

    def wait_for_charts(self) -> None:
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('.chart')].every(c => c.dataset.drawn) "
            "|| document.querySelector('.failed')",
            timeout=60_000,
        )

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *exc: object) -> None:
        self.context.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
def test_page_draws_everything_and_asks_for_nothing(browser: Any, address: str, scheme: str, width: int) -> None:
    with Visit(browser, address, color_scheme=scheme, viewport={"width": width, "height": 900}) as visit:
        visit.wait_for_charts()
        page = visit.page
        assert visit.troubles == []
        assert [c.get_attribute("id") for c in page.query_selector_all(".chart")] == list(CHARTS)
        marks = {
            key: page.eval_on_selector_all(f"#{key} svg .mark-symbol.role-mark path", "all => all.length")
            for key in CHARTS
        }
        assert marks == {"pareto-kl": 40, "pareto-ppl": 40, "kl-block": 6 * 30, "kl-position": 6 * 8}
        for key in CHARTS:
            box = page.locator(f"#{key} svg").bounding_box()
            assert box["height"] > 200, key
            assert 0.6 * min(width, 500) < box["width"] <= width, key
            assert page.locator(f"#{key} svg").text_content().count("NaN") == 0
        assert page.locator("#pareto-kl svg >> text=noise floor").count() == 1
        assert page.locator("#kl-block svg >> text=noise floor").count() == 1
        rows = {
            t.get_attribute("data-table"): len(t.query_selector_all("tbody tr"))
            for t in page.query_selector_all("table[data-table]")
        }
        assert rows["overview"] == rows["versions"] == 41
        assert rows["findings"] == 160
        assert rows["flip-counts"] == rows["kl-by-block"] == rows["kl-by-position"] == 40
        assert sum(name.startswith("flips of ") for name in rows) == 40
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "only tables may scroll sideways"
        assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == (
            LIGHT if scheme == "light" else DARK
        )


def test_chart_text_and_marks_contrast_with_the_paper_in_both_schemes_and_in_print(browser: Any, address: str) -> None:
    contrast = """() => {
      const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const luminance = c => rgb(c).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const paper = luminance(getComputedStyle(document.documentElement).backgroundColor);
      const ratio = e => {
        const ink = luminance(getComputedStyle(e).fill);
        return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
      };
      const least = s => Math.min(...[...document.querySelectorAll(s)].map(ratio));
      return [least('.chart svg text'), least('.chart svg .mark-symbol.role-mark path')];
    }"""
    with Visit(browser, address, color_scheme="light") as visit:
        visit.wait_for_charts()
        for media, scheme in (("screen", "light"), ("screen", "dark"), ("print", "dark")):
            visit.page.emulate_media(media=media, color_scheme=scheme)  # no new drawing: the colours are variables
            text, marks = visit.page.evaluate(contrast)
            assert text > 4.5, (media, scheme)
            assert marks > 2.9, (media, scheme)
        assert visit.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == LIGHT


def test_the_main_table_and_the_charts_fit_on_paper(browser: Any, address: str) -> None:
    with Visit(browser, address, viewport={"width": 1280, "height": 900}) as visit:
        visit.wait_for_charts()
        visit.page.emulate_media(media="print")
        visit.page.set_viewport_size({"width": 703, "height": 1000})  # A4 less two margins of 12 mm
        for what in ("table[data-table=overview]", "#pareto-kl svg", "#kl-position svg"):
            box = visit.page.locator(what).bounding_box()
            assert box["x"] + box["width"] <= 703, what
        assert visit.page.pdf(format="A4")[:5] == b"%PDF-"


def test_a_tooltip_names_the_candidate_and_its_interval(browser: Any, address: str) -> None:
    with Visit(browser, address, viewport={"width": 1280, "height": 900}) as visit:
        visit.wait_for_charts()
        visit.page.locator("#pareto-kl svg .mark-symbol.role-mark path").last.hover(force=True)
        words = visit.page.locator("#vg-tooltip-element").text_content()
        assert "candidate" in words
        assert "[" in words
        assert visit.troubles == []


def test_without_javascript_the_tables_are_there_and_the_page_says_what_is_missing(browser: Any, address: str) -> None:
    with Visit(browser, address, java_script_enabled=False) as visit:
        assert visit.page.locator("table[data-table=overview] tbody tr").count() == 41
        assert visit.page.locator("noscript").first.is_visible()
        assert visit.troubles == []


@pytest.fixture(scope="module")
def small(study: Callable[..., Report], tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    """Three versions with tasks, and a panel of each kind of figure."""
    report = study(3)

    def asked(task: str, delta: float) -> TaskFinding:
        low, high = delta - 1.0, delta + 1.0
        return TaskFinding(task, "accuracy", "%", "higher", 200, 150, 60.0, 60.0 + delta, delta, low, high, None, 0.01,
                           "t", 0.2, 1.0, 4.2, False, verdict="worse")  # fmt: skip

    tasks = (asked("copa", -6.0), asked("boolq", -2.0))
    named = tuple(dataclasses.replace(c, task_findings=tasks) for c in report.candidates)
    report = dataclasses.replace(report, candidates=named, families=(("copa", "basic"), ("boolq", "basic")))
    at = [(k, x, 1.0 + k + x) for k in range(8) for x in range(3)]
    marks = tuple(Mark(f"s{k}", 10.0 ** (x + 3), v, v - 0.5, v + 0.5) for k, x, v in at)
    squares = tuple(Square(f"c{x}", f"r{y}", x - y + 0.5, "shown") for x in range(3) for y in range(4))
    figures = (
        Curves("curves", "Curves", "", "x", "y", marks, log_x=True, levels=(("margin", 2.0),)),
        Curves("steps", "Steps", "", "x", "y", marks, steps=True, diagonal=True),
        Heat("heat", "Heat", "", "x", "y", "value", squares, diverging=True),
    )
    path = tmp_path_factory.mktemp("small") / "report.html"
    whole = StudyReport(
        report.study_name, report.created, "run", (report,), (Panel("drawn", "Drawn", figures=figures),)
    )
    return report, write(whole, path).as_uri()


def test_readers_sort_filter_and_look_through_changed_choices(browser: Any, small: tuple[Report, str]) -> None:
    report, address = small
    by_size = [c.label for c in sorted(report.candidates, key=lambda c: c.bytes_total)]
    original, worst = report.reference.label, next(c.label for c in report.candidates if "nf4" in c.label)
    with Visit(browser, address, viewport={"width": 1280, "height": 900}) as visit:
        visit.wait_for_charts()
        page = visit.page
        assert page.locator("#drawn-heat svg >> text=+2.50").count() == 1  # few squares have their numbers
        assert page.locator("#drawn-curves svg >> text=100k").count() == 1
        assert page.locator("nav.contents a").count() == 2

        kept = page.locator("table[data-table=overview] th:has-text('Top-1 kept')")
        assert visit.first_column("overview") == [original, *by_size]
        kept.locator("button").click()  # up: the worst first; the reference stays where it was
        best_last = [c.label for c in sorted(report.candidates, key=lambda c: c.finding("top1_kept").value)]  # type: ignore[union-attr]
        assert visit.first_column("overview") == [original, *best_last]
        assert kept.get_attribute("aria-sort") == "ascending"
        page.keyboard.press("Enter")  # the button has the focus
        assert visit.first_column("overview") == [original, *reversed(best_last)]
        assert kept.get_attribute("aria-sort") == "descending"
        page.keyboard.press("Space")
        assert visit.first_column("overview") == [original, *by_size]
        assert kept.get_attribute("aria-sort") == "none"
        page.locator("table[data-table=versions] th:has-text('Stored bytes') button").click()
        assert visit.first_column("versions") == [original, *by_size]
        page.locator("table[data-table=tasks] th:has-text('Task') button").click()
        assert visit.first_column("tasks") == ["basic", "boolq", "copa"]  # a family's line stays before its tasks

        box = page.get_by_label("Filter candidates and tasks")
        box.fill(worst)
        assert visit.first_column("overview") == [original, worst]
        assert page.locator("table[data-table=tasks] thead th:visible").count() == 4  # columns of others are away
        assert visit.first_column("tasks") == ["basic", "boolq", "copa"]
        assert page.locator("#found").inner_text().endswith("rows")
        box.fill("boolq")
        assert visit.first_column("tasks") == ["basic", "boolq"]
        assert page.locator("table[data-table=overview]:visible").count() == 0
        assert page.locator("table[data-table=environment] tbody tr:visible").count() == 3
        box.fill("")
        assert len(visit.first_column("overview")) == 4

        page.locator(".bar button[data-kind=gained]").click()
        first = page.locator("section.flips details").first
        rows = first.locator("tbody tr:visible")
        assert rows.count() == 4
        assert all("gained" in text for text in rows.all_inner_texts())
        page.get_by_label("Search in the texts").fill("1914")
        shown = page.locator("section.flips tr[data-flip]:visible").all_inner_texts()
        assert shown
        assert all("1914" in text and "gained" in text for text in shown)
        page.locator(".bar button").first.click()
        page.get_by_label("Search in the texts").fill("no such words")
        assert page.locator("section.flips details:visible").count() == 0
        page.get_by_label("Search in the texts").fill("")

        fold = page.locator("details:has(table[data-table=findings])")
        fold.locator("summary").focus()
        page.keyboard.press("Enter")
        assert fold.locator("tbody tr:visible").count() == 12
        assert visit.troubles == []


class Filling:
    """A store that a test fills cell by cell, and the report of what is done."""

    def __init__(self, folder: Path, make: Callable[..., Report]) -> None:
        self.store, self.make = Store(folder), make
        names = ("reference", "score a", "score b", "score c")
        stage = Stage("score", "lowbit.study.stages:score")
        self.cells = [Cell(stage, name, (), {"n": i}) for i, name in enumerate(names)]
        add_cells(self.store, self.cells)

    def begin(self, i: int) -> None:
        assert self.store.claim("me", key=self.cells[i].key)
        self.store.heartbeat(self.cells[i].key, "me", Progress(3, 8, "windows"))

    def end(self, i: int) -> None:
        self.store.finish(self.cells[i].key, "me", {}, Usage(1.0, 1.0, 1))

    def work(self) -> Any:
        return work(self.store, self.cells)

    def report(self) -> StudyReport:
        left = self.work()
        done = len(left.of("done"))
        return StudyReport("tiny", "now", "run", (self.make(done - 1),) if done else (), work=left)


def test_a_watched_page_follows_a_study_and_keeps_what_the_reader_chose(
    browser: Any, study: Callable[..., Report], tmp_path: Path
) -> None:
    def some(n: int) -> Report:
        return dataclasses.replace(study(12), candidates=study(12).candidates[:n])

    filling = Filling(tmp_path, some)
    stop, ready, told = threading.Event(), threading.Event(), []

    def wait(_: float) -> None:
        if stop.wait(0.2):
            raise KeyboardInterrupt

    def say(address: str) -> None:
        told.append(address)
        ready.set()

    server = threading.Thread(target=watch.watch, args=(filling, 0, say, wait))
    server.start()
    try:
        assert ready.wait(60)
        with Visit(browser, told[0], viewport={"width": 1280, "height": 700}) as visit:
            page = visit.page
            page.wait_for_selector("text=Nothing is scored yet")
            page.wait_for_selector("text=0 of 4 cells done")
            filling.begin(0)
            page.wait_for_selector("text=reference: 3 of 8 windows")
            filling.end(0)
            filling.begin(1)
            filling.end(1)
            page.wait_for_selector("table[data-table=overview]")
            visit.wait_for_charts()
            page.locator("table[data-table=overview] th:has-text('Size') button").click()
            page.locator("table[data-table=overview] th:has-text('Size') button").click()
            page.locator("details:has(table[data-table=findings]) summary").click()
            page.get_by_label("Filter candidates and tasks").fill("int")
            page.evaluate("document.querySelector('table[data-table=flip-counts]').scrollIntoView()")
            page.evaluate("document.querySelector('main').dataset.mine = 'the same document'")
            where = "document.querySelector('table[data-table=flip-counts]').getBoundingClientRect().top"
            before = page.evaluate(where)
            for i in (2, 3):
                filling.begin(i)
                filling.end(i)
            page.wait_for_selector("text=4 of 4 cells done")
            page.wait_for_function("document.querySelectorAll('table[data-table=overview] tbody tr').length === 4")
            visit.wait_for_charts()
            page.wait_for_function(f"Math.abs({where} - {before}) < 40")
            assert page.locator("main[data-mine]").count() == 1
            shown = [c.label for c in sorted(some(3).candidates, key=lambda c: -c.bytes_total) if "int" in c.label]
            assert visit.first_column("overview") == ["fp16", *shown]
            assert page.get_by_label("Filter candidates and tasks").input_value() == "int"
            assert page.locator("details:has(table[data-table=findings])").get_attribute("open") is not None
            assert visit.troubles == []
    finally:
        stop.set()
        server.join(20)
        filling.store.close()


def test_hostile_text_runs_nothing(browser: Any, hostile_study: Report, tmp_path: Path) -> None:
    path = write(StudyReport.alone(hostile_study), tmp_path / "hostile.html")
    with Visit(browser, path.as_uri()) as visit:
        visit.wait_for_charts()
        assert visit.troubles == []
        assert visit.page.locator(".failed").count() == 0
        assert visit.page.locator("img").count() == 0
        assert "alert(1)" in visit.page.title()


def test_a_broken_chart_says_so_on_the_page(browser: Any, study: Callable[..., Report], tmp_path: Path) -> None:
    path = write(StudyReport.alone(study(2)), tmp_path / "broken.html")
    path.write_text(path.read_text().replace('"layer":', '"lair":', 1))
    with Visit(browser, path.as_uri()) as visit:
        visit.page.wait_for_selector(".failed")
        assert "could not be drawn" in visit.page.locator(".failed").first.text_content()
        assert visit.troubles
