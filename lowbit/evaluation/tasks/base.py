"""What a task is: one frozen dataclass of data, one function that asks, and where text is written one that grades."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lowbit import digest
from lowbit.evaluation.metrics.items import NO_ROLE
from lowbit.evaluation.tasks.measures import ACCURACY, Measure
from lowbit.evaluation.tasks.schemas import Schema

Kind = Literal["choice", "cloze", "generation", "code", "dialogue"]
"""choice      the likeliest of several texts
cloze       whether greedy writes exactly the one text
generation  text is written, an answer is looked for in it
code        text is written, and run together with tests
dialogue    text is written in two turns, and held against the reference's"""

Value = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One line of a task's data, checked against its schema; ``where`` is its file and line."""

    value: Value
    where: str

    @property
    def digest(self) -> str:
        """Of the record as read, 16 hex digits."""
        return digest.of_value(dict(self.value))[:16]


class Option(NamedTuple):
    """A text to be scored behind its context; behind the tokenizer's begin token where the context is empty."""

    context: str
    text: str
    true: bool = False
    role: int = NO_ROLE


@dataclass(frozen=True)
class Question:
    """What a model is asked about one record: options to be scored, or a prompt to be continued (one of them is set).

    ``cluster`` names what makes questions depend on each other; ``group`` is the task's label of the item.
    """

    id: str
    cluster: str
    group: str = ""
    options: tuple[Option, ...] = ()
    prompt: str = ""
    turns: tuple[str, ...] = ()


class Grade(NamedTuple):
    """Score in [0, 1], the answer found in the text, and whether one was found."""

    score: float
    answer: str
    parse_ok: bool


Ask = Callable[[Value, Sequence[Value]], Question]
"""From a record and the examples to show before it (the task's own shots, all of them)."""
Grader = Callable[[Value, str], Grade]


@dataclass(frozen=True)
class Task:
    """A task as data; ``ask`` and ``grade`` are its only code.

    ``file`` is the place below the data folder, ``shots_file`` that of its examples, of which ``shots`` are shown.
    Prompts are plain text, without a chat template, but for dialogue.
    """

    name: str
    family: str
    file: str
    schema: Schema
    kind: Kind
    ask: Ask
    measures: tuple[Measure, ...] = (ACCURACY,)
    grade: Grader | None = None
    stops: tuple[str, ...] = ()
    new_tokens: int = 0
    shots_file: str = ""
    shots: int = 0
    about: str = ""
    make: Callable[[Any, Sequence[int]], Iterator[Record]] | None = None
    """Generates the records from a tokenizer and lengths in tokens, where there is no file."""

    @property
    def definition(self) -> str:
        """Digest of everything but the records and the code."""
        parts = [self.name, self.file, self.kind, list(self.stops), self.new_tokens, self.shots_file, self.shots]
        return digest.of_value([*parts, self.schema.name, [m.name for m in self.measures]])


def choices(value: Value, context: str, texts: Sequence[str], answer: int, **more: Any) -> Question:
    """A question with one right choice, each behind one space."""
    options = tuple(Option(context, f" {text}", i == answer) for i, text in enumerate(texts))
    return Question(value["id"], more.pop("cluster", value["id"]), options=options, **more)
