"""Tasks: what is asked, how answers are found, which files are refused, and a comparison from end to end."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import family_model, save_model

from lowbit.cli import main
from lowbit.errors import EvidenceError
from lowbit.evaluation import answering, generation, lmeval_items, tokens
from lowbit.evaluation.head import Head
from lowbit.evaluation.metrics.items import BIASED, COUNTER, UNRELATED
from lowbit.evaluation.scorer import Scorer
from lowbit.evaluation.tasks import answers, emergent, long, readers, registry, trust
from lowbit.evaluation.tasks.base import Record
from lowbit.evaluation.tokens import Reader

TASKS = registry.TASKS


def lines(path: Path, *values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def choice(i: int, **more: Any) -> dict[str, Any]:
    return {"id": f"c/{i}", "context": f"Is {i} odd?", "choices": ["no", "yes"], "answer": i % 2, **more}


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_letters_stand_behind_examples_of_their_subject() -> None:
    shots = [choice(i, subject=s, choices=["a", "b"]) for i, s in enumerate(["far_off", "near"])]
    asked = emergent.ask_letters(choice(5, subject="near"), shots)
    assert asked.options[0].context == (
        "The following are multiple choice questions (with answers) about near.\n\n"
        "Is 1 odd?\nA. a\nB. b\nAnswer: B\n\nIs 5 odd?\nA. no\nB. yes\nAnswer:"
    )
    assert [(o.text, o.true) for o in asked.options] == [(" A", False), (" B", True)]
    assert asked.cluster == "near"


@pytest.mark.parametrize(("polarity", "roles"), [("neg", [BIASED, COUNTER]), ("nonneg", [COUNTER, BIASED])])
def test_the_biased_answer_turns_with_the_question(polarity: str, roles: list[int]) -> None:
    value = choice(0, choices=["they", "we", "unknown"], category="Age", context_condition="ambig",
                   question_polarity=polarity, unknown_choice=2, stereotyped_group_choice=0)  # fmt: skip
    assert [o.role for o in trust.ask_bbq(value, []).options] == [*roles, UNRELATED]
    unlabelled = value | {"stereotyped_group_choice": None}
    assert [o.role for o in trust.ask_bbq(unlabelled, []).options] == [0, 0, UNRELATED]


@pytest.mark.parametrize("name", ["lines", "pairs", "needle"])
def test_long_prompts_have_the_length_that_is_asked(name: str, tokenizer: Any) -> None:
    made = TASKS[name].make
    assert made is not None
    records = list(islice(made(tokenizer, [300, 500]), 10))
    assert len({r.value["seed"] for r in records}) == long.SEEDS
    for record in records:
        (option,) = TASKS[name].ask(record.value, []).options
        size = len(tokenizer.encode(option.context + option.text))
        length, depth = record.value["group"].split("/")
        assert int(length) - 60 < size <= int(length)
        at = option.context.index(record.value["target"]) / len(option.context)
        assert abs(at - float(depth)) < 0.45  # the question stands behind the haystack
    with pytest.raises(EvidenceError, match="10 tokens are too few"):
        list(made(tokenizer, [10]))


# --- how answers are found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grader", "gold", "text", "expected"),
    [
        (answers.number, "18", " 3 + 4 = 7.\n#### 18", (1.0, True)),
        (answers.number, "1200", "The answer is $1,200.00.", (1.0, True)),
        (answers.number, "-5", "it falls by 2 to -5", (1.0, True)),
        (answers.number, "18", "first 18, then 19", (0.0, True)),
        (answers.number, "18", "I do not know", (0.0, False)),
        (answers.conclusion, "(B)", "Step 1. So the answer is (B).", (1.0, True)),
        (answers.conclusion, "False", "not True is False", (0.0, False)),
        (answers.formula, r"\frac{625}{648}", r"so $\boxed{\dfrac{625}{648}}$.", (1.0, True)),
        (answers.formula, r"x^{2}", r"\boxed{1} and then \boxed{x^{2}}", (1.0, True)),
        (answers.formula, "2", r"\boxed{2", (0.0, False)),
        (answers.contains, "2416", " 2416>.", (1.0, True)),
        (answers.first_line, "ice", "\n Ice\nand more", (1.0, True)),
    ],
)  # fmt: skip
def test_answers_in_text(grader: Any, gold: str, text: str, expected: tuple[float, bool]) -> None:
    found = grader({"answer": gold}, text)
    assert (found.score, found.parse_ok) == expected


# --- files and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"id": "x", "context": "a", "choices": ["b", "c"]}, r"a.jsonl:2: has no field 'answer'[\s\S]*schema 'choice'"),
        (choice(0) | {"answer": 2}, "a.jsonl:2: answer 2 of 2 choices"),
        (choice(0) | {"choices": "no"}, "a.jsonl:2: choices is 'no', not a list of two texts or more"),
        (choice(0) | {"answer": True}, "answer is True, not an index"),
        (choice(1), "a.jsonl:2: the id 'c/1' is that of line 1"), ([1], "a.jsonl:2: is no JSON object"),
    ],
)  # fmt: skip
def test_a_wrong_record_is_refused_by_line(value: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=match):
        readers.read(lines(tmp_path / "a.jsonl", choice(1), value), TASKS["copa"].schema)


@pytest.mark.parametrize("text", ["{", '{"id": NaN}', "[" * 100000, "\xff"])
def test_a_line_that_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(EvidenceError, match=r"a.jsonl:1: is no JSON"):
        readers.read(tmp_path / "a.jsonl", TASKS["copa"].schema)


def test_names_families_folders_and_files(tmp_path: Path) -> None:
    lines(tmp_path / "basic/copa.jsonl", choice(1))
    own = lines(tmp_path / "own/mine.jsonl", {"id": "1", "context": "a", "target": "b"})
    lines(tmp_path / "own/other.jsonl", {"id": "1"})
    said: list[str] = []
    found = registry.choose(["basic", "long", str(tmp_path)], tmp_path, said.append)
    assert [c.task.name for c in found] == ["copa", "lines", "pairs", "needle", "mine"]
    assert (found[-1].task.kind, found[-1].file) == ("cloze", own)
    assert registry.known("mine", "cloze") == found[-1].task
    assert any("hellaswag is left out" in line for line in said)
    assert any("other.jsonl:1" in line for line in said)
    for name, match in (("hellaswga", "did you mean 'hellaswag'"), ("hellaswag", "does not exist")):
        with pytest.raises(EvidenceError, match=match):
            registry.choose([name], tmp_path)
    with pytest.raises(EvidenceError, match="--data"):
        registry.choose(["copa"], None)


# --- a model's answers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(family_model("llama"), "w", batch=4)


def asked(name: str, values: list[dict[str, Any]], tokenizer: Any, longest: int | None = None, **more: Any) -> Any:
    task = replace(TASKS[name], new_tokens=6) if TASKS[name].new_tokens else TASKS[name]
    records = [Record(value, f"line {i}") for i, value in enumerate(values, 1)]
    return answering.ask(task, records, [], Reader(tokenizer), longest, **more)


def test_items_of_choices_are_what_the_model_says(scorer: Scorer, tokenizer: Any) -> None:
    values = [choice(i, context=f"Is {i} odd? ") for i in range(4)]
    items = answering.answer(scorer, Reader(tokenizer), asked("copa", values, tokenizer))
    expected = []
    for value in values:
        for text in value["choices"]:
            ids = tokenizer.encode(f"{value['context']} {text}")  # both spaces belong to the continuation
            start = len(tokenizer.encode(value["context"].rstrip()))
            with torch.inference_mode():
                log_p = torch.log_softmax(scorer.model(torch.tensor([ids])).logits[0].double(), -1)
            expected.append(sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids))))
    np.testing.assert_allclose(items.logprob, expected, rtol=1e-4)
    assert items.pred.tolist() == np.array(expected).reshape(-1, 2).argmax(1).tolist()
    assert items.score.tolist() == [float(p == v["answer"]) for p, v in zip(items.pred, values, strict=True)]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra 'tasks')")
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_lm_eval_gives_the_items_of_our_own(scorer: Scorer, tokenizer: Any, tmp_path: Path) -> None:
    values = [choice(i) for i in range(4)]
    where = {"data_files": {"test": str(lines(tmp_path / "a.jsonl", *values))}, "cache_dir": str(tmp_path / "cache")}
    task = {"task": "tiny_odd", "dataset_path": "json", "dataset_kwargs": where, "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "choices",
            "doc_to_target": "answer", "metric_list": [{"metric": "acc", "aggregation": "mean"}]}  # fmt: skip
    (tmp_path / "tiny_odd.yaml").write_text(json.dumps(task))  # JSON is YAML
    reader = Reader(tokenizer)
    theirs, _ = lmeval_items.answers(scorer, reader, "tiny_odd", tmp_path, None)
    ours = answering.answer(scorer, reader, asked("copa", values, tokenizer))
    for name in ("logprob", "tokens", "chars", "pred", "gold", "score", "margin"):
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=1e-5, atol=1e-6, err_msg=name)


def test_dialogue_holds_a_model_against_the_references_own_words(scorer: Scorer, tokenizer: Any) -> None:
    values = [{"id": f"d/{i}", "turns": [f"Hi {i}", "And?"]} for i in range(2)]
    task, reader = asked("mt_bench", values, tokenizer), Reader(tokenizer)
    reference = answering.answer(scorer, reader, task)
    assert reference.id.tolist() == ["d/0/1", "d/0/2", "d/1/1", "d/1/2"]
    assert reference.score.tolist() == [1.0] * 4
    other = Scorer(family_model("llama", seed=1), "v", batch=4)
    items = answering.answer(other, reader, task, reference=reference)
    reference.require_paired(items)  # the second turns show the same first answers
    first = items.wrote(0).tolist(), reference.wrote(0).tolist()
    assert items.score[0] == pytest.approx(answering.agreement(*first) / len(first[1]))
    assert items.tokens.tolist() == reference.tokens.tolist()
    assert (items.logprob < reference.logprob).all()  # greedy words of the one are unlikely to the other


def test_what_is_written_keeps_the_space_before_its_first_word() -> None:
    """A word that follows a prompt begins with a space, which SentencePiece's decoders drop at the beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "▁def": 1, "▁return": 2, "▁1": 3, "▁end": 4}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")
    said = iter([2, 3, 4])

    class Scripted(Head):
        def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.tensor([next(said)]), 8).float()

    assert words.decode([2, 3]) == "return 1"
    limits = generation.Limits(5, stops=(" end",))
    (written,) = generation.greedy(
        family_model("llama"), Scripted(torch.zeros(8, 64), None, None), words, [[0, 1]], limits
    )
    assert (written.text, written.stop_reason) == (" return 1", "stop")


def test_code_is_run_only_when_allowed(scorer: Scorer, tokenizer: Any) -> None:
    test = "def check(g):\n    assert g() == 1\n"
    program = {"id": "h/0", "prompt": "def f():\n    return 1\n#", "entry_point": "f", "test": test}
    task = asked("humaneval", [program, program | {"id": "h/1", "entry_point": "f()"}], tokenizer)
    with pytest.raises(EvidenceError, match="--allow-code"):
        answering.answer(scorer, Reader(tokenizer), task)
    with pytest.raises(EvidenceError, match="no name of a function"):
        answering.answer(scorer, Reader(tokenizer), task, allow_code=True)
    whole = answering._tested(Record(program, "line 1"), " whatever stands here")
    assert whole == (1.0, "passed", True)


def test_what_the_model_cannot_read_is_refused_or_left_out_by_name(tokenizer: Any) -> None:
    values = [choice(i, context="x" * (10 if i else 90)) for i in range(3)]
    with pytest.raises(EvidenceError, match=r"copa, c/0: 93 tokens with its answer, the model reads at most 64"):
        asked("copa", values, tokenizer, 64)
    assert asked("copa", values, tokenizer, 64, drop_long=True).too_long == ("c/0",)
    with pytest.raises(EvidenceError, match="1 of 2 questions are left"):
        asked("copa", values[:2], tokenizer, 64, drop_long=True)


def test_another_tokenizer_is_refused_with_the_first_difference(tokenizer: Any) -> None:
    from copy import deepcopy

    tokens.require_same(tokenizer, deepcopy(tokenizer))
    more, spaced = deepcopy(tokenizer), deepcopy(tokenizer)
    more.add_tokens(["<new>"])
    with pytest.raises(EvidenceError, match="token 257 is missing in the reference and '<new>' in the candidate"):
        tokens.require_same(tokenizer, more)
    from tokenizers import pre_tokenizers

    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(EvidenceError, match=r"'The quick brown fox.* is \["):
        tokens.require_same(tokenizer, spaced)
    assert Reader(tokenizer).identity != Reader(spaced).identity


def test_compare_from_end_to_end(
    llama: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines(tmp_path / "data/basic/copa.jsonl", *(choice(i) for i in range(6)))
    other = save_model(family_model("llama", seed=1), tokenizer, tmp_path / "other")
    command = ["lowbit", "compare", str(llama), str(other), "--tasks", "copa",
               "--data", str(tmp_path / "data"), "--store", str(tmp_path / "store"), "--dtype", "float32"]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*command, "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    rows = {(f["task"], f["measure"]): f for f in found["candidates"][0]["findings"]}
    assert set(rows) == {("copa", "accuracy"), ("copa", "accuracy per character")}
    accuracy = rows["copa", "accuracy"]
    assert accuracy["n"] == 6
    assert accuracy["delta"] == pytest.approx(accuracy["candidate"] - accuracy["reference"])
    assert (accuracy["rule"], accuracy["floor"]) == ("holm, 2 tests", 0.0)
    page = tmp_path / "report.html"
    monkeypatch.setattr("lowbit.report.page.chart_library", lambda: "")
    monkeypatch.setattr("sys.argv", [*command, "--analyses", "confidence,disagreement", "--report", str(page)])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr()
    assert "0 cells computed, 3 were there" in shown.err
    assert "candidate  other  sha" in shown.out
    assert "MDE (80 % power at 5 %): copa" in shown.out
    places = [shown.out.index(title) for title in ("candidate  other", "How sure, and how rightly so", "Which answers")]
    assert places == sorted(places)
    html = page.read_text()
    assert [html.count(part) for part in ("panel-confidence-0", 'data-table="tasks"', "Δ log-ppl")] == [2, 1, 0]
    monkeypatch.setattr("sys.argv", [*command, "--tasks", "kl,copa", "--text", str(tmp_path / "data/basic/copa.jsonl"),
                                     "--protocol", "windows-16", "--windows", "4", "--analyses", "disagreement",
                                     "--json"])  # fmt: skip
    with pytest.raises(SystemExit):
        main()
    both = json.loads(capsys.readouterr().out)
    (only,) = both["reports"][0]["candidates"]
    assert {f["metric"] for f in only["findings"]} >= {"kl"}
    assert [f["delta"] for f in only["task_findings"]] == [f["delta"] for f in found["candidates"][0]["findings"]]
    assert [panel["title"] for panel in both["panels"]] == ["Which answers change"]
