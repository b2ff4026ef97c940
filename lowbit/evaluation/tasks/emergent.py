"""Tasks that small models fail: knowledge (MMLU), reasoning in steps (GSM8K, SVAMP, BBH, MATH), code (HumanEval)."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.evaluation.tasks import answers, schemas
from lowbit.evaluation.tasks.base import Option, Question, Task, Value
from lowbit.evaluation.tasks.measures import ACCURACY, PARSED, RUNAWAY

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def ask_letters(value: Value, shots: Sequence[Value]) -> Question:
    """Lettered choices behind examples of the same subject; the letters are scored, not the texts."""
    subject = value["subject"]
    mine = [shot for shot in shots if shot.get("subject") == subject]
    title = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {title}.\n\n"
    shown = "".join(f"{_lettered(shot)} {_LETTERS[shot['answer']]}\n\n" for shot in mine)
    context = f"{head}{shown}{_lettered(value)}"
    letters = _LETTERS[: len(value["choices"])]
    options = tuple(Option(context, f" {letter}", i == value["answer"]) for i, letter in enumerate(letters))
    return Question(value["id"], subject, subject, options)


def _lettered(value: Value) -> str:
    lines = "".join(f"{letter}. {text}\n" for letter, text in zip(_LETTERS, value["choices"], strict=False))
    return f"{value['context'].strip()}\n{lines}Answer:"


def ask_steps(value: Value, shots: Sequence[Value]) -> Question:
    """A word problem behind solved ones, each solution ending in "#### answer"."""
    shown = "".join(
        f"Question: {shot['prompt']}\nAnswer: {shot.get('rationale', '')}\n#### {shot['answer']}\n\n" for shot in shots
    )
    return Question(value["id"], value["id"], prompt=f"{shown}Question: {value['prompt']}\nAnswer:")


def ask_chain(value: Value, shots: Sequence[Value]) -> Question:
    """BIG-Bench Hard: the three worked examples of the record's task, then the question, answered in steps."""
    task = value["task"]
    examples = "".join(f"{shot['prompt'].strip()}\n\n" for shot in shots if shot["task"] == task)
    return Question(value["id"], task, task, prompt=f"{examples}Q: {value['prompt']}\nA: Let's think step by step.\n")


def ask_formula(value: Value, shots: Sequence[Value]) -> Question:
    r"""A problem whose answer is to be put into \boxed{}."""
    prompt = f"Problem:\n{value['prompt']}\n\nSolve it in steps and put the final answer into \\boxed{{}}.\n\nSolution:"
    return Question(value["id"], value["id"], value.get("category") or "", prompt=prompt)


def ask_code(value: Value, shots: Sequence[Value]) -> Question:
    """The body of a function, behind its signature and description."""
    return Question(value["id"], value["id"], prompt=value["prompt"])


_WRITTEN = (ACCURACY, PARSED, RUNAWAY)

TASKS = (
    Task("mmlu", "emergent", "emergent/mmlu.jsonl", schemas.MMLU, "choice", ask_letters,
         shots_file="emergent/mmlu_dev_5shot.jsonl", shots=5, about="57 subjects, lettered choices, 5 shots each"),
    Task("gsm8k", "emergent", "emergent/gsm8k.jsonl", schemas.GENERATION, "generation", ask_steps, _WRITTEN,
         answers.number, ("Question:",), 256, "emergent/gsm8k_fewshot.jsonl", 5, "word problems in steps"),
    Task("svamp", "emergent", "emergent/svamp.jsonl", schemas.GENERATION, "generation", ask_steps, _WRITTEN,
         answers.number, ("Question:",), 256, "emergent/gsm8k_fewshot.jsonl", 5, "short word problems"),
    Task("bbh", "emergent", "emergent/bbh.jsonl", schemas.OF_TASK, "generation", ask_chain, _WRITTEN,
         answers.conclusion, ("\n\nQ:", "\nQ:"), 512, "emergent/bbh_cot_prompts.jsonl", 1,
         "27 tasks of BIG-Bench Hard, three worked examples each"),
    Task("math", "emergent", "emergent/math.jsonl", schemas.GENERATION, "generation", ask_formula, _WRITTEN,
         answers.formula, ("\nProblem:",), 512, about="competition mathematics, no shots"),
    Task("humaneval", "emergent", "emergent/humaneval.jsonl", schemas.CODE, "code", ask_code, (ACCURACY, RUNAWAY),
         None, ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("), 384, about="functions, judged by their tests"),
)  # fmt: skip
