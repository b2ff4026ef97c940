"""Turns rows of compressibility.py into the tables and the chart of docs/results/compressibility.md.

    python benchmarks/compressibility_page.py rows.jsonl --chart docs/images/compressibility.svg > tables.md

Rows of the same name are draws of one kind of tensor: their medians are shown.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SIZES = ("zstd -1", "zstd -3", "Huffman", "FSE", "lowbit")
DECODERS = ("zstd -1", "zstd -3", "Huff0", "lowbit")
STATES = {"as stored": "#8a8a8a", "coded": "#0072b2", "entropy-coded format": "#d55e00"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--chart", type=Path, help="where the first model's chart goes, .svg or .png")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    models = list(dict.fromkeys(row["model"] for row in rows))
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        named = [medians([row for row in mine if row["recipe"] == name]) for name in dict.fromkeys(map(_name, mine))]
        sizes(model, named)
        times(named)
    if arguments.chart:
        chart([row for row in rows if row["model"] == models[0]], arguments.chart)


def medians(rows: list[Any]) -> Any:
    """One row of several draws: numbers become medians, whatever else must agree."""
    if isinstance(rows[0], dict):
        return {key: medians([row[key] for row in rows]) for key in rows[0]}
    return statistics.median(rows) if isinstance(rows[0], float) else rows[0]


def sizes(model: str, rows: list[Row]) -> None:
    """Bits a weight, before and after, beside quality."""
    scored = any("kl" in row for row in rows)
    columns = ["recipe", *(["KL [95 %]"] if scored else []), "stored", "entropy", *SIZES, "ratio"]
    print(f"\n## {model}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        kl = "{:.2g} [{:.2g}, {:.2g}]".format(*row["kl"]) if "kl" in row else "0"
        bits = [f"{row['bits'][name]:.2f}" if name in row["bits"] else "" for name in SIZES]
        cells = [f"`{row['recipe']}`" if scored else row["recipe"], *([kl] if scored else [])]
        cells += [f"{row['stored']:.2f}", f"{row['entropy']:.2f}", *bits, f"{row['ratio']:.2f}"]
        print("| " + " | ".join(cells) + " |")


def times(rows: list[Row]) -> None:
    """Decoding, and loading through a reader of some rate: by the rule and as measured."""
    rates = list(rows[0]["load"])
    heads = [f"{rate}: needs | rule | measured" for rate in rates]
    columns = ["recipe", "ratio", *(f"{name}" for name in DECODERS), *heads]
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * (2 + len(DECODERS) + 3 * len(rates)))
    for row in rows:
        cells = [f"`{row['recipe']}`", f"{row['ratio']:.2f}"]
        cells += [f"{row['decode'][name] / 1e9:.2f}" if name in row["decode"] else "" for name in DECODERS]
        for load in row["load"].values():
            needed = "never" if math.isinf(load["needed"]) else f"{load['needed'] / 1e9:.2g}"
            differ = " ≠" if (load["predicted"] < 0) != (load["change"] < 0) else ""
            cells += [needed, f"{100 * load['predicted']:+.0f} %", f"{100 * load['change']:+.0f} %{differ}"]
        print("| " + " | ".join(cells) + " |")


def chart(rows: list[Row], path: Path) -> None:
    """Bits against KL: every recipe as it is stored and after coding."""
    import altair as alt

    before, after = [], []
    for row in rows:
        if "kl" in row:
            kl, low, high = row["kl"]
            point = {"recipe": row["recipe"], "kl": kl, "low": low, "high": high, "to": row["bits"]["lowbit"]}
            if ":ec" in row["recipe"]:
                after.append({**point, "bits": point["to"], "state": "entropy-coded format"})
            else:
                before.append({**point, "bits": row["stored"], "state": "as stored"})
                after.append({**point, "bits": point["to"], "state": "coded"})
    x = alt.X("bits:Q", scale=alt.Scale(domain=[1.5, 10]), title="bits a weight, everything counted")
    y = alt.Y("kl:Q", scale=alt.Scale(type="log"), title="KL to the original, nats a token").axis(tickCount=4)
    scale = alt.Scale(domain=list(STATES), range=list(STATES.values()))
    colour = alt.Color("state:N", title=None, scale=scale, legend=alt.Legend(orient="top-right"))
    every = alt.Chart(alt.Data(values=before + after))
    formats = alt.Chart(alt.Data(values=[p for p in after if p["state"] != "coded"]))
    layers = [
        alt.Chart(alt.Data(values=before)).mark_rule(color="#bbbbbb").encode(x=x, x2="to:Q", y=y),
        formats.mark_line(color=STATES["entropy-coded format"], strokeDash=[4, 3]).encode(x=x, y=y),
        every.mark_rule(strokeWidth=2).encode(x=x, y="low:Q", y2="high:Q", color=colour),
        every.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=colour),
        formats.mark_text(align="right", dx=-8, dy=6, fontSize=10).encode(x=x, y=y, text="recipe:N"),
    ]
    for dy, aside in ((0, False), (13, True)):  # smoothquant: next to rounding alone, which has the same bits and KL
        names = alt.Data(values=[p for p in before if p["recipe"].startswith("smoothquant") == aside])
        text = alt.Chart(names).mark_text(align="left", dx=8, dy=dy, fontSize=10)
        layers.append(text.encode(x=x, y=y, text="recipe:N"))
    title = f"{rows[0]['model']}: bits before and after coding"
    whole = alt.layer(*layers).properties(width=680, height=420, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.configure(background="white").save(str(path))


def _name(row: Row) -> str:
    return str(row["recipe"])


if __name__ == "__main__":
    main()
