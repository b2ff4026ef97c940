"""lowbit convert: from any low-bit files to any others, bit for bit, or at a stated cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.export import Out, To, told
from lowbit.cli.options import Json, quiet, say

if TYPE_CHECKING:
    from lowbit.io.opening import LowBit
    from lowbit.io.rounding import Rounded


def convert(
    path: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, anybody's low-bit directory, or a .gguf.")],
    to: To,
    out: Out,
    allow_rounding: Annotated[
        bool, typer.Option("--allow-rounding", help="Where the target cannot hold a linear, round it once more.")
    ] = False,
    format: Annotated[
        str | None, typer.Option("--format", help="What to round to; else the target's own format nearest in bits.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert low-bit files. Exact, or refused with the reason; with --allow-rounding, at a stated cost."""
    quiet()
    from lowbit.cli.progress import Bars
    from lowbit.errors import ExportError
    from lowbit.io.convert import convert as run
    from lowbit.io.opening import open_low_bit

    if format is not None and not allow_rounding:
        raise ExportError("--format rounds", where=to, fix="--allow-rounding beside it")
    model, rounded, cost = open_low_bit(path), None, None
    for warning in model.warnings:
        say(f"Note: {warning}.")
    with Bars() as bars:
        try:
            done = run(model, to, out, lambda d, t: bars.update(to, d, t, "blocks"))
        except ExportError as error:
            if not allow_rounding:
                more = f"{error.fix}; or --allow-rounding, which says what it costs".lstrip("; ")
                raise ExportError(error.what, where=error.where, why=error.why, fix=more) from error
            rounded = _rounded(model, to, format)
            done = run(model, to, out, lambda d, t: bars.update(to, d, t, "blocks"), rounded)
    if rounded is not None:
        cost = _cost(model, rounded)
    told(done, as_json, **({} if cost is None else {"rounding": cost}))
    if cost is not None and not as_json:
        _show(cost)


def _rounded(model: LowBit, to: str, format: str | None) -> Rounded:
    from lowbit.formats.presets import preset
    from lowbit.io.rounding import Rounded, to_fit

    name, _, kind = to.partition(":")
    if name == "gguf":  # every linear: its writer picks types, and refuses what the format still cannot give it
        return Rounded(model, preset(format or kind or "q8_0"), frozenset(model.specs))
    return to_fit(model, to, format)


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
