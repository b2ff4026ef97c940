"""The chat page in a real Chromium, beside a server that says what the test wants."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from page_server import Script, Token, served

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install 'lowbit[dev]')")

CHROMIUM = os.environ.get("LOWBIT_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH and LOWBIT_CHROMIUM is not set"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
HOSTILE = "</script><img src=x onerror=alert(1)><b>"
SHARED: list[Token] = [("Birds", {"Birds": 0.9}), (" é\n", {" é\n": 0.8}), (HOSTILE, {HOSTILE: 0.7})]
ORIGINAL: list[Token] = [*SHARED, (" sing", {" sing": 0.46, " fly": 0.41}), (".", {".": 1.0})]
LOWBIT: list[Token] = [*SHARED, (" fly", {" fly": 0.55, " sing": 0.33}), (".", {".": 1.0})]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def open_page(browser: Any, url: str, **context: Any) -> tuple[Any, list[str]]:
    """The page, connected, and whatever must not happen on it."""
    troubles: list[str] = []
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(8_000)
    page.on("pageerror", lambda e: troubles.append(f"script error: {e}"))
    page.on("dialog", lambda d: (troubles.append(f"dialog: {d.message}"), d.dismiss()))
    page.on("request", lambda r: None if r.url.startswith(url) else troubles.append(f"request: {r.url[:99]}"))
    page.goto(url)
    return page, troubles


def ask(page: Any, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#stop", state="hidden")


def test_the_first_token_that_differs_is_marked_and_explained(browser: Any) -> None:
    script = Script({"original": ORIGINAL, "int4": LOWBIT})
    with served(script) as url:
        page, troubles = open_page(browser, url, viewport={"width": 390, "height": 800}, color_scheme="dark")
        page.wait_for_selector("#heads .name")
        ask(page, "What do\nbirds do?")
        assert page.locator("mark").all_text_contents() == [" sing", " fly"]
        written = ["".join(text for text, _ in answer) for answer in (ORIGINAL, LOWBIT)]
        assert page.locator(".answer .text").all_text_contents() == written
        verdict = page.locator(".verdict").text_content()
        assert "The first 3 tokens agree; token 4 differs. original wrote “ sing”, int4 wrote “ fly”." in verdict
        assert "A near tie: original gave its token 1.12 times the probability of the other." in verdict
        chosen = page.locator(".verdict tr.chosen .num").all_text_contents()
        assert chosen == ["46 %", "55 %"]
        assert "5 tokens" in page.locator(".stats").first.text_content()
        assert page.locator("#heads").text_content().count("40 MB in memory") == 2
        assert "410 MB" in page.locator("#held").text_content()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("img").count() == 0
        # the conversations differ now, which the page says instead of comparing; or both follow the left answer
        ask(page, "Why?")
        assert "differed before this turn" in page.locator(".verdict").last.text_content()
        page.click("#summary")
        page.select_option("#history", "left")
        page.fill("#temperature", "0.7")
        ask(page, "How?")
        assert "drew with the same seed" in page.locator(".verdict").last.text_content()
        left, right = ([m["content"] for m in body["messages"]] for body in script.asked[-2:])
        assert left == right
        assert left[1] == written[0]
        assert [body["temperature"] for body in script.asked] == [0, 0, 0, 0, 0.7, 0.7]
        page.click("#new")
        assert page.locator("article").count() == 0
        assert troubles == []


def test_stopping_and_errors_in_words(browser: Any) -> None:
    script = Script({"only": [("word ", {"word ": 1.0})] * 200}, delay_s=0.02, api_key="secret")
    with served(script) as url:
        page, troubles = open_page(browser, url)
        page.wait_for_selector("#unlock:not([hidden])")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector("#heads .name")
        page.fill("#prompt", "Go on")
        page.press("#prompt", "Enter")
        page.wait_for_selector("text=word word word")
        page.keyboard.press("Escape")
        page.wait_for_selector("#stop", state="hidden")
        assert "stopped" in page.locator(".stats").text_content()
        assert page.locator(".text").text_content().count("word") < 100
        script.refusal = (429, {"Retry-After": "2"}, "the queue is full")
        ask(page, "More")
        assert "busy; it asks to wait 2 s: the queue is full" in page.locator(".trouble").text_content()
        script.refusal, script.cut, script.delay_s = None, True, 0.0
        page.click("text=Try again")
        page.wait_for_selector("text=ended without its end")
        assert page.locator("article").count() == 2  # what failed was asked again, not once more
        assert page.locator("mark").count() == 0
        assert troubles == []
    page.fill("#prompt", "Still there?")
    page.press("#prompt", "Enter")
    page.wait_for_selector("text=The server does not answer")
