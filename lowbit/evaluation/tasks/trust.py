"""Truth, bias, morals, adversaries. Stereotyped sentences are in the data by design."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.evaluation.metrics.items import BIASED, COUNTER, NO_ROLE, UNRELATED
from lowbit.evaluation.tasks import schemas
from lowbit.evaluation.tasks.base import Option, Question, Task, Value, choices
from lowbit.evaluation.tasks.basic import ask_choice
from lowbit.evaluation.tasks.measures import (
    ACCURACY,
    AMBIGUOUS,
    AMBIGUOUS_BIAS,
    DISAMBIGUATED,
    DISAMBIGUATED_BIAS,
    ICAT,
    LANGUAGE_MODEL,
    LENGTH_NORMALISED,
    MASS,
    STEREOTYPE,
    TOKEN_NORMALISED,
)  # fmt: skip


def ask_several(value: Value, shots: Sequence[Value]) -> Question:
    """Choices of which several are true."""
    options = tuple(
        Option(value["context"], f" {text}", bool(label))
        for text, label in zip(value["choices"], value["labels"], strict=True)
    )
    return Question(value["id"], value["id"], value.get("category") or "", options)


def ask_bbq(value: Value, shots: Sequence[Value]) -> Question:
    """Three answers, one of them "unknown". Questions with the same words come from one template and depend.

    The biased answer is the stereotyped group in negative questions and the other group in the others; where the data
    do not say which group that is, no choice has a role but "unknown".
    """
    unknown, group = value["unknown_choice"], value.get("stereotyped_group_choice")
    roles = [UNRELATED if i == unknown else NO_ROLE for i in range(len(value["choices"]))]
    if group is not None and group != unknown:
        negative = value["question_polarity"] == "neg"
        for i in range(len(roles)):
            if i != unknown:
                roles[i] = BIASED if (i == group) == negative else COUNTER
    asked = value["context"].rpartition("Question:")[2]
    options = tuple(
        Option(value["context"], f" {text}", i == value["answer"], role)
        for i, (text, role) in enumerate(zip(value["choices"], roles, strict=True))
    )
    return Question(value["id"], f"{value['category']}:{asked}", value["context_condition"], options)


def ask_pair(value: Value, shots: Sequence[Value]) -> Question:
    """Whole sentences, without a context. Sentences about one word depend on each other."""
    options = [Option("", value["stereotyped"], role=BIASED), Option("", value["anti_stereotyped"], role=COUNTER)]
    if "unrelated" in value:
        options.append(Option("", value["unrelated"], role=UNRELATED))
    cluster = value.get("target") or value["id"]
    return Question(value["id"], cluster, value.get("bias_type") or "", tuple(options))


def ask_preference(value: Value, shots: Sequence[Value]) -> Question:
    """Two whole texts, the preferred one should be likelier."""
    return Question(
        value["id"], value["id"], options=(Option("", value["preferred"], True), Option("", value["dispreferred"]))
    )


def ask_adversary(value: Value, shots: Sequence[Value]) -> Question:
    """A choice, labelled by its task of GLUE."""
    return choices(value, value["context"], value["choices"], value["answer"], group=value["task"])


def _ethics(part: str) -> Task:
    name = f"ethics_{part}"
    return Task(name, "trust", f"trust/{name}.jsonl", schemas.CHOICE, "choice", ask_choice, about=f"morals: {part}")


TASKS = (
    Task("truthfulqa_mc1", "trust", "trust/truthfulqa_mc1.jsonl", schemas.CHOICE, "choice", ask_choice,
         (ACCURACY, LENGTH_NORMALISED), about="the one best answer against common errors"),
    Task("truthfulqa_mc2", "trust", "trust/truthfulqa_mc2.jsonl", schemas.MULTI_TRUE, "choice", ask_several, (MASS,),
         about="probability on all true answers"),
    Task("bbq", "trust", "trust/bbq.jsonl", schemas.BBQ, "choice", ask_bbq,
         (AMBIGUOUS, DISAMBIGUATED, AMBIGUOUS_BIAS, DISAMBIGUATED_BIAS), about="whether stereotypes decide answers"),
    Task("crows_pairs", "trust", "trust/crows_pairs.jsonl", schemas.PAIR, "choice", ask_pair, (STEREOTYPE,),
         about="which of two sentences is likelier, the stereotyped one or its opposite"),
    Task("stereoset", "trust", "trust/stereoset.jsonl", schemas.TRIPLE, "choice", ask_pair,
         (STEREOTYPE, LANGUAGE_MODEL, ICAT), about="the same, beside a meaningless sentence"),
    *(_ethics(part) for part in ("commonsense", "deontology", "justice", "virtue")),
    Task("ethics_utilitarianism", "trust", "trust/ethics_utilitarianism.jsonl", schemas.PREFERENCE, "choice",
         ask_preference, (ACCURACY, TOKEN_NORMALISED), about="which of two events is more pleasant"),
    Task("advglue", "trust", "trust/advglue.jsonl", schemas.OF_ADVERSARY, "choice", ask_adversary,
         about="GLUE sentences changed to mislead"),
    Task("advglue_original", "trust", "trust/advglue_original.jsonl", schemas.OF_ADVERSARY, "choice", ask_adversary,
         about="the same records (ids) before the change; with it the adversarial drop is reported"),
)  # fmt: skip
