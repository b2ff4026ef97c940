"""Options that several commands share, spelled once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="A Hugging Face directory, a .gguf file, a hub id, or 'smollm2'.")]
RecipeLine = Annotated[str, typer.Argument(metavar="RECIPE", help="gptq:int4-g64, rtn:nf4, or a .toml file.")]
Text = Annotated[str | None, typer.Option("--text", help="A UTF-8 file, or 'pydoc' (the default).")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything that is drawn.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
StoreFolder = Annotated[Path | None, typer.Option("--store", help="Folder of cells and evidence.")]
Jobs = Annotated[int, typer.Option("-j", "--jobs", min=1, help="Worker processes.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16: of activations.")]


def emit(value: Any) -> None:
    """JSON on standard output, for scripts."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=str))


def say(message: str) -> None:
    """A line for people, beside the results."""
    print(message, file=sys.stderr)


def quiet() -> None:
    """Silence the progress bars and notices of the libraries underneath; lowbit shows its own."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def size(nbytes: float) -> str:
    """Bytes in the unit that people read: MB and GB are powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"
