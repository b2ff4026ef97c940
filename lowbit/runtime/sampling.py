"""The next token of one request, from its logits.

Order: ``logit_bias``, repetition penalty, frequency and presence penalties, temperature, ``top_k``, ``top_p``,
``min_p``, one draw. Greedy (temperature 0) takes the largest logit after the penalties. Presence and frequency count
what was written, the repetition penalty (arXiv 1909.05858) what was read too. ``min_p``: arXiv 2407.01082.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lowbit.arrays import Float, Int, Tensor
from lowbit.errors import ModelError, RecipeError

_BOUNDS = {
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0), "repetition_penalty": (0.01, 100.0),
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``top_k`` 0 keeps all; without a ``seed`` every request draws its own.

    Raises RecipeError for a value that means nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            if not low <= getattr(self, name) <= high:
                raise RecipeError(f"{name} {getattr(self, name)} is not in [{low:g}, {high:g}]", where="sampling")
        if self.top_p == 0 or self.top_k < 0:
            raise RecipeError(f"top_p {self.top_p} and top_k {self.top_k} leave nothing", where="sampling")
        if not all(token >= 0 and math.isfinite(bias) for token, bias in self.logit_bias):
            raise RecipeError("logit_bias is of token ids and finite numbers", where="sampling")


GREEDY = Sampling()


class Candidates(NamedTuple):
    """What a token is drawn from: ids, and weights that need not sum to one."""

    ids: Int[Tensor, "n"]
    weights: Float[Tensor, "n"]


class Sampler:
    """The draws of one request: its generator, and the counts that penalties need."""

    def __init__(self, how: Sampling, prompt: Sequence[int] = ()) -> None:
        self.how = how
        seed = secrets.randbits(63) if how.seed is None else how.seed
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        self._read = torch.tensor(sorted(set(prompt)), dtype=torch.long) if how.repetition_penalty != 1 else None
        self._written: dict[int, int] = {}
        self._biased = torch.tensor([token for token, _ in how.logit_bias], dtype=torch.long)
        self._bias = torch.tensor([bias for _, bias in how.logit_bias], dtype=torch.float32)
        self._largest = max((token for token, _ in how.logit_bias), default=-1)

    def draw(self, logits: Float[Tensor, "vocab"]) -> int:
        """The next token. Raises ModelError when there is no largest logit. Cost a few passes over the vocabulary."""
        scores = self.adjusted(logits)
        if self.how.temperature == 0:
            best = int(scores.argmax())
            if not math.isfinite(scores[best]):
                raise ModelError("the logits are not finite", why="no token is the most likely", fix="another --dtype")
            token = best
        else:
            token = self._drawn(self.candidates(scores))
        self._written[token] = self._written.get(token, 0) + 1
        return token

    def adjusted(self, logits: Float[Tensor, "vocab"]) -> Float[Tensor, "vocab"]:
        """Logits in float32 after bias and penalties."""
        how, scores = self.how, logits.detach().to("cpu", torch.float32, copy=True)
        if self._largest >= len(scores):
            raise RecipeError(f"logit_bias names token {self._largest} of {len(scores)}", where="sampling")
        scores.index_add_(0, self._biased, self._bias)
        written = torch.tensor(list(self._written), dtype=torch.long)
        if self._read is not None:
            seen = torch.cat([self._read, written]).unique()
            values = scores[seen]
            scores[seen] = torch.where(values > 0, values / how.repetition_penalty, values * how.repetition_penalty)
        if self._written and (how.presence_penalty or how.frequency_penalty):
            counts = torch.tensor(list(self._written.values()), dtype=torch.float32)
            scores[written] -= how.frequency_penalty * counts + how.presence_penalty
        return scores

    def candidates(self, scores: Float[Tensor, "vocab"]) -> Candidates:
        """Tokens that temperature, ``top_k``, ``top_p`` and ``min_p`` leave, with their weights."""
        how = self.how
        weights = torch.softmax(scores / how.temperature, dim=-1)
        ids = torch.arange(len(weights))
        if how.top_k:
            weights, ids = weights.topk(min(how.top_k, len(weights)))
        elif how.top_p < 1:
            weights, ids = weights.sort(descending=True)
        if how.top_p < 1:
            mass = weights / weights.sum()
            kept = mass.cumsum(0) - mass < how.top_p  # what is likelier falls short of it
            weights, ids = weights[kept], ids[kept]
        if how.min_p:
            kept = weights >= how.min_p * weights.max()
            weights, ids = weights[kept], ids[kept]
        return Candidates(ids, weights)

    def _drawn(self, found: Candidates) -> int:
        """One uniform number a token: the same seed gives the same text whatever else is running."""
        total = found.weights.to(torch.float64).cumsum(0)
        if not len(total) or not math.isfinite(total[-1]):
            raise ModelError("the logits are not finite", why="no token can be drawn", fix="another --dtype")
        place = torch.rand((1,), generator=self._generator, dtype=torch.float64) * total[-1]
        at = torch.searchsorted(total, place, right=True).clamp_(max=len(total) - 1)
        return int(found.ids[at])


class Token(NamedTuple):
    """A token with its log-probability by the model itself (before penalties and temperature), and the likeliest."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def judged(logits: Float[Tensor, "tokens vocab"], targets: Sequence[int], top: int) -> list[Token]:
    """Every target with its log-probability in nats and the ``top`` likeliest tokens, largest first."""
    table = torch.log_softmax(logits.detach().to(torch.float32), dim=-1)
    values = table.gather(1, torch.tensor(targets, device=table.device)[:, None])[:, 0].tolist()
    best = table.topk(min(top, table.shape[1]), dim=-1)
    likeliest = [
        tuple(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [Token(*found) for found in zip(targets, values, likeliest, strict=True)]
