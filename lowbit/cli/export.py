"""lowbit export: a checkpoint in the files of another ecosystem."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import Json, emit, quiet, say

if TYPE_CHECKING:
    from lowbit.io.export import Exported

To = Annotated[
    str,
    typer.Option(
        "--to", metavar="FORMAT",
        help="gptq, gptq-v2, awq, compressed-tensors, bnb, gguf[:TYPE], bf16, fp16 or fp32.",
    ),
]  # fmt: skip
AllowRounding = Annotated[
    bool, typer.Option("--allow-rounding", help="Where the target cannot hold a linear, round it once more.")
]
RoundTo = Annotated[
    str | None,
    typer.Option("--format", help="What to round to; else the target's own format nearest in bits (gguf: q8_0)."),
]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="The result: a directory, or a .gguf file.")]


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of lowbit quantize.")],
    to: To,
    out: Out,
    allow_rounding: AllowRounding = False,
    format: RoundTo = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint for another engine. Exact, or refused; with --allow-rounding, at a stated cost."""
    quiet()
    from lowbit.cli.convert import run
    from lowbit.errors import ModelError
    from lowbit.io.reading import is_native

    if not is_native(checkpoint):
        raise ModelError(
            "is no checkpoint of lowbit quantize", where=str(checkpoint), fix="lowbit convert, for files of others"
        )
    run(checkpoint, to, out, allow_rounding, format, as_json)


def told(done: Exported, as_json: bool, **more: Any) -> None:
    """Tell the user what was written, and which engines will not load it; ``more`` goes into the JSON."""
    from lowbit.report.text import safe, size

    for note in (*done.notes, *done.warnings):
        say(f"Note: {note}.")
    if as_json:
        emit({
            "out": str(done.out), "layout": done.layout, "bytes": done.nbytes, "linears": done.sites,
            "notes": list(done.notes), "engines": list(done.warnings), **more,
        })  # fmt: skip
        return
    print(f"{safe(str(done.out))}: {size(done.nbytes)}, {done.sites} linears as {done.layout}")
    print(f"Next: lowbit check {done.out}")
