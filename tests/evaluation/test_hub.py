"""Tasks from data sets: rows of the public sets' fields through a saved folder, and through a hub that is made up."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from lowbit import digest
from lowbit.errors import EvidenceError, MissingExtra
from lowbit.evaluation.tasks import hub, readers, registry
from lowbit.evaluation.tasks.hub_sets import SETS

datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install 'lowbit[tasks]')")

# a row as each set has it, with columns that nothing reads, and what a model is asked about it
ARC = {
    "id": "M_1",
    "question": "Why?",
    "choices": {"text": ["so", "no", "yes"], "label": ["A", "B", "C"]},
    "answerKey": "C",
}
ASKED = {"context": "Question: Why?\nAnswer:", "choices": ["so", "no", "yes"], "answer": 2}
ROWS: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {
    ("arc_easy", "allenai/ai2_arc"): (ARC, ASKED),
    ("arc_challenge", "allenai/ai2_arc"): (ARC, ASKED),
    ("hellaswag", "Rowan/hellaswag"): (
        {"ind": 4, "activity_label": "Tango", "ctx_a": "[header] How to dance [title] Listen.", "ctx_b": "he",
         "endings": ["sits [step] down.", "dances."], "label": "1"},
        {"context": "Tango: How to dance. Listen. He", "choices": ["sits down.", "dances."], "answer": 1}),
    ("piqa", "baber/piqa"): (
        {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 1},
        {"context": "Question: Open it\nAnswer:", "choices": ["pull", "push"], "answer": 1}),
    ("winogrande", "allenai/winogrande"): (
        {"sentence": "Ann beat Eve so _ won.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        {"contexts": ["Ann beat Eve so Ann", "Ann beat Eve so Eve"], "continuation": " won.", "answer": 0}),
    ("boolq", "google/boolq"): (
        {"question": "is it wet", "passage": "Rain.", "answer": True},
        {"context": "Rain.\nQuestion: is it wet?\nAnswer:", "choices": ["no", "yes"], "answer": 1}),
    ("boolq", "aps/super_glue"): (
        {"question": "is it dry", "passage": "Rain.", "idx": 0, "label": 0},
        {"context": "Rain.\nQuestion: is it dry?\nAnswer:", "choices": ["no", "yes"], "answer": 0}),
    ("copa", "aps/super_glue"): (
        {"premise": "The tap ran.", "choice1": "It froze.", "choice2": "It filled.", "question": "effect", "label": 1},
        {"context": "The tap ran, therefore", "choices": ["it froze.", "it filled."], "answer": 1}),
    ("lambada", "EleutherAI/lambada_openai"): (
        {"text": "he read the signs"}, {"context": "he read the", "target": "signs"}),
    ("mmlu", "cais/mmlu"): (
        {"question": "1+1?", "subject": "algebra", "choices": ["1", "2", "3", "4"], "answer": 1},
        {"context": "1+1?", "subject": "algebra", "choices": ["1", "2", "3", "4"], "answer": 1}),
    ("gsm8k", "openai/gsm8k"): (
        {"question": "How many?", "answer": "500*2=<<500*2=1000>>1000\n#### 1,000"},
        {"prompt": "How many?", "answer": "1000", "rationale": "500*2=<<500*2=1000>>1000"}),
    ("truthfulqa_mc1", "truthfulqa/truthful_qa"): (
        {"question": "Seeds?", "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]}},
        {"context": "Q: Seeds?\nA:", "choices": ["No.", "Yes."], "answer": 0}),
    ("truthfulqa_mc2", "truthfulqa/truthful_qa"): (
        {"question": "Seeds?", "mc2_targets": {"choices": ["No.", "Never.", "Yes."], "labels": [1, 1, 0]}},
        {"context": "Q: Seeds?\nA:", "choices": ["No.", "Never.", "Yes."], "labels": [1, 1, 0]}),
    ("humaneval", "openai/openai_humaneval"): (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": " pass", "test": "def check(f): ...",
         "entry_point": "f"},
        {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f): ..."}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """A hub of these sets, called as ``datasets`` documents; what it was asked for."""
    calls: list[tuple[str, str | None, str]] = []
    signature = inspect.signature(datasets.load_dataset)

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        assert given.keys() <= {"path", "name", "split"}
        calls.append((given["path"], given["name"], given["split"]))
        task = next(s.task for s in SETS if (s.repo, s.config) == (given["path"], given["name"]))
        row = dict(ROWS[task, given["path"]][0])
        if task == "truthfulqa_mc1":  # one set, two tasks
            row |= ROWS["truthfulqa_mc2", given["path"]][0]
        return datasets.Dataset.from_list([row, row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("known", SETS, ids=lambda s: f"{s.task}-{s.repo.partition('/')[0]}")
def test_a_public_set_is_its_task(known: Any, asked: list[tuple[str, str | None, str]]) -> None:
    name = f"hub:{known.repo}{'/' + known.config if known.config else ''}#validation"
    if known.task == "truthfulqa_mc2":
        name += "@truthfulqa_mc2"
    file = hub.fetch(name)
    chosen = registry._of_file(file, file.parent.parent)
    assert chosen.task is registry.TASKS[known.task]
    assert chosen.task.schema == known.schema
    records = readers.read(file, known.schema)
    expected = ROWS[known.task, known.repo][1]
    assert [r.value for r in records] == [{"id": f"{known.task}/{i}", **expected} for i in range(2)]
    assert asked[0] == (known.repo, known.config, "validation")
    assert (chosen.shots is not None) == (chosen.task.shots > 0)
    if chosen.shots is not None:
        assert asked[1][2] == known.examples
        assert registry.examples(chosen.task, readers.read_any(chosen.shots))[0]["answer"] == expected["answer"]


def test_the_identity_is_that_of_the_rows(tmp_path: Path) -> None:
    """The same rows from another place are the same file; a changed row is another."""
    other = {**ARC, "answerKey": "A"}
    datasets.DatasetDict({"test": datasets.Dataset.from_list([ARC])}).save_to_disk(tmp_path / "dict")
    datasets.Dataset.from_list([{**ARC, "note": "not read"}]).save_to_disk(tmp_path / "one")
    datasets.Dataset.from_list([other]).save_to_disk(tmp_path / "other")
    first, same, changed = (
        hub.fetch(f"hub:{tmp_path}/{name}@arc_easy") for name in ("dict#test", "one#", "other#")
    )  # fmt: skip
    assert first == same != changed
    assert digest.of_file(first) != digest.of_file(changed)
    with pytest.raises(EvidenceError, match=r"Unknown split 'train'"):
        hub.fetch(f"hub:{tmp_path}/dict#train@arc_easy")
    with pytest.raises(EvidenceError, match="not found"):
        hub.fetch(f"hub:{tmp_path}/none#test@arc_easy")


def test_a_set_of_ones_own_is_known_by_its_fields(tmp_path: Path) -> None:
    rows = [{"context": "Is it?", "choices": ["no", "yes"], "answer": i, "more": 1} for i in range(2)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "mine")
    file = hub.fetch(f"hub:{tmp_path}/mine#")
    chosen = registry._of_file(file, file.parent.parent)
    assert (chosen.task.name, chosen.task.schema.name) == ("mine", "choice")
    assert json.loads(file.read_text().splitlines()[1]) == {"id": "mine/1", **rows[1]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Why?", "choices": ARC["choices"]},
         r"(?s)row 1: has no 'answerKey', but: question, choices\n.*schema 'choice'.*question, choices, answerKey"),
        ({**ARC, "answerKey": ""}, r"(?s)row 1: cannot be made into a record: ValueError.*schema 'choice'"),
        ({**ARC, "choices": {"text": ["so", "", "yes"], "label": ["A", "B", "C"]}},
         r"(?s)row 1: choices is .*schema 'choice' has"),
    ],
)  # fmt: skip
def test_a_row_of_another_shape_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    datasets.Dataset.from_list([ARC, row]).save_to_disk(tmp_path / "set")
    with pytest.raises(EvidenceError, match=message):
        hub.fetch(f"hub:{tmp_path}/set#@arc_easy")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), "cannot be reached.*\n.*to_disk"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "a/b' doesn't exist on"),
        (ValueError("Config name is missing.\nPlease pick one among: ['x']"), r"Config name is missing.\n.*\['x'\]"),
    ],
)  # fmt: skip
def test_what_a_hub_says_is_passed_on(raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(EvidenceError, match=message):
        hub.fetch("hub:a/b#test")


def test_names_and_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hub:arc#test", "hub:a/b", "hub:a/b#", "hub:", "hub:a/b/c/d#test"):
        with pytest.raises(EvidenceError, match="is no name of a data set"):
            hub.fetch(name)
    with pytest.raises(EvidenceError, match="did you mean 'arc_easy'"):
        hub.fetch("hub:a/b#test@arc_eazy")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(MissingExtra, match=r"datasets 3\.6\.0 is too old"):
        hub.fetch("hub:a/b#test")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lowbit\[tasks\]'"):
        hub.fetch("hub:a/b#test")
