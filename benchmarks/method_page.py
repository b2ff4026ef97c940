"""Turns rows of method_table.py into the tables of docs/results/methods.md.

python benchmarks/method_page.py benchmarks/results/*.jsonl > tables.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from recipes import GROUPS


def main(paths: list[Path]) -> None:
    for path in paths:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        print(f"## {rows[0]['model']}\n")
        for group in GROUPS:
            of_group = [row for row in rows if row["group"] == group]
            if of_group:
                _table(group, of_group)


def _table(group: str, rows: list[dict[str, Any]]) -> None:
    """The rows of one width, best first; the plainest recipe of the group is what others are held against."""
    measured = sorted((row for row in rows if "kl" in row), key=lambda row: row["kl"][0])
    plain = next(row for row in rows if "kl" in row and row["recipe"] == GROUPS[group][0].replace("g64", _group(rows)))
    print(f"### {group} ({measured[0]['protocol']}, {measured[0]['tokens']} tokens)\n")
    print("| recipe | bits a weight | KL [95 %] | perplexity | top-1 kept | quantized in | beside plain rounding |")
    print("|---|---|---|---|---|---|---|")
    for row in measured:
        kl, low, high = row["kl"][:3]
        windows = row.get("calibration", ["", 32])[1]
        spelled = f"`{row['recipe']}`" + (f", {windows} windows" if windows != 32 else "")
        print(
            f"| {spelled} | {row['bits_per_weight']:.2f} | {kl:.4f} [{low:.4f}, {high:.4f}] | {row['ppl']:.2f} "
            f"| {row['top1_kept'][0]:.1f} % | {row['wall_s']:.0f} s | {_beside(row, plain)} |"
        )
    for row in rows:
        if "refused" in row:
            print(f"| `{row['recipe']}` | | refused: {row['refused']} | | | | |")
    print()


def _group(rows: list[dict[str, Any]]) -> str:
    return "g64" if any("g64" in row["recipe"] for row in rows) else "g32"


def _beside(row: dict[str, Any], plain: dict[str, Any]) -> str:
    if row is plain:
        return "plain rounding"
    if row["kl"][1] > plain["kl"][2]:
        return "worse"
    return f"{row['kl'][0] / plain['kl'][0]:.2f} of its KL" if row["kl"][2] < plain["kl"][1] else "not told apart"


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
