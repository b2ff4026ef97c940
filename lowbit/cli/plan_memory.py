"""lowbit plan OUT --memory SIZE: how a checkpoint will run in so much memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from lowbit.cli.options import emit, say

if TYPE_CHECKING:
    from lowbit.runtime.schedule import Prediction


def plan_memory(model: str, memory: str | None, disk: str | None, tokens: int, dtype: str, as_json: bool) -> None:
    """Print the schedule and what it will do. Raises RecipeError for a memory that is too small."""
    from lowbit.io import native
    from lowbit.models.resolve import locate
    from lowbit.pipeline.allocate import size as parse_size
    from lowbit.runtime.schedule import schedule
    from lowbit.runtime.stream_model import outline
    from lowbit.runtime.stream_rates import measure, predict
    from lowbit.study.stages import torch_dtype

    path = locate(model, say)
    if not native.is_native(path):
        raise typer.BadParameter("a RECIPE is missing; only a finished checkpoint is planned without one")
    limit, rate = (None if text is None else parse_size(text.removesuffix("/s")) for text in (memory, disk))
    native.verify(path, contents=False)
    found, kind = outline(path), torch_dtype(dtype)
    chosen = schedule(found.sizes, limit, found.fixed(tokens, kind))
    prediction = predict(found, chosen, measure(found, None if rate is None else float(rate), kind))
    if as_json:
        emit({
            **asdict(chosen), **asdict(prediction.rates), "resident": chosen.resident, "moved": chosen.moved,
            "held": chosen.held, "seconds_per_token": prediction.token, "load": prediction.load,
            "ratio": prediction.ratio, "break_even": prediction.break_even,
            "seconds_per_token_16bit": prediction.token_sixteen,
        })  # fmt: skip
        return
    print(f"{model} in {memory or 'as much memory as it takes'}")
    for name, value in _rows(prediction, disk is not None, tokens):
        print(f"  {name:<14}{value}".rstrip())


def _rows(p: Prediction, disk_given: bool, tokens: int) -> list[tuple[str, str]]:
    from lowbit.report.text import duration, size

    s, rates = p.schedule, p.rates
    kept = len(s.blocks) - len(s.streamed)
    share = 100 * s.resident / max(s.total, 1)
    limit = "the disk" if p.reading > rates.compute else "arithmetic"
    rows = [
        (
            "memory",
            f"{size(s.held)}: {size(s.fixed)} whatever is kept (Python, embedding, head, texts of {tokens} tokens)",
        ),
        ("resident", f"{kept} of {len(s.blocks)} blocks, {size(s.resident)}, {share:.0f} % of the low-bit weights"),
        ("streamed", f"{size(s.moved)} a pass through {s.buffers} buffers of {size(s.room // max(s.buffers, 1))}"),
        ("disk", f"{size(round(rates.disk))}/s, {'as given' if disk_given else 'measured on these files'}"),
        ("arithmetic", f"{duration(rates.compute)} a token; reading takes {duration(p.reading)}"),
        (
            "time",
            f"{duration(p.token)} a token, bound by {limit}; loaded in {duration(p.load)}, the check of files apart",
        ),
    ]
    rates_text = f"weights are decoded at {size(round(rates.decode))}/s of 16 bit"
    if p.ratio <= 1:
        return [*rows, ("compression", "does not pay: these weights are no smaller than in 16 bit")]
    if rates.decode > p.break_even:
        verdict = f"pays even without overlap: {rates_text}, beyond B r/(r-1) = {size(round(p.break_even))}/s"
    elif rates.decode > rates.disk:
        verdict = f"pays because reading and arithmetic overlap: {rates_text}, beyond the disk's rate"
    else:
        verdict = f"does not pay on this disk: {rates_text}, less than it delivers"
    return [
        *rows,
        ("compression", verdict),
        ("", f"in 16 bit the same memory would read {duration(p.token_sixteen)} a token"),
    ]
