"""What is asked of a batch, and what comes back while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lowbit.errors import LowbitError, RecipeError
from lowbit.runtime.sampling import GREEDY, Sampling, Token

Reason = Literal["stop", "length"]
Trouble = Literal["timeout", "shutdown", "model"]


class Busy(LowbitError):
    """The queue is full."""


class Progress(NamedTuple):
    """New text, and the tokens since the last event (text that may still change comes with a later one)."""

    text: str
    tokens: tuple[Token, ...]


class Scored(NamedTuple):
    """The tokens of the prompt; the first has no probability."""

    tokens: tuple[Token, ...]


class Done(NamedTuple):
    """The end. ``written`` counts every token that the model made, an end token too."""

    reason: Reason
    read: int
    written: int


class Failed(NamedTuple):
    """The end of a request that could not be finished."""

    trouble: Trouble
    message: str


Event = Progress | Scored | Done | Failed


@dataclass(frozen=True)
class Request:
    """A prompt of token ids and what is wanted of it. ``on_event`` is called by the engine's thread.

    ``logprobs``: so many of the likeliest tokens beside each (0: its own probability only; None: none); ``score``: of
    the prompt's tokens too. ``deadline``: a time of ``time.monotonic``. ``ends``: tokens that end the text, besides
    the model's own unless ``ignore_end``. Raises RecipeError for a prompt without tokens.
    """

    prompt: tuple[int, ...]
    on_event: Callable[[Event], object] = lambda _: None
    sampling: Sampling = GREEDY
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    ignore_end: bool = False
    logprobs: int | None = None
    score: bool = False
    deadline: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt or self.max_tokens < 0:
            raise RecipeError(f"a prompt of {len(self.prompt)} tokens, {self.max_tokens} new ones", where="request")
