"""lowbit compare: low-bit versions beside their original, paired, with intervals and verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import Dtype, Jobs, Json, Model, StoreFolder, Style, Text, quiet, say


def compare(
    model: Model,
    candidates: Annotated[list[str], typer.Argument(metavar="OUT...", help="Checkpoints or model directories.")],
    text: Text = None,
    protocol: Annotated[str, typer.Option(help="windows-N, llamacpp-N or sliding-N-STRIDE.")] = "windows-512",
    windows: Annotated[int, typer.Option(min=2, help="Windows of the text that are scored.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    dtype: Dtype = "auto",
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write an HTML report here.")] = None,
    output: Style = "auto",
    store: StoreFolder = None,
    jobs: Jobs = 1,
    as_json: Json = False,
) -> None:
    """Score candidates beside the original on the same tokens; evidence is kept, so that nothing is scored twice."""
    quiet()
    from lowbit import digest
    from lowbit.cli.run import run_grids
    from lowbit.cli.tables import show_reports
    from lowbit.study import grid

    evaluation = {
        "text": text or "pydoc", "protocol": protocol, "windows": windows, "batch": batch, "dtype": dtype,
    }  # fmt: skip
    cells = grid.of_directories(model, candidates, evaluation, say)
    folder = store or digest.cache_folder() / "compare"
    failed = run_grids(folder, "compare", {"model": model, "candidates": candidates, **evaluation}, [cells], jobs)
    show_reports(folder, "compare", [cells], "json" if as_json else output, report)
    if failed:
        raise typer.Exit(1)
