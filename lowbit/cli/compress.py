"""lowbit compress and lowbit decompress: any checkpoint in fewer bytes, and the same bytes again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.options import Json, emit, quiet

if TYPE_CHECKING:
    from lowbit.io.compress import Done

_Path = Annotated[Path, typer.Argument(metavar="PATH", help="A .safetensors or .gguf file, or a model directory.")]
_Out = Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="The result; it must not exist.")]


def compress(path: _Path, out: _Out, as_json: Json = False) -> None:
    """Compress a checkpoint without losing a bit: bf16, fp16, fp8, packed codes, scales, GGUF blocks.

    The result loads like the original; lowbit decompress gives the very files back.
    """
    quiet()
    from lowbit.cli.progress import Bars
    from lowbit.io import compress as io

    with Bars() as bars:
        done = io.compress(path, out, bars.update)
    _tell(path, out, done, as_json)


def decompress(path: _Path, out: _Out, as_json: Json = False) -> None:
    """Restore what lowbit compress was given, byte for byte, checking every byte."""
    quiet()
    from lowbit.cli.progress import Bars
    from lowbit.io import compress as io

    with Bars() as bars:
        done = io.decompress(path, out, bars.update)
    _tell(path, out, done, as_json)


def _tell(path: Path, out: Path, done: list[Done], as_json: bool) -> None:
    from lowbit.report.text import safe, size

    before, after = sum(d.before for d in done), sum(d.after for d in done)
    if as_json:
        emit({
            "path": str(path), "out": str(out), "bytes_before": before, "bytes_after": after,
            "files": [_file(d) for d in done],
        })  # fmt: skip
        return
    print(f"{safe(str(out))}: {size(after)} from {size(before)} ({_change(before, after)})")
    for d in done:
        if d.entries:
            coded = sum(entry.layout is not None for entry in d.entries)
            print(
                f"  {safe(d.name)}: {size(d.after)} from {size(d.before)} ({_change(d.before, d.after)}), "
                f"{coded} of {len(d.entries)} tensors coded"
            )


def _file(done: Done) -> dict[str, Any]:
    coded = sum(entry.layout is not None for entry in done.entries)
    return {
        "name": done.name, "bytes_before": done.before, "bytes_after": done.after, "tensors": len(done.entries),
        "coded": coded,
    }  # fmt: skip


def _change(before: int, after: int) -> str:
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−") if before else "empty"
