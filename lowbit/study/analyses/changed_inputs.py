"""The changed questions to look at, with their texts, for the analysis of disagreement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lowbit.evaluation.metrics import disagreement as dis
from lowbit.evaluation.tasks.base import Question
from lowbit.report.table import Cell, Column, Row, Table
from lowbit.study.analyses.answered import Part, Version
from lowbit.study.task_table import prompt_of, questions

_EACH = 8
"""Questions of one candidate."""
_LONGEST = 240
"""Characters of a prompt: its end, where the question is."""


def table(versions: Sequence[Version]) -> Table:
    """Of every candidate the changed questions that the original was least sure of, the least sure first."""
    texts: dict[str, Mapping[str, Question]] = {}
    rows = []
    for version in versions:
        found = sorted(_changed(version), key=lambda one: one[0])[:_EACH]
        for margin, part, i in found:
            if part.task not in texts:
                texts[part.task] = questions(part.pair.task, None)
            name = str(part.pair.reference.id[i])
            question = texts[part.task].get(name)
            answers = (_answer(question, int(side.chosen[i])) for side in (part.reference, part.candidate))
            right = ["right" if side.correct[i] else "wrong" for side in (part.reference, part.candidate)]
            said = (Cell(words, verdict) for words, verdict in zip(answers, right, strict=True))
            rows.append(
                Row((Cell(version.label), Cell(part.task, name), Cell(_prompt(question)), Cell(f"{margin:.3f}"), *said))
            )
    columns = (
        Column("Version", numeric=False), Column("Task", numeric=False), Column("Question", numeric=False),
        Column("Margin of the original"), Column("Original", numeric=False), Column("Candidate", numeric=False),
    )  # fmt: skip
    return Table(columns, tuple(rows))


def _changed(version: Version) -> Iterator[tuple[float, Part, int]]:
    for part in version.parts:
        changed = np.flatnonzero(dis.disagrees(part.reference, part.candidate))
        risk = dis.margin(part.reference.p)[changed]
        for k in dis.riskiest(risk, _EACH):
            yield float(-risk[k]), part, int(changed[k])


def _prompt(question: Question | None) -> str:
    """What is asked, from its end; empty where the records are no file."""
    words = "" if question is None else prompt_of(question)
    return words if len(words) <= _LONGEST else f"… {words[-_LONGEST:]}"


def _answer(question: Question | None, chosen: int) -> str:
    """The choice in words: its text, or its context where that is what differs; its number without the file."""
    if question is None:
        return f"choice {chosen}"
    option = question.options[chosen]
    return option.text.strip() if len({o.context for o in question.options}) == 1 else option.context
