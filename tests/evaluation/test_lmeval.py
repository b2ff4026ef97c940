"""lm-eval over the Scorer says what lm-eval's own transformers model says of the same weights."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import family_model

import lowbit
from lowbit.errors import EvidenceError, MissingExtra
from lowbit.evaluation import lmeval
from lowbit.evaluation.scorer import Scorer

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra 'tasks')"
)
WORDS = ["river", "stone", "a", "of", "quiet", "morning", "seven", "lamps", "under", "ice"]


@pytest.fixture(scope="module")
def model() -> Any:
    return lowbit.quantize(family_model("llama"), "rtn:int4-g32")


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    """Questions with choices of unlike length, some of one token, one context too long for the model."""
    rng = random.Random(7)
    made = []
    for i in range(12):
        choices = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(4)]
        choices[0] = "xyz"[i % 3]
        question = " ".join(rng.choices(WORDS, k=40 if i == 3 else rng.randint(2, 8)))
        made.append({"question": question, "choices": choices, "answer": rng.randrange(4)})
    return made


TASK = {
    "task": "tiny_choice", "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(items: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    (root / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    where = {"data_files": {"test": str(root / "items.jsonl")}, "cache_dir": str(root / "cache")}
    files = {"dataset_path": "json", "dataset_kwargs": where}
    (root / "tiny_choice.yaml").write_text(json.dumps(TASK | files))  # JSON is YAML
    return root


def custom_task(items: list[dict[str, Any]]) -> dict[str, Any]:
    import datasets

    return TASK | {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)}}


def by_hflm(model: Any, tokenizer: Any, tasks: list[Any], folder: Path | None) -> Any:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    return lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=10)


def choices(result: Any) -> torch.Tensor:
    """(items, choices, 2): log-likelihoods, and whether greedy."""
    samples = sorted(result["samples"]["tiny_choice"], key=lambda s: s["doc_id"])
    return torch.tensor([[[float(v), float(g)] for ((v, g),) in s["resps"]] for s in samples])


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["a task file", "a dataset in memory"])
def test_choices_and_accuracy_are_those_of_hflm(
    kind: str, model: Any, tokenizer: Any, items: list[dict[str, Any]], folder: Path
) -> None:
    tasks, path = (["tiny_choice"], folder) if kind == "a task file" else ([custom_task(items)], None)
    theirs = by_hflm(model, tokenizer, tasks, path)
    scorer = Scorer(model, "w", batch=3)
    ours = lmeval.evaluate(scorer, tokenizer, tasks, path, bootstrap_iters=10)
    a, b = choices(ours), choices(theirs)
    assert a.shape == (12, 4, 2)
    torch.testing.assert_close(a[..., 0], b[..., 0], rtol=0, atol=1e-4)
    assert torch.equal(a[..., 1], b[..., 1])
    assert ours["results"]["tiny_choice"]["acc,none"] == theirs["results"]["tiny_choice"]["acc,none"]
    assert isinstance(ours["results"]["tiny_choice"]["acc_stderr,none"], float)
    assert scorer.identity in ours["config"]["model"]


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_a_limit_takes_the_first_items(model: Any, tokenizer: Any, folder: Path) -> None:
    result = lmeval.evaluate(Scorer(model, "w"), tokenizer, ["tiny_choice"], folder, limit=2)
    assert [s["doc_id"] for s in result["samples"]["tiny_choice"]] == [0, 1]


def ask(lm: Any, kind: str, *arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    requests = [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]
    return list(getattr(lm, kind)(requests, disable_tqdm=True))


@pytest.fixture
def both(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Our adapter and HFLM."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    return lmeval.adapter(Scorer(model, "w", batch=2), tokenizer), theirs


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_whole_texts_longer_than_the_model_reads(both: tuple[Any, Any]) -> None:
    texts = [("river stone " * 30,), ("a",), ("<|end|>quiet",)]  # 360 tokens, the model reads 128
    ours, theirs = (ask(lm, "loglikelihood_rolling", *texts) for lm in both)
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[0] < ours[1] < 0


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_empty_contexts_and_trailing_spaces(both: tuple[Any, Any]) -> None:
    pairs = [("", "stone"), ("river ", "stone"), ("<|end|>river", " stone"), ("river " * 40, "stone")]
    ours, theirs = (ask(lm, "loglikelihood", *pairs) for lm in both)
    assert [v for v, _ in ours] == pytest.approx([v for v, _ in theirs], abs=1e-4)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_greedy_text_is_that_of_hflm_and_stops(both: tuple[Any, Any]) -> None:
    contexts = ["river stone", "quiet", "seven lamps under ice"]
    free = [(c, {"until": [], "max_gen_toks": 12, "do_sample": False}) for c in contexts]
    ours, theirs = (ask(lm, "generate_until", *free) for lm in both)
    assert ours == theirs
    assert all(ours)
    stop = ours[0][3]
    stopped = ask(both[0], "generate_until", (contexts[0], {"until": [stop], "max_gen_toks": 12}), free[1])
    assert stopped == [ours[0].partition(stop)[0], ours[1]]
    with pytest.raises(EvidenceError, match="200 new tokens"):
        ask(both[0], "generate_until", ("a", {"until": [], "max_gen_toks": 200}))


@needs_lm_eval
def test_a_continuation_that_cannot_be_read_is_refused(both: tuple[Any, Any]) -> None:
    with pytest.raises(EvidenceError, match="the model reads 128"):
        ask(both[0], "loglikelihood", ("a", "b" * 129))


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_a_cache_without_the_model_in_its_key_is_refused(
    model: Any, tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(EvidenceError, match="use_cache"):
        lmeval.evaluate(Scorer(model, "w"), tokenizer, ["tiny_choice"], folder, use_cache=str(tmp_path / "cache"))


def test_without_lm_eval_the_extra_is_named(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for work in (lambda s: lmeval.adapter(s, tokenizer), lambda s: lmeval.evaluate(s, tokenizer, ["x"])):
        with pytest.raises(MissingExtra, match=r"lowbit\[tasks\]"):
            work(Scorer(model, "w"))
