"""Cascade: greedy text from a low-bit model, with the original asked wherever the low-bit model is unsure.

    for token in cascade(low, high, prompt, margin=0.2, max_new_tokens=64): ...

At every token the low-bit model's margin, p(first) - p(second), decides: at or above the threshold its choice stands,
below it the original chooses. The original reads the tokens that it missed in one pass when it is next asked, so its
cost is that of the tokens escalated plus one wide pass over each stretch between them. The margin is the score that
best foretells where rounding changes a choice (arXiv:2204.04220).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import ModelError, RecipeError


class Decided(NamedTuple):
    """One token of a cascade."""

    token: int
    margin: float
    """Of the low-bit model, in probability."""
    escalated: bool
    """Whether the original chose it."""


class Reader:
    """A model with its cache, fed the tokens of one text in pieces of any size."""

    def __init__(self, model: PreTrainedModel, cache: Cache | None = None) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self.read = 0
        """Tokens that the cache holds."""
        self.passes = 0

    @torch.inference_mode()
    def next(self, text: list[int]) -> Float[Tensor, "vocab"]:
        """Logits, in float32, of the token that follows ``text``; only what was not read before is run."""
        new = torch.tensor([text[self.read :]], device=self.model.device)
        model: Any = self.model
        few = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        out = model(input_ids=new, past_key_values=self.cache, use_cache=True, **few)
        self.read, self.passes = len(text), self.passes + 1
        logits: Tensor = out.logits[0, -1].float()
        return logits


def cascade(
    low: PreTrainedModel, high: PreTrainedModel, prompt: list[int],
    *, margin: float, max_new_tokens: int, low_cache: Cache | None = None, high_cache: Cache | None = None,
) -> Iterator[Decided]:  # fmt: skip
    """The tokens of one greedy text, as they are decided; the last may be one that ends a text.

    A ``margin`` of 0 never asks ``high``, one above 1 asks it for every token. ``low_cache`` may round keys and values
    (``KVCache``). Raises RecipeError for an empty prompt or a margin below 0, and ModelError for two vocabularies.
    """
    require_one_vocabulary(low, high)
    if not prompt or margin < 0:
        raise RecipeError(
            "an empty prompt" if not prompt else f"a margin of {margin:g}", where="cascade",
            fix="a prompt" if not prompt else "a probability: 0 never asks the original, 1 nearly always",
        )  # fmt: skip
    text, ends = list(prompt), end_tokens(low) | end_tokens(high)
    small, large = Reader(low, low_cache), Reader(high, high_cache)
    for _ in range(max_new_tokens):
        top = torch.topk(torch.softmax(small.next(text), dim=-1), 2)
        sure = float(top.values[0] - top.values[1])
        escalated = sure < margin
        token = int(large.next(text).argmax()) if escalated else int(top.indices[0])
        text.append(token)
        yield Decided(token, sure, escalated)
        if token in ends:
            return


@torch.inference_mode()
def kept(high: PreTrainedModel, prompt: list[int], written: list[int]) -> list[bool]:
    """For every token written, whether ``high`` would have chosen it after the same text; one pass.

    Up to the first False the text is what ``high`` alone would have written (near-ties aside, which one pass and many
    small ones may round apart).
    """
    ids = torch.tensor([[*prompt, *written]], device=high.device)
    choices: Int[Tensor, "length"] = high(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return [a == b for a, b in zip(choices.tolist(), written, strict=True)]


def require_one_vocabulary(low: PreTrainedModel, high: PreTrainedModel) -> None:
    """Raises ModelError where the two models' vocabularies differ in size."""
    sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (low, high)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"vocabularies of {sizes[0]} and {sizes[1]} tokens", where="cascade",
            why="a token of one means nothing to the other", fix="the original that the low-bit model was made from",
        )  # fmt: skip


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text of this model."""
    config = model.generation_config
    ends = None if config is None else config.eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
