"""How rows of public data sets become records: one line a task, one function a shape.

Field names are those that the sets' cards and lm-eval's task files give. The texts that a model reads are those of the
task's own file (``Question: ...``), so that a set from a hub and a file of the same rows ask the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.evaluation.tasks import schemas
from lowbit.evaluation.tasks.schemas import Schema

Row = Mapping[str, Any]


@dataclass(frozen=True)
class HubSet:
    """A task's rows on a hub; ``columns`` are the fields of a row that ``make`` reads.

    ``make`` gives a record without its id. ``examples`` is the split whose first ``shots`` rows (None: all) are shown
    before a question, ``shots_file`` their place below a data folder.
    """

    task: str
    file: str
    repo: str
    config: str | None
    schema: Schema
    columns: tuple[str, ...]
    make: Callable[[Row], dict[str, Any]]
    examples: str = ""
    shots: int | None = None
    shots_file: str = ""


def _arc(row: Row) -> dict[str, Any]:
    choices, labels = row["choices"]["text"], row["choices"]["label"]
    return _choice(f"Question: {row['question']}\nAnswer:", list(choices), list(labels).index(row["answerKey"]))


def _hellaswag(row: Row) -> dict[str, Any]:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _choice(_plain(context), [_plain(ending) for ending in row["endings"]], int(row["label"]))


def _plain(text: str) -> str:
    """HellaSwag's texts without the marks of the pages that they come from."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ").strip()


def _piqa(row: Row) -> dict[str, Any]:
    return _choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _winogrande(row: Row) -> dict[str, Any]:
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError(f"no blank in {row['sentence']!r}")
    return {
        "contexts": [before + row["option1"], before + row["option2"]], "continuation": after,
        "answer": int(row["answer"]) - 1,
    }  # fmt: skip


def _boolq(answer: str) -> Callable[[Row], dict[str, Any]]:
    def make(row: Row) -> dict[str, Any]:
        return _choice(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(row[answer]))

    return make


def _copa(row: Row) -> dict[str, Any]:
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [choice[0].lower() + choice[1:] for choice in (row["choice1"], row["choice2"])]
    return _choice(f"{row['premise'].strip().removesuffix('.')}, {word}", choices, int(row["label"]))


def _lambada(row: Row) -> dict[str, Any]:
    context, _, target = row["text"].rpartition(" ")
    return {"context": context, "target": target}


def _mmlu(row: Row) -> dict[str, Any]:
    return {**_choice(row["question"], list(row["choices"]), int(row["answer"])), "subject": row["subject"]}


def _gsm8k(row: Row) -> dict[str, Any]:
    rationale, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("no '####' before the answer")
    return {"prompt": row["question"], "answer": answer.strip().replace(",", ""), "rationale": rationale.strip()}


def _truthful_one(row: Row) -> dict[str, Any]:
    found = row["mc1_targets"]
    return _choice(f"Q: {row['question']}\nA:", list(found["choices"]), list(found["labels"]).index(1))


def _truthful_all(row: Row) -> dict[str, Any]:
    found = row["mc2_targets"]
    labels = [int(label) for label in found["labels"]]
    return {"context": f"Q: {row['question']}\nA:", "choices": list(found["choices"]), "labels": labels}


def _humaneval(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ("prompt", "entry_point", "test")}


def _choice(context: str, choices: list[str], answer: int) -> dict[str, Any]:
    if answer < 0:  # how hidden answers of test splits are written
        raise ValueError(f"the answer is {answer}")
    return {"context": context, "choices": choices, "answer": answer}


SETS = (
    HubSet("arc_easy", "basic/arc_easy.jsonl", "allenai/ai2_arc", "ARC-Easy", schemas.CHOICE,
           ("question", "choices", "answerKey"), _arc),
    HubSet("arc_challenge", "basic/arc_challenge.jsonl", "allenai/ai2_arc", "ARC-Challenge", schemas.CHOICE,
           ("question", "choices", "answerKey"), _arc),
    HubSet("hellaswag", "basic/hellaswag.jsonl", "Rowan/hellaswag", None, schemas.CHOICE,
           ("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),
    HubSet("piqa", "basic/piqa.jsonl", "baber/piqa", None, schemas.CHOICE, ("goal", "sol1", "sol2", "label"), _piqa),
    HubSet("winogrande", "basic/winogrande.jsonl", "allenai/winogrande", "winogrande_xl", schemas.CHOICE_CTX,
           ("sentence", "option1", "option2", "answer"), _winogrande),
    HubSet("boolq", "basic/boolq.jsonl", "google/boolq", None, schemas.CHOICE,
           ("passage", "question", "answer"), _boolq("answer")),
    HubSet("boolq", "basic/boolq.jsonl", "aps/super_glue", "boolq", schemas.CHOICE,
           ("passage", "question", "label"), _boolq("label")),
    HubSet("copa", "basic/copa.jsonl", "aps/super_glue", "copa", schemas.CHOICE,
           ("premise", "choice1", "choice2", "question", "label"), _copa),
    HubSet("lambada", "lm/lambada_openai.jsonl", "EleutherAI/lambada_openai", "default", schemas.CLOZE,
           ("text",), _lambada),
    HubSet("mmlu", "emergent/mmlu.jsonl", "cais/mmlu", "all", schemas.MMLU,
           ("question", "subject", "choices", "answer"), _mmlu, "dev", None, "emergent/mmlu_dev_5shot.jsonl"),
    HubSet("gsm8k", "emergent/gsm8k.jsonl", "openai/gsm8k", "main", schemas.GENERATION,
           ("question", "answer"), _gsm8k, "train", 5, "emergent/gsm8k_fewshot.jsonl"),
    HubSet("truthfulqa_mc1", "trust/truthfulqa_mc1.jsonl", "truthfulqa/truthful_qa", "multiple_choice", schemas.CHOICE,
           ("question", "mc1_targets"), _truthful_one),
    HubSet("truthfulqa_mc2", "trust/truthfulqa_mc2.jsonl", "truthfulqa/truthful_qa", "multiple_choice",
           schemas.MULTI_TRUE, ("question", "mc2_targets"), _truthful_all),
    HubSet("humaneval", "emergent/humaneval.jsonl", "openai/openai_humaneval", None, schemas.CODE,
           ("prompt", "entry_point", "test"), _humaneval),
)  # fmt: skip
