"""Put what a study found into its page of docs/studies, between `<!-- results -->` and `<!-- end -->`.

    lowbit study show examples/studies/NAME.toml --json | python scripts/study_results.py docs/studies/NAME.md "WHERE"

Sentences and claims with their verdicts, a panel each; the tables stay in the report. WHERE says on what machine, with
which versions and in how many minutes it ran.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results -->", "<!-- end -->"


def main() -> None:
    page, where = Path(sys.argv[1]), sys.argv[2]
    study = json.load(sys.stdin)
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1:
        raise SystemExit(f"{page}: no place for results ({BEGIN})")
    before, _, after = text.partition(BEGIN)
    after = after.partition(END)[2] if END in after else after
    parts = [before.rstrip(), "", BEGIN, "", f"{where} {_models(study)}", ""]
    for panel in study["panels"]:
        parts += [f"### {panel['title']}", "", *(f"- {_plain(line)}" for line in panel["lead"]), ""]
        if panel["claims"]:
            parts += ["| Claim | Found here | Verdict |", "| --- | --- | --- |"]
            parts += [
                f"| {_plain(c['claim'])} ({_plain(c['source'])}) | {_plain(c['found'])} | {c['verdict']} |"
                for c in panel["claims"]
            ]
            parts.append("")
    page.write_text("\n".join([*parts, END, after.rstrip(), ""]), encoding="utf-8")


def _models(study: dict[str, Any]) -> str:
    protocol = study["reports"][0]["protocol"]
    versions = sum(len(report["candidates"]) for report in study["reports"])
    return f"{versions} versions; {protocol['tokens']:,} tokens of {protocol['text']}. Intervals are 95 %."


def _plain(words: str) -> str:
    """No mark of Markdown in what was measured; paths of a machine are no result."""
    return "".join(f"\\{c}" if c in "\\|`*_<>" else c for c in words)


if __name__ == "__main__":
    main()
