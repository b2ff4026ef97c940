"""Basic language tasks: commonsense and reading, by the likelihood of choices; and LAMBADA's last word."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.evaluation.tasks import schemas
from lowbit.evaluation.tasks.base import Option, Question, Task, Value, choices
from lowbit.evaluation.tasks.measures import ACCURACY, LENGTH_NORMALISED, TARGET_NLL


def ask_choice(value: Value, shots: Sequence[Value]) -> Question:
    """The likeliest choice behind the context."""
    return choices(value, value["context"], value["choices"], value["answer"])


def ask_passage(value: Value, shots: Sequence[Value]) -> Question:
    """The same; questions about one passage (all lines but the last two) depend on each other."""
    passage = value["context"].rpartition("\nQuestion:")[0]
    return choices(value, value["context"], value["choices"], value["answer"], cluster=passage or value["id"])


def ask_contexts(value: Value, shots: Sequence[Value]) -> Question:
    """The context behind which the one continuation is likeliest.

    Twin sentences, which differ in one word that turns the answer round, are one cluster: they begin alike.
    """
    options = tuple(
        Option(context, value["continuation"], i == value["answer"]) for i, context in enumerate(value["contexts"])
    )
    return Question(value["id"], " ".join(value["contexts"][0].split()[:_ALIKE]), options=options)


def ask_cloze(value: Value, shots: Sequence[Value]) -> Question:
    """One target behind its context."""
    return Question(value["id"], value["id"], options=(Option(value["context"], f" {value['target']}", True),))


_ALIKE = 6  # words; in WinoGrande's files no more than two sentences share so many
_BOTH = (ACCURACY, LENGTH_NORMALISED)


def _choice(name: str, about: str) -> Task:
    return Task(name, "basic", f"basic/{name}.jsonl", schemas.CHOICE, "choice", ask_choice, _BOTH, about=about)


TASKS = (
    _choice("hellaswag", "how a description goes on"),
    _choice("piqa", "how to do everyday things"),
    Task("winogrande", "basic", "basic/winogrande.jsonl", schemas.CHOICE_CTX, "choice", ask_contexts,
         about="whom a pronoun means: one continuation behind two contexts"),
    _choice("arc_easy", "school science, easy"),
    _choice("arc_challenge", "school science, hard"),
    Task("boolq", "basic", "basic/boolq.jsonl", schemas.CHOICE, "choice", ask_passage, about="yes or no of a passage"),
    _choice("copa", "cause or effect"),
    Task("lambada", "basic", "lm/lambada_openai.jsonl", schemas.CLOZE, "cloze", ask_cloze, (ACCURACY, TARGET_NLL),
         about="the last word of a passage"),
)  # fmt: skip
