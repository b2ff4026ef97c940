"""Generations: what low bits do to text that a model writes by itself.

Every metric is a mean over texts of a number of each text, so that two models that wrote from the same prompts and
seeds pair text by text; the texts of one prompt share a cluster. The question is that of arXiv:2309.05210; its
definitions are not published, these are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

from lowbit.errors import EvidenceError
from lowbit.evaluation.metrics.base import Metric
from lowbit.evaluation.metrics.survival import Divergence
from lowbit.evaluation.statistics import Interval, paired_mean

LOOP_SPAN = 24  # tokens at the end of a text that repeat with a period of at most a third of that
END = -1  # stands behind a text's last token


@dataclass(frozen=True, eq=False)
class Texts:
    """What one model wrote. Raises EvidenceError for no texts or columns that do not fit together."""

    prompt: Int32[np.ndarray, " n"]
    seed: Int32[np.ndarray, " n"]
    token: Int32[np.ndarray, "n steps"]
    """Tokens written, then ``END``."""
    stopped: Bool[np.ndarray, " n"]
    """Whether the model ended the text itself; its end token counts as written."""
    nll: Float32[np.ndarray, "n steps"]
    """-log p of every token under the model that wrote it, at temperature 1, in nats; 0 behind the end."""
    nll_ref: Float32[np.ndarray, "n steps"]
    """The same under the reference: how likely the original finds this text."""

    def __post_init__(self) -> None:
        n, shape = len(self.prompt), self.token.shape
        fits = n and self.seed.shape == self.stopped.shape == (n,) and shape[0] == n and self.length.min() > 0
        if not (fits and self.nll.shape == self.nll_ref.shape == shape and np.isfinite(self.nll + self.nll_ref).all()):
            raise EvidenceError(
                f"{n} prompts and tokens of shape {shape} are no texts", where="texts",
                fix="finite columns of one length, a token in every text",
            )  # fmt: skip

    @cached_property
    def length(self) -> Int[np.ndarray, " n"]:
        """Tokens of every text."""
        value: Int[np.ndarray, " n"] = (self.token != END).sum(1)
        return value

    def first(self, steps: int) -> Texts:
        """The same texts as ``max_new_tokens=steps`` would have left them: the first tokens do not depend on it."""
        cut = {f.name: getattr(self, f.name)[:, :steps] for f in fields(self) if getattr(self, f.name).ndim == 2}
        return Texts(self.prompt, self.seed, stopped=self.stopped & (self.length <= steps), **cut)

    def require_paired(self, other: Texts) -> None:
        """Raises EvidenceError unless both were written from the same prompts and seeds."""
        if not (np.array_equal(self.prompt, other.prompt) and np.array_equal(self.seed, other.seed)):
            raise EvidenceError("texts from other prompts or seeds do not pair", where="texts", fix="one set of both")


def joined(parts: Sequence[Texts]) -> Texts:
    """Texts of several settings as one set, at least one; those of one prompt stay one cluster."""
    return Texts(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Texts)})


def repetition(texts: Texts, n: int = 4) -> Float[np.ndarray, " n"]:
    """Share of each text's n-grams that it holds already, 0 for a text with fewer than n tokens."""
    found = np.zeros(len(texts.prompt))
    for i, grams in enumerate(_grams(texts, n)):
        found[i] = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return found


def distinct(texts: Texts, n: int = 2) -> float:
    """Distinct-n (Li et al. 2016): different n-grams over all n-grams of all texts.

    A level without interval, to be held only beside as many texts of the same lengths: more text repeats more. What
    pairs is ``repetition``, one less distinct-n within each text.
    """
    grams = [gram for text in _grams(texts, n) for gram in text]
    return len(set(grams)) / len(grams) if grams else 0.0


def loops(texts: Texts, span: int = LOOP_SPAN) -> Float[np.ndarray, " n"]:
    """1 for a text whose last ``span`` tokens repeat with a period of at most span / 3, else 0."""
    found = np.zeros(len(texts.prompt))
    for i, length in enumerate(texts.length):
        tail = texts.token[i, max(length - span, 0) : length]
        found[i] = len(tail) == span and any(np.array_equal(tail[p:], tail[:-p]) for p in range(1, span // 3 + 1))
    return found


def _nll(column: str) -> Callable[[Texts], Float[np.ndarray, " n"]]:
    def mean(texts: Texts) -> Float[np.ndarray, " n"]:
        value: Float[np.ndarray, " n"] = getattr(texts, column).astype(np.float64).sum(1) / texts.length
        return value

    return mean


PER_TEXT: Mapping[str, tuple[Metric, Callable[[Texts], Float[np.ndarray, " n"]]]] = {
    m.name: (m, column)
    for m, column in (
        (Metric("text_nll_ref", "nat", "lower", "-log p a token of the text under the 16-bit model"), _nll("nll_ref")),
        (Metric("text_nll", "nat", "lower", "-log p a token of the text under the model that wrote it"), _nll("nll")),
        (Metric("repetition", "%", "lower", "share of 4-grams that the text holds already"), repetition),
        (Metric("loops", "%", "lower", "texts that end in a loop"), loops),
        (Metric("runaway", "%", "lower", "texts that were cut, not ended"), lambda t: (~t.stopped).astype(np.float64)),
        (Metric("length", "token", "higher", "tokens written"), lambda t: t.length.astype(np.float64)),
    )
}  # fmt: skip
"""Metrics that are means over texts."""


def level(metric: str, texts: Texts, confidence: float = 0.95) -> Interval:
    """Mean over prompts of the mean of a prompt's texts, clustered by prompt; raw units (shares, nats, tokens)."""
    return _mean(PER_TEXT[metric][1](texts), texts.prompt, confidence)


def shift(metric: str, reference: Texts, candidate: Texts, confidence: float = 0.95) -> Interval:
    """Paired difference, candidate less reference: by prompt and seed, then averaged within each prompt."""
    reference.require_paired(candidate)
    column = PER_TEXT[metric][1]
    return _mean(column(candidate) - column(reference), reference.prompt, confidence)


def shift_by_prompt(metric: str, reference: Texts, candidate: Texts) -> Float[np.ndarray, " prompts"]:
    """The same as a number a prompt, in the order of their numbers."""
    reference.require_paired(candidate)
    column = PER_TEXT[metric][1]
    return _by_prompt(column(candidate) - column(reference), reference.prompt)


def divergence(reference: Texts, candidate: Texts) -> Divergence:
    """Where each text first differs from the reference's of the same prompt and seed.

    A text that ends differs from one that goes on; two that end alike, or are cut alike, are censored there.
    """
    reference.require_paired(candidate)
    steps = min(reference.token.shape[1], candidate.token.shape[1])
    differ = reference.token[:, :steps] != candidate.token[:, :steps]
    diverged = differ.any(1)
    position = np.where(diverged, differ.argmax(1) + 1, np.minimum(reference.length, steps))
    return Divergence(position, diverged, reference.prompt)


def _mean(value: Float[np.ndarray, " n"], prompt: Int32[np.ndarray, " n"], level: float) -> Interval:
    means = _by_prompt(value, prompt)
    found = paired_mean(means, np.arange(len(means)), level)
    return found._replace(n=len(value))


def _by_prompt(value: Float[np.ndarray, " n"], prompt: Int32[np.ndarray, " n"]) -> Float[np.ndarray, " prompts"]:
    _, member = np.unique(prompt, return_inverse=True)
    found: Float[np.ndarray, " prompts"] = np.bincount(member, value) / np.bincount(member)
    return found


def _grams(texts: Texts, n: int) -> list[list[tuple[int, ...]]]:
    rows = [row[:length].tolist() for row, length in zip(texts.token, texts.length, strict=True)]
    return [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
