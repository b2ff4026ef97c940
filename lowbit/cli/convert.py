"""lowbit convert: from any low-bit files to any others, bit for bit, or at a stated cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.export import AllowRounding, Out, RoundTo, To, told
from lowbit.cli.options import Json, quiet, say

if TYPE_CHECKING:
    from lowbit.io.opening import LowBit
    from lowbit.io.rounding import Rounded


def convert(
    path: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, anybody's low-bit directory, or a .gguf.")],
    to: To,
    out: Out,
    allow_rounding: AllowRounding = False,
    format: RoundTo = None,
    as_json: Json = False,
) -> None:
    """Convert low-bit files. Exact, or refused with the reason; with --allow-rounding, at a stated cost."""
    quiet()
    run(path, to, out, allow_rounding, format, as_json)


def run(path: Path, to: str, out: Path, allow_rounding: bool, format: str | None, as_json: bool) -> None:
    """Write the low-bit files of ``path`` as ``to``, and tell the user what became of them, and what rounding cost."""
    from lowbit.cli.progress import Bars
    from lowbit.errors import ExportError
    from lowbit.io.convert import convert as written
    from lowbit.io.opening import open_low_bit
    from lowbit.io.rounding import to_fit

    if format is not None and not allow_rounding:
        raise ExportError("--format rounds", where=to, fix="--allow-rounding beside it")
    model, rounded, cost = open_low_bit(path), None, None
    for warning in model.warnings:
        say(f"Note: {warning}.")
    with Bars() as bars:
        try:
            done = written(model, to, out, lambda d, t: bars.update(to, d, t, "blocks"))
        except ExportError as error:
            if not allow_rounding:
                more = f"{error.fix}; or --allow-rounding, which says what it costs".lstrip("; ")
                raise ExportError(error.what, where=error.where, why=error.why, fix=more) from error
            rounded = to_fit(model, to, format)
            if not rounded.sites:  # every linear fits: what is refused is no matter of rounding
                raise
            done = written(model, to, out, lambda d, t: bars.update(to, d, t, "blocks"), rounded)
    if rounded is not None:
        cost = _cost(model, rounded)
    told(done, as_json, **({} if cost is None else {"rounding": cost}))
    if cost is not None and not as_json:
        _show(cost)


def _cost(model: LowBit, rounded: Rounded) -> dict[str, Any]:
    """The ledger of what was rounded, and KL on a short text with its interval."""
    import numpy as np

    from lowbit.evaluation.statistics import paired_mean
    from lowbit.io.check import TOKENS, sample_tokens
    from lowbit.io.rounding import text_cost

    changes = list(rounded.changes)  # reading the groups once more begins a new ledger
    tokens = sample_tokens(model, TOKENS)
    kl = text_cost(model, rounded.rounded(), tokens).numpy()
    runs = np.arange(len(kl)) // 16  # neighbouring tokens err together
    interval = paired_mean(kl, runs)
    return {
        "format": rounded.format.name, "linears": len(changes), "of": len(model.specs),
        "largest_error": max(c.largest for c in changes),
        "rms_error": float(np.sqrt(np.mean([c.rms**2 for c in changes]))),
        "kl": {"mean": interval.estimate, "low": interval.low, "high": interval.high, "tokens": len(kl)},
        "sites": [c._asdict() for c in changes],
    }  # fmt: skip


def _show(cost: dict[str, Any]) -> None:
    from lowbit.cli.columns import print_columns
    from lowbit.report.text import number

    kl = cost["kl"]
    print(
        f"\nRounded {cost['linears']} of {cost['of']} linears once more, to {cost['format']}: largest error of a "
        f"weight {number(cost['largest_error'])}, rms {number(cost['rms_error'])};\nKL {number(kl['mean'])} nats a "
        f"token [{number(kl['low'])}, {number(kl['high'])}] on {kl['tokens']} tokens of text.\n"
    )
    rows = [[s["site"], number(s["largest"]), number(s["rms"]), number(s["relative"])] for s in cost["sites"]]
    print_columns(["site", "largest", "rms", "|Δ|²/|W|²"], rows, ("site",))
