"""README's table and picture from a finished study: needs Chromium and the dev extra.

python scripts/figures.py examples/demo.toml runs/demo docs/images/demo-pareto.png
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from lowbit.report import terminal
from lowbit.study import grid, spec
from lowbit.study.assemble import report
from lowbit.study.store import Store


def main() -> None:
    study, store, picture = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    parsed = spec.load(study)
    found = report(Store(store, create=False), parsed.name, grid.of_study(parsed)[0])
    print(terminal.markdown(found))
    picture.parent.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1000, "height": 900}, device_scale_factor=2)
        page.goto((store / "report.html").resolve().as_uri())
        chart = page.locator("#pareto-kl")
        chart.locator("svg").wait_for()
        chart.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
