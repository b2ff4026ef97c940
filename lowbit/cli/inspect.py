"""lowbit inspect: what a model or a low-bit checkpoint is made of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lowbit.cli.options import Json, Model, emit, quiet, say, size


def inspect(model: Model, as_json: Json = False) -> None:
    """Layers, shapes, dtypes, shares of parameters and bytes, and outlier statistics of every linear."""
    from lowbit.io import native

    quiet()
    path = Path(model)
    rows, summary = _checkpoint(path) if path.is_dir() and native.is_native(path) else _model(model)
    if as_json:
        emit({"summary": summary, "sites": rows})
        return
    from rich.console import Console
    from rich.table import Table

    for key, value in summary.items():
        print(f"{key}: {value}")
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("site", "dtype", "format") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    width = max(100, *(sum(len(str(v)) + 2 for v in row.values()) for row in rows))
    Console(width=None if Console().is_terminal else width).print(table)


def _model(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from lowbit.cli.progress import Bars
    from lowbit.models.outliers import weight_statistics
    from lowbit.models.resolve import open_model

    source = open_model(name, say)
    total = sum(p.numel() for p in source.skeleton.parameters())
    sites = [site for block in source.blocks for site in source.sites(block)]
    rows = []
    with Bars() as bars:
        for done, s in enumerate(weight_statistics(source), 1):
            n = math.prod(s.site.shape)
            rows.append({
                "site": s.site.name, "shape": f"{s.site.shape[0]} x {s.site.shape[1]}", "dtype": s.dtype,
                "share %": round(100 * n / total, 3), "absmax": s.absmax, "std": s.std, "kurtosis": s.kurtosis,
            })  # fmt: skip
            bars.update("weights", done, len(sites), "linears")
    linears = sum(math.prod(site.shape) for site in sites)
    return rows, {
        "model": f"{source.name} ({type(source.skeleton).__name__})", "blocks": len(source.blocks),
        "parameters": f"{total:,}", "bytes": size(source.store.nbytes()),
        "in linears of blocks": f"{linears:,} ({100 * linears / total:.1f} %)",
        "head": "tied to the embedding" if source.tied else "separate", "digest": source.digest,
    }  # fmt: skip


def _checkpoint(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from lowbit.io import native
    from lowbit.pipeline.recipe import Recipe

    manifest = native.verify(path)
    sites = manifest["sites"]
    nbytes = sum(site["nbytes"] for site in sites)
    weights = sum(8 * site["nbytes"] / site["bits_per_weight"] for site in sites)
    rows = [
        {
            "site": s["site"], "format": f"{s['method']}:{s['format']}", "bytes": s["nbytes"],
            "bits/weight": s["bits_per_weight"], "weight error": s["weight_error"],
            "output error": "-" if s["output_error"] is None else s["output_error"],
        }
        for s in sites
    ]  # fmt: skip
    return rows, {
        "checkpoint": path.name, "recipe": Recipe.model_validate(manifest["recipe"]).line,
        "bytes": size(sum(f["bytes"] for f in manifest["files"].values())), "linears": len(sites),
        "bits per weight of linears": round(8 * nbytes / weights, 4), "source digest": manifest["source"],
    }  # fmt: skip
