"""Turns rows of method_table.py into the tables of docs/results/methods*.md.

    python benchmarks/method_page.py benchmarks/results/opt-5m.jsonl > tables.md
    python benchmarks/method_page.py --across benchmarks/results/*.jsonl > across.md

Tables of one model hold every recipe; ``--across`` holds models side by side: KL as a share of plain rounding's in the
same group. A recipe whose interval lies above plain rounding's is marked ✗, one whose interval meets it ≈.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recipes import GROUPS, SHORT

Row = dict[str, Any]


def main(paths: list[Path], across: bool) -> None:
    models = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    if across:
        _across(models)
        return
    for rows in models:
        print(f"## {rows[0]['model']}\n")
        for group in GROUPS:
            of_group = [row for row in rows if row["group"] == group]
            if of_group:
                _table(group, of_group)


def _table(group: str, rows: list[Row]) -> None:
    """The rows of one width, best first; the plainest recipe of the group is what others are held against."""
    measured = sorted((row for row in rows if "kl" in row), key=lambda row: row["kl"][0])
    plain = _plain(group, rows)
    print(f"### {group} ({measured[0]['protocol']}, {measured[0]['tokens']} tokens)\n")
    print("| recipe | bits a weight | KL [95 %] | perplexity | top-1 kept | quantized in | beside plain rounding |")
    print("|---|---|---|---|---|---|---|")
    for row in measured:
        kl, low, high = row["kl"][:3]
        windows = row.get("calibration", ["", 32])[1]
        spelled = f"`{row['recipe']}`" + (f", {windows} windows" if windows != 32 else "")
        print(
            f"| {spelled} | {row['bits_per_weight']:.2f} | {_digits(kl)} [{_digits(low)}, {_digits(high)}] "
            f"| {row['ppl']:.2f} | {row['top1_kept'][0]:.1f} % | {_seconds(row)} | {_beside(row, plain)} |"
        )
    for row in rows:
        if "refused" in row:
            print(f"| `{row['recipe']}` | | refused: {row['refused']} | | | | |")
    print()


def _across(models: list[list[Row]]) -> None:
    """A line a recipe that every kind of model was given, a column a model."""
    print("| | " + " | ".join(rows[0]["model"] for rows in models) + " |")
    print("|---|" + "---|" * len(models))
    for group in GROUPS:
        recipes = SHORT[group]
        print(f"| **{group}** | " + " | ".join(_plain_kl(group, rows) for rows in models) + " |")
        for recipe in recipes[1:]:
            cells = [_cell(group, recipe, rows) for rows in models]
            if any(cells):
                print(f"| `{recipe}` | " + " | ".join(cells) + " |")
    print()


def _cell(group: str, recipe: str, rows: list[Row]) -> str:
    found = next((row for row in rows if (row["group"], row["recipe"]) == (group, recipe)), None)
    if found is None:
        return ""
    return "refused" if "refused" in found else _beside(found, _plain(group, rows)).removesuffix(" of its KL")


def _plain_kl(group: str, rows: list[Row]) -> str:
    of_group = [row for row in rows if row["group"] == group]
    return f"KL {_digits(_plain(group, of_group)['kl'][0])}" if of_group else ""


def _plain(group: str, rows: list[Row]) -> Row:
    """The plainest recipe of a group, with whatever size of group it was run."""
    return next(
        row for row in rows
        if row["group"] == group and "kl" in row and row["recipe"] == GROUPS[group][0].replace("g64", _group(rows))
    )  # fmt: skip


def _group(rows: list[Row]) -> str:
    return "g64" if any("g64" in row["recipe"] for row in rows) else "g32"


def _beside(row: Row, plain: Row) -> str:
    if row is plain:
        return "plain rounding"
    ratio = f"{row['kl'][0] / plain['kl'][0]:.2f} of its KL"
    if row["kl"][1] > plain["kl"][2]:
        return f"✗ {ratio}"
    return ratio if row["kl"][2] < plain["kl"][1] else f"≈ {ratio}"


def _digits(kl: float) -> str:
    return f"{kl:.4f}" if abs(kl) >= 0.001 else f"{kl:.2g}"


def _seconds(row: Row) -> str:
    """By the clock on a GPU; of the processor elsewhere, where others used it too."""
    cuda = str(row.get("device", "cuda")).startswith("cuda")
    return f"{row['wall_s']:.0f} s" if cuda else f"{row['cpu_s']:.1f} CPU s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--across", action="store_true", help="models side by side")
    parser.add_argument("rows", type=Path, nargs="+")
    arguments = parser.parse_args()
    main(arguments.rows, arguments.across)
