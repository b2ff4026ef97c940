"""The page in a real Chromium: no script error, no request, every chart drawn, readable in each setting."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowbit.report import write
from lowbit.report.model import Report, StudyReport

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
        self.page.on("request", lambda r: None if r.url == address else self.troubles.append(f"request: {r.url[:99]}"))
        self.page.goto(address)

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
