"""A model as judge of two answers, over any OpenAI-compatible endpoint; an instrument whose own noise is measured.

Every pair is judged three times: reference first, candidate first, and reference first again. A win counts only where
both orders agree; the share of verdicts that turn with the order is the judge's bias for places, and the share that
differ when the same is asked again is its noise. Both stand beside the result.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lowbit.errors import EvidenceError
from lowbit.evaluation.statistics import Interval, paired_mean

_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_LARGEST = 1 << 20  # bytes of a reply
_ASK = """Two assistants answered the last message of this conversation. Judge which answer is more helpful, correct and
relevant. Do not let length or order influence you. Give one sentence of reasons, then [[A]] if assistant A is better,
[[B]] if assistant B is better, or [[C]] for a tie.

{conversation}

[Assistant A]
{a}
[End of A]

[Assistant B]
{b}
[End of B]"""


class Duel(NamedTuple):
    """A conversation and two answers to its last message."""

    conversation: str
    reference: str
    candidate: str
    cluster: int


@dataclass(frozen=True)
class Judged:
    """What the judge said: ``score`` is +1 for a win of the candidate, -1 for a loss, 0 for a tie, on average."""

    score: Interval
    wins: int
    losses: int
    ties: int
    turned: float
    """Share of pairs whose verdict turned with the order of the answers."""
    noise: float
    """Share of pairs whose verdict differed when the same was asked again."""
    unread: int
    """Replies without a verdict, counted as ties."""


@dataclass(frozen=True)
class Judge:
    """An endpoint: its base URL (``http://host:8000/v1``) and the model's name there.

    The key is read from the environment variable ``OPENAI_API_KEY``, where the endpoint wants one.
    """

    url: str
    model: str
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise EvidenceError(f"{self.url!r} is no http address", where="--judge", fix="http://localhost:8000/v1")

    def ask(self, prompt: str) -> str:
        """The reply to a message. Raises EvidenceError where the endpoint is down, refuses, or answers otherwise."""
        where = f"{self.url.rstrip('/')}/chat/completions"
        body = {"model": self.model, "temperature": 0, "max_tokens": 256,
                "messages": [{"role": "user", "content": prompt}]}  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(where, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                text = json.loads(reply.read(_LARGEST))["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise EvidenceError(
                f"the judge answers {error.code} {error.reason}", where=where, fix="the model's name and OPENAI_API_KEY"
            ) from error
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise EvidenceError(
                f"the judge does not answer: {error}", where=where, why="no verdict is made up in its place",
                fix="start the endpoint, or leave --judge out",
            ) from error  # fmt: skip
        return str(text)


def judge(
    duels: Sequence[Duel], ask: Callable[[str], str], on_done: Callable[[int], object] = lambda _: None
) -> Judged:
    """Three replies a pair; ``on_done`` is told of every pair. Raises EvidenceError for fewer than two clusters."""
    verdicts: list[tuple[str | None, str | None, str | None]] = []
    for duel in duels:
        first = _verdict(ask(_ASK.format(conversation=duel.conversation, a=duel.reference, b=duel.candidate)))
        second = _verdict(ask(_ASK.format(conversation=duel.conversation, a=duel.candidate, b=duel.reference)))
        again = _verdict(ask(_ASK.format(conversation=duel.conversation, a=duel.reference, b=duel.candidate)))
        verdicts.append((first, second, again))
        on_done(1)
    direct = np.array([_VALUE[first] for first, _, _ in verdicts])
    swapped = np.array([-_VALUE[second] for _, second, _ in verdicts])
    repeated = np.array([_VALUE[again] for _, _, again in verdicts])
    score = np.where(direct == swapped, direct, 0.0)
    return Judged(
        paired_mean(score, np.array([duel.cluster for duel in duels])), int(np.sum(score > 0)), int(np.sum(score < 0)),
        int(np.sum(score == 0)), float(np.mean(direct != swapped)), float(np.mean(direct != repeated)),
        sum(v is None for three in verdicts for v in three),
    )  # fmt: skip


_VALUE = {"A": -1.0, "B": 1.0, "C": 0.0, None: 0.0}
"""Of the candidate, where the reference is A."""


def _verdict(reply: str) -> str | None:
    found = _VERDICT.findall(reply)
    return found[-1] if found else None
