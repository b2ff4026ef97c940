"""lowbit import: other ecosystems' low-bit files as a checkpoint that every other command reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import Json, emit, quiet, say


def import_(
    path: Annotated[
        Path, typer.Argument(metavar="DIR_OR_FILE", help="GPTQ, AWQ, compressed-tensors, bitsandbytes, or a .gguf.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Directory of the checkpoint.")],
    as_json: Json = False,
) -> None:
    """Read low-bit files of another ecosystem. The same codes and scales; nothing is rounded again, nothing is run."""
    quiet()
    from lowbit.cli.progress import Bars
    from lowbit.io.importing import import_low_bit
    from lowbit.io.opening import open_low_bit
    from lowbit.report.text import safe, size
    from lowbit.study.stages import describe

    model = open_low_bit(path)
    for warning in model.warnings:
        say(f"Note: {warning}.")
    with Bars() as bars:
        there = import_low_bit(model, out, lambda d, t: bars.update(model.origin, d, t, "blocks"))
    found = describe(out)
    if as_json:
        emit({"out": str(out), "already_done": there, **found})
        return
    print(
        f"{safe(str(out))}: {size(found['bytes_total'])}, {found['bits_per_weight']:.4f} bits a weight over "
        f"{found['sites']} linears of {found['recipe']}"
    )
    if there:
        print("It was there already, complete; nothing was done.")
    print(f"Next: lowbit compare MODEL {out}")
