"""The cascade of ``lowbit generate``: its option, and the run. Imports torch, so commands import it when they run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lowbit.errors import RecipeError
from lowbit.io import native
from lowbit.models.resolve import locate
from lowbit.runtime.cascade import Decided, cascade, kept
from lowbit.runtime.facade import load
from lowbit.study.stages import dense_model, torch_dtype

MARGIN = 0.2


class Gate(NamedTuple):
    """The model that decides where the low-bit one is unsure, and below which margin that is."""

    reference: str
    margin: float


class Written(NamedTuple):
    """A text, and how much of it the reference decided."""

    tokens: list[Decided]
    kept: list[bool]
    """Whether the reference alone would have chosen each token after the same text."""
    seconds: float
    """Of writing; the check of what was kept comes after."""

    def to_json(self, gate: Gate) -> dict[str, Any]:
        """``first_change`` counts the reference's own tokens at the start of the text, None where all are."""
        return {
            "reference": gate.reference, "margin": gate.margin,
            "escalated": sum(t.escalated for t in self.tokens) / len(self.tokens),
            "kept": sum(self.kept) / len(self.kept),
            "first_change": self.kept.index(False) if False in self.kept else None,
        }  # fmt: skip


def parse(text: str) -> Gate:
    """``REF`` or ``REF,margin=0.2``. Raises RecipeError for another option or a margin that is no probability."""
    reference, _, option = text.partition(",")
    name, _, value = option.partition("=")
    try:
        margin = float(value) if option else MARGIN
        if not reference or (option and name != "margin") or not 0 <= margin <= 1:
            raise ValueError
    except ValueError:
        raise RecipeError(
            f"no cascade {text!r}", where="--cascade", fix=f"REF or REF,margin={MARGIN}, a margin from 0 to 1"
        ) from None
    return Gate(reference, margin)


def write(
    gate: Gate, low: PreTrainedModel, prompt: list[int], max_new_tokens: int, *,
    dtype: str, kernels: str, cache: Cache | None, say: Callable[[str], None], on_token: Callable[[int], None],
) -> Written:  # fmt: skip
    """Write one greedy text through the gate. Raises what reading the reference raises."""
    path = locate(gate.reference, say)
    high = load(path, dtype=torch_dtype(dtype), kernels=kernels) if native.is_native(path) else dense_model(path, dtype)
    tokens = []
    started = time.perf_counter()
    for decided in cascade(low, high, prompt, margin=gate.margin, max_new_tokens=max_new_tokens, low_cache=cache):
        tokens.append(decided)
        on_token(decided.token)
    seconds = time.perf_counter() - started
    return Written(tokens, kept(high, prompt, [t.token for t in tokens]), seconds)
