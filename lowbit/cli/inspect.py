"""lowbit inspect: what a model or a low-bit checkpoint is made of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import Json, Model, emit, quiet, say

_WORDS = ("site", "dtype", "format")  # columns of text, set to the left


def inspect(
    model: Model,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="What lossless coding gives, or would give, by tensor and field.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Layers, shapes, dtypes, shares of parameters and bytes, and outlier statistics of every linear.

    Of a low-bit checkpoint: bytes, bits and errors of every linear, after checking every byte.
    """
    quiet()
    if entropy:
        from lowbit.cli.entropy import show

        show(model, as_json)
        return
    from lowbit.io import native

    path = Path(model).expanduser()
    summary, rows = _checkpoint(path) if path.is_dir() and native.is_native(path) else _model(model)
    if as_json:
        emit({"summary": summary, "sites": rows})
        return
    from lowbit.cli.columns import print_columns

    width = max(map(len, summary))
    for key, value in summary.items():
        print(f"{key.replace('_', ' '):<{width}}  {_spell(key, value)}")
    print()
    heads = [key.replace("_", " ") for key in rows[0]]
    print_columns(heads, [[_spell(key, value) for key, value in row.items()] for row in rows], _WORDS)
    print(f"\n{_LEGEND['kurtosis' if 'kurtosis' in rows[0] else 'output_error']}")


_LEGEND = {
    "kurtosis": "share: of all parameters. kurtosis: 3 for a Gaussian; far more means outliers, hard on low bits.",
    "output_error": "weight error: |Q - W|² / |W|². output error: the same of the outputs on the calibration text.",
}


def _model(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from lowbit.cli.progress import Bars
    from lowbit.models.outliers import weight_statistics
    from lowbit.models.resolve import open_model

    source = open_model(name, say)
    total = sum(p.numel() for p in source.skeleton.parameters())
    sites = [site for block in source.blocks for site in source.sites(block)]
    linears = sum(math.prod(site.shape) for site in sites)
    rows = []
    with Bars() as bars:
        for done, s in enumerate(weight_statistics(source), 1):
            rows.append({
                "site": s.site.name, "shape": list(s.site.shape), "dtype": s.dtype,
                "share": math.prod(s.site.shape) / total, "absmax": s.absmax, "std": s.std, "kurtosis": s.kurtosis,
            })  # fmt: skip
            bars.update("weights", done, len(sites), "linears")
    return {
        "model": source.name, "architecture": type(source.skeleton).__name__, "blocks": len(source.blocks),
        "parameters": total, "parameters_in_linears": linears, "bytes": source.store.nbytes(),
        "head": "tied to the embedding" if source.tied else "separate", "digest": source.digest,
    }, rows  # fmt: skip


def _checkpoint(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from lowbit.io import native
    from lowbit.study.stages import describe

    sites = native.verify(path)["sites"]
    found = describe(path)
    rows = [
        {
            "site": s["site"], "format": f"{s['method']}:{s['format']}", "bytes": s["nbytes"],
            "bits_per_weight": s["bits_per_weight"], "weight_error": s["weight_error"],
            "output_error": s["output_error"],
        }
        for s in sites
    ]  # fmt: skip
    return {
        "checkpoint": path.name, "recipe": found["recipe"], "bytes": found["bytes_total"], "linears": len(sites),
        "bits_per_weight": found["bits_per_weight"], "made_in_seconds": found["seconds"], "digest": found["digest"],
        "source_digest": found["source"],
    }, rows  # fmt: skip


def _spell(key: str, value: Any) -> str:
    """A value as people read it; JSON has the numbers."""
    from lowbit.report.text import MISSING, number, size

    if value is None:
        return MISSING
    if key == "bytes":
        return size(value)
    if key == "share":
        return f"{100 * value:.2f} %"
    if key == "shape":
        return " x ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4f}" if key == "bits_per_weight" else number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
