"""Dialogue: two turns, held against what the reference wrote."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.evaluation.tasks import schemas
from lowbit.evaluation.tasks.base import Question, Task, Value
from lowbit.evaluation.tasks.measures import AGREEMENT, REFERENCE_NLL, RUNAWAY


def ask_turns(value: Value, shots: Sequence[Value]) -> Question:
    """The user's turns; the second is asked behind the reference's answer to the first, so that both models read
    the same text."""
    return Question(value["id"], value["id"], value.get("category") or "", turns=tuple(value["turns"]))


TASKS = (
    Task("mt_bench", "dialogue", "dialogue/mt_bench.jsonl", schemas.DIALOGUE, "dialogue", ask_turns,
         (AGREEMENT, REFERENCE_NLL, RUNAWAY), new_tokens=256, about="80 conversations of two turns"),
)  # fmt: skip
