"""lowbit check: do other readers read from the files what was meant?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.options import Json, emit, quiet


def check(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="What lowbit export wrote, or anybody's low-bit files.")],
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="REF", help="The checkpoint that it should be; else the one it names."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens on which logits are compared.")] = 256,
    as_json: Json = False,
) -> None:
    """Load saved files with every installed reader; compare its matrices and logits with the native checkpoint.

    Ends with 1 when a reader fails, or reads other values.
    """
    quiet()
    from lowbit.io.check import check as run
    from lowbit.io.check import layout_of, reference_of

    reference = against or reference_of(path)
    verdicts = run(path, reference, tokens=tokens)
    wrong = any(v.wrong for v in verdicts)
    if as_json:
        emit({
            "path": str(path), "layout": layout_of(path), "against": reference and str(reference),
            "readers": [asdict(v) for v in verdicts],
        })  # fmt: skip
    else:
        from lowbit.cli.columns import print_columns
        from lowbit.report.text import MISSING, number, safe

        print(f"{safe(str(path))}: {layout_of(path)}, against {safe(str(reference)) if reference else 'nothing'}\n")
        rows = [
            [
                v.reader, v.status, f"{v.equal} of {v.tensors}" if v.tensors else MISSING,
                MISSING if v.kl is None else number(v.kl),
                MISSING if v.agree is None else f"{100 * v.agree:.1f} %", safe(v.detail),
            ]
            for v in verdicts
        ]  # fmt: skip
        print_columns(["reader", "", "bit-equal", "KL", "same top", "note"], rows, ("reader", "", "note"))
        if reference is None:
            print("\nOnly opened: name what it should be with --against.")
    if wrong:
        raise typer.Exit(1)
