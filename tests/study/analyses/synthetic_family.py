"""A family whose losses are known: tokens share what is hard about the text, and versions differ by little."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.evaluation.metrics.base import Tokens
from lowbit.study.family import SIXTEEN, Family, Form, Version
from lowbit.study.losses import Shared

PARAMETERS = (2_000_000, 4_000_000, 8_000_000, 16_000_000)
COST = {2: 1.5, 3: 0.15, 4: 0.02, 8: 0.0005, 16: 0.0}
KEPT = 3_000_000  # bytes of embeddings, whatever the bits


def tokens(losses: np.ndarray, clusters: int = 32, each: int = 40, seed: int = 0) -> list[Tokens]:
    """Evidence of versions of these mean losses: windows and tokens of their own difficulty, a little noise each."""
    rng = np.random.default_rng(seed)
    n = clusters * each
    chunk = np.repeat(np.arange(clusters), each)
    common = rng.gamma(2.0, 0.5, n) + rng.normal(0, 0.4, clusters)[chunk]
    flat = np.zeros(n)
    columns = {"doc": flat, "chunk": chunk, "pos": np.tile(np.arange(each), clusters), "token": flat, "nll_ref": flat,
               "kl": flat, "top1": flat, "top1_ref": flat, "margin_ref": flat, "top1_p": flat,
               "entropy_ref": flat}  # fmt: skip
    found = []
    for loss in losses:
        nll = common + loss + 0.05 * rng.normal(size=n)
        found.append(Tokens.of({**columns, "nll": nll - nll.mean() + common.mean() + loss}))
    return found


def family(cost: Mapping[int, float] = COST, extra: Mapping[str, tuple[Form, float]] | None = None) -> Family:
    """Models whose loss falls with the log of their parameters, each in all widths and what else is asked for."""
    forms = {f"rtn:int{b}-g64": (Form(float(b), 16.0, 16.0, "int", "g64", "rtn"), c) for b, c in cost.items() if b < 16}
    forms |= {SIXTEEN: (Form(16.0, 16.0, 16.0), cost[16])} | dict(extra or {})
    versions, losses = [], []
    for count in PARAMETERS:
        for label, (form, rise) in forms.items():
            linears = round(count * (form.weights + (0.25 if form.weights < 16 else 0)) / 8)
            versions.append(Version(f"m{count}", count, label, form, linears + KEPT, linears))
            losses.append(-0.35 * np.log(count / 1e6) + rise)
    shared = Shared.of(tokens(np.array(losses)))
    return Family(tuple(versions), shared, int(shared.tokens.sum()), len(shared.tokens), "a text")
