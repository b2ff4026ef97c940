"""Options that several commands share, spelled once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face directory, a .gguf file, a hub id, or 'smollm2'.")
]
RecipeLine = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="METHOD:FORMAT[,OPTION=VALUE...], such as gptq:int4-g64, or a .toml file."),
]
Text = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help="A UTF-8 file, 'pydoc' (the default), 'self' or 'random'."),
]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Calibration windows.")]
Length = Annotated[int | None, typer.Option("--length", min=8, help="Tokens a calibration window.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything that is drawn.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, and nothing else, on standard output.")]
StoreFolder = Annotated[Path | None, typer.Option("--store", metavar="DIR", help="Folder of cells and evidence.")]
Jobs = Annotated[int, typer.Option("-j", "--jobs", min=1, help="Worker processes.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Of forward passes; auto is what this processor multiplies fastest."),
]
Device = Annotated[str, typer.Option("--device", help="Where it runs: cpu, cuda, cuda:1.")]
Style = Annotated[
    Literal["auto", "plain", "md"],
    typer.Option("-o", "--output", help="How the table is printed; md pastes into an issue."),
]


def emit(value: Any) -> None:
    """JSON on standard output, for scripts."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=str))


def say(message: str) -> None:
    """A line for people, beside the results."""
    print(message, file=sys.stderr, flush=True)


def quiet() -> None:
    """Silence the progress bars and notices of the libraries underneath, here and in worker processes.

    First in a command, before it imports them, which is when they look; what the user has set stays.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
