"""A model's answers to a task: from records to Items, through the Scorer alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lowbit import digest
from lowbit.errors import EvidenceError
from lowbit.evaluation import sandbox
from lowbit.evaluation.generation import Limits, Written
from lowbit.evaluation.metrics.items import Items
from lowbit.evaluation.scorer import Scorer
from lowbit.evaluation.tasks.base import Grade, Question, Record, Task, Value
from lowbit.evaluation.tokens import Pair, Reader

OnItems = Callable[[int], object]


@dataclass(frozen=True)
class Asked:
    """A task ready to be put to models that share a tokenizer; ``too_long`` are ids of questions that were left out."""

    task: Task
    records: tuple[Record, ...]
    questions: tuple[Question, ...]
    too_long: tuple[str, ...]
    digest: str

    def only(self, rows: Sequence[int]) -> Asked:
        """The questions at these places, as a task of its own."""
        some = tuple(self.records[i] for i in rows), tuple(self.questions[i] for i in rows)
        return Asked(self.task, *some, self.too_long, digest.of_value([self.digest, list(rows)]))


def ask(
    task: Task, records: Sequence[Record], shots: Sequence[Value], reader: Reader, longest: int | None,
    *, drop_long: bool = False,
) -> Asked:  # fmt: skip
    """The questions of a task. Raises EvidenceError for one that does not fit into ``longest`` tokens, answer included.

    Cutting a prompt would make it another task, and without a word; with ``drop_long`` such questions are left out.
    """
    kept: list[tuple[Record, Question]] = []
    long: list[str] = []
    for record in records:
        question = task.ask(record.value, shots)
        size = 0 if longest is None else _size(task, question, reader)
        if longest is None or size <= longest:
            kept.append((record, question))
            continue
        if not drop_long:
            raise EvidenceError(
                f"{size} tokens with its answer, the model reads at most {longest}",
                where=f"{task.name}, {question.id}",
                why="a prompt that is cut is another question",
                fix="--drop-long (in a study tasks.drop_long) leaves such questions out and says how many" + (
                    f", --shots (tasks.shots) shows fewer than {task.shots} examples" if task.shots > 1 else ""),
            )  # fmt: skip
        long.append(question.id)
    if len(kept) < 2:
        raise EvidenceError(
            f"{len(kept)} of {len(records)} questions are left, {len(long)} were too long", where=task.name,
            why="a comparison needs two at least", fix="a model that reads more, or more records",
        )  # fmt: skip
    shown = [dict(shot) for shot in shots]
    identity = digest.of_value([task.definition, [record.digest for record, _ in kept], digest.of_value([*shown])])
    return Asked(task, tuple(r for r, _ in kept), tuple(q for _, q in kept), tuple(long), identity)


def answer(
    scorer: Scorer, reader: Reader, asked: Asked, *, reference: Items | None = None, allow_code: bool = False,
    on_items: OnItems = lambda _: None,
) -> Items:  # fmt: skip
    """One model's answers; ``on_items`` is told how many items are done since.

    ``reference``: for dialogue, the items of the model it is held against; without them it is the reference itself.
    Raises EvidenceError where generated code would have to run and ``allow_code`` is not set.
    """
    kind = asked.task.kind
    if kind == "code" and not allow_code:
        raise EvidenceError(
            "its answers are programs, which are run with tests", where=asked.task.name,
            why="code that a model wrote is untrusted",
            fix="--allow-code (in a study tasks.allow_code) runs it in a process of its own without network",
        )  # fmt: skip
    if kind in ("choice", "cloze"):
        return _scored(scorer, reader, asked, on_items)
    if kind == "dialogue":
        return _conversed(scorer, reader, asked, reference, on_items)
    return _written(scorer, reader, asked, on_items)


class _Row(NamedTuple):
    """One item, on its way into columns."""

    question: Question
    record: Record
    shown: str
    pred: int
    gold: int
    score: float
    margin: float
    written: Written | None = None
    grade: Grade = Grade(0.0, "", True)


class _Choice(NamedTuple):
    logprob: float
    tokens: int
    chars: int
    true: bool
    role: int


def _scored(scorer: Scorer, reader: Reader, asked: Asked, on_items: OnItems) -> Items:
    pairs = [reader.pair(o.context, o.text) for q in asked.questions for o in q.options]
    each = len(pairs) / len(asked.questions)  # progress in items; choices are scored in another order
    done = 0

    def count(choices: int) -> None:
        nonlocal done
        before, done = done, done + choices
        on_items(round(done / each) - round(before / each))

    found = scorer.log_likelihoods([(p.context, p.continuation) for p in pairs], count)
    rows, choices, at = [], [], 0
    for question, record in zip(asked.questions, asked.records, strict=True):
        mine = found[at : at + len(question.options)]
        sums = np.array([float(values.double().sum()) for values, _ in mine])
        options = [
            _Choice(float(s), len(values), len(o.text.strip()), o.true, o.role)
            for s, (values, _), o in zip(sums, mine, question.options, strict=True)
        ]
        at += len(mine)
        true = [i for i, option in enumerate(question.options) if option.true]
        gold = true[0] if len(true) == 1 else -1
        shown = "\0".join(f"{o.context}\0{o.text}" for o in question.options)
        if asked.task.kind == "cloze":
            said = mine[0][1]
            rows.append(_Row(question, record, shown, 0 if said else -1, 0, float(said), float(np.exp(sums[0]))))
        else:
            p = np.exp(sums - sums.max())
            p /= p.sum()
            second, first = np.sort(p)[-2:]
            pred = int(sums.argmax())
            score = float(p[true].sum()) if len(true) > 1 else float(pred == gold) if true else float(pred == 0)
            rows.append(_Row(question, record, shown, pred, gold, score, float(first - second)))
        choices.append(options)
    return _items(rows, choices)


def _written(scorer: Scorer, reader: Reader, asked: Asked, on_items: OnItems) -> Items:
    task = asked.task
    prompts = [reader.prompt(question.prompt) for question in asked.questions]
    limits = Limits(task.new_tokens, task.stops, scorer.ends(reader.tokenizer))
    found = scorer.generate(prompts, reader.tokenizer, limits, on_items)
    rows = []
    for question, record, written in zip(asked.questions, asked.records, found, strict=True):
        grade = _tested(record, written.text) if task.kind == "code" else _graded(task, record.value, written.text)
        rows.append(_Row(question, record, question.prompt, -1, -1, grade.score, written.margin, written, grade))
    return _items(rows, [[] for _ in rows])


def _graded(task: Task, value: Value, text: str) -> Grade:
    assert task.grade is not None  # every generation task has one
    return task.grade(value, text)


def _tested(record: Record, text: str) -> Grade:
    """Whether prompt and completion pass the record's tests."""
    value = record.value
    if not value["entry_point"].isidentifier():
        raise EvidenceError(f"{value['entry_point']!r} is no name of a function", where=record.where)
    program = f"{value['prompt']}{text}\n{value['test']}\ncheck({value['entry_point']})\n"
    ran = sandbox.run(program)
    return Grade(float(ran.passed), ran.how, True)


def _conversed(scorer: Scorer, reader: Reader, asked: Asked, reference: Items | None, on_items: OnItems) -> Items:
    """Every turn behind the reference's earlier answers, so that both models read the same text."""
    limits = Limits(asked.task.new_tokens, _TURN_STOPS, scorer.ends(reader.tokenizer))
    own: dict[str, Written] = {}
    theirs: dict[str, str] = {} if reference is None else {
        str(i): str(t) for i, t in zip(reference.id, reference.text, strict=True)
    }  # fmt: skip
    prompts: dict[str, tuple[str, list[int]]] = {}
    for turn in range(max(len(q.turns) for q in asked.questions)):
        names = []
        for q in asked.questions:
            if turn < len(q.turns):
                name = _turn_id(q, turn)
                said = [theirs[_turn_id(q, t)] for t in range(turn)]
                text = conversation(reader.tokenizer, q.turns[: turn + 1], said)
                prompts[name] = text, reader.prompt(text)
                names.append(name)
        found = scorer.generate([prompts[name][1] for name in names], reader.tokenizer, limits, on_items)
        own |= dict(zip(names, found, strict=True))
        if reference is None:
            theirs |= {name: written.text for name, written in zip(names, found, strict=True)}
    kept = {name: list(written.tokens) for name, written in own.items()}
    if reference is not None:
        kept = {str(name): reference.wrote(i).tolist() for i, name in enumerate(reference.id)}
    found_again = scorer.log_likelihoods([(prompts[name][1], kept[name]) for name in prompts])
    values = {name: float(v.double().sum()) for name, (v, _) in zip(prompts, found_again, strict=True)}
    rows, choices = [], []
    for q, record in zip(asked.questions, asked.records, strict=True):
        for turn in range(len(q.turns)):
            name = _turn_id(q, turn)
            share = agreement(own[name].tokens, kept[name]) / len(kept[name])
            question = Question(name, q.cluster, f"turn {turn + 1}")
            grade = Grade(share, "", True)
            rows.append(_Row(question, record, prompts[name][0], -1, -1, share, own[name].margin, own[name], grade))
            chars = len(theirs[name])
            choices.append([_Choice(values[name], len(kept[name]), chars, False, 0)])
    return _items(rows, choices)


_TURN_STOPS = ("\nUser:",)


def _turn_id(question: Question, turn: int) -> str:
    return f"{question.id}/{turn + 1}"


def agreement(written: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with: the position of the first divergence."""
    pairs = zip(written, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(written), len(other)))


def conversation(tokenizer: Any, turns: Sequence[str], answers: Sequence[str]) -> str:
    """A conversation up to the model's next turn, by its chat template; as "User:", "Assistant:" without one."""
    messages = []
    for i, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if i < len(answers):
            messages.append({"role": "assistant", "content": answers[i]})
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    names = {"user": "User", "assistant": "Assistant"}
    return "".join(f"{names[m['role']]}: {m['content']}\n" for m in messages) + "Assistant:"


def _size(task: Task, question: Question, reader: Reader) -> int:
    """Tokens that the model must read to answer: its longest option (all but the last token), or prompt and answer."""
    if question.options:
        pairs: list[Pair] = [reader.pair(o.context, o.text) for o in question.options]
        return max(len(p.context) + len(p.continuation) - 1 for p in pairs)
    if question.turns:  # answers of earlier turns may be as long as allowed
        text = conversation(reader.tokenizer, question.turns, [""] * (len(question.turns) - 1))
        return len(reader.prompt(text)) + len(question.turns) * task.new_tokens
    return len(reader.prompt(question.prompt)) + task.new_tokens


def _items(rows: Sequence[_Row], choices: Sequence[Sequence[_Choice]]) -> Items:
    flat = [choice for item in choices for choice in item]
    clusters: dict[str, int] = {}
    wrote = [() if r.written is None else r.written.tokens for r in rows]
    columns: dict[str, Any] = {
        "id": [r.question.id for r in rows], "group": [r.question.group for r in rows],
        "cluster": [clusters.setdefault(r.question.cluster, len(clusters)) for r in rows],
        "doc_hash": [r.record.digest for r in rows],
        "prompt_hash": [digest.of_bytes(r.shown.encode("utf-8", "surrogatepass"))[:16] for r in rows],
        "starts": np.concatenate([[0], np.cumsum([len(c) for c in choices])]),
        "pred": [r.pred for r in rows], "gold": [r.gold for r in rows], "score": [r.score for r in rows],
        "margin": [r.margin for r in rows], "length": [len(w) for w in wrote],
        "stop_reason": ["" if r.written is None else r.written.stop_reason for r in rows],
        "parse_ok": [r.grade.parse_ok for r in rows], "answer": [r.grade.answer for r in rows],
        "text": ["" if r.written is None else r.written.text for r in rows],
        "written_starts": np.concatenate([[0], np.cumsum([len(w) for w in wrote])]),
        "written": [token for w in wrote for token in w],
    }  # fmt: skip
    for k, name in enumerate(_Choice._fields):
        columns[name] = [choice[k] for choice in flat]
    return Items.of(columns)
