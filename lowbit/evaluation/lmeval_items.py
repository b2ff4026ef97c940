"""lm-eval's tasks as Items: its prompts and its grading, our scorer, statistics and evidence (the extra ``tasks``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowbit import digest
from lowbit.errors import EvidenceError
from lowbit.evaluation import lmeval
from lowbit.evaluation.metrics.items import Items
from lowbit.evaluation.scorer import Scorer
from lowbit.evaluation.tokens import Reader


class Answered(NamedTuple):
    """Items of an lm-eval task or group, and the digest of what was asked."""

    items: Items
    digest: str


def answers(
    scorer: Scorer, reader: Reader, name: str, include: Path | None, limit: int | None, allow_code: bool = False
) -> Answered:
    """Run a task (or a group: its tasks' items follow each other, with the task as their group).

    ``include`` is a folder of task files. lm-eval runs the Python that they name, in this process: without
    ``allow_code`` a folder with such a file is refused. A task's first metric with a value from 0 to 1 is the score.
    Raises MissingExtra without lm-eval, and EvidenceError for a task that it does not know, or one without such a
    metric.
    """
    if include is not None and not allow_code:
        _require_data(include)
    try:
        found = lmeval.evaluate(scorer, reader.tokenizer, [name], include, limit)
    except (KeyError, ValueError, FileNotFoundError, ConnectionError) as error:
        raise EvidenceError(
            f"lm-eval cannot run it: {error}",
            where=name,
            fix="--data with the folder of its task file, or a known name",
        ) from error
    rows: list[dict[str, Any]] = []
    for task, samples in sorted(found["samples"].items()):
        first = samples[0]["filter"] if samples else None
        mine = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
        kind = found["configs"][task]["output_type"]
        rows += [_row(task, kind, sample, reader) for sample in mine]
    items = _items(rows)
    return Answered(
        items, digest.of_value([name, *zip(items.doc_hash.tolist(), items.prompt_hash.tolist(), strict=True)])
    )


def _require_data(folder: Path) -> None:
    """Raises EvidenceError for task files that would make lm-eval run Python."""
    for path in sorted(folder.rglob("*.y*ml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if found := next((mark for mark in _RUNS if mark in text), None):
            raise EvidenceError(
                f"names Python to run ({found})", where=str(path), why="lm-eval would run it in this process",
                fix="--allow-code if it is yours, or a folder without it",
            )  # fmt: skip


_RUNS = ("!function", "custom_dataset", "class:", "unsafe_code", "trust_remote_code")


def _row(task: str, kind: str, sample: Mapping[str, Any], reader: Reader) -> dict[str, Any]:
    """The columns of one sample."""
    score = next((float(sample[m]) for m in sample["metrics"] if _is_share(sample.get(m))), None)
    if score is None:
        raise EvidenceError(
            f"none of its metrics ({', '.join(sample['metrics'])}) is a share of 1", where=task,
            why="items are scored from 0 to 1", fix="a task with acc or exact_match",
        )  # fmt: skip
    row: dict[str, Any] = {
        "id": f"{task}/{sample['doc_id']}", "group": task, "doc_hash": str(sample["doc_hash"])[:16],
        "prompt_hash": str(sample["prompt_hash"])[:16], "score": score, "choices": [], "pred": -1, "gold": -1,
        "text": "", "margin": 0.0,
    }  # fmt: skip
    if kind == "generate_until":
        return row | {"text": str(sample["resps"][0][0])}
    sums = np.array([float(resps[0][0]) for resps in sample["resps"]])
    target = sample["target"]
    several = kind == "multiple_choice"
    gold = int(target) if several and str(target).isdigit() else -1
    for i, (value, (context, text)) in enumerate(zip(sums, _arguments(sample), strict=True)):
        pair = reader.pair(context, text)
        row["choices"].append((value, len(pair.continuation), len(text.strip()), i == gold or not several))
    p = np.exp(sums - sums.max())
    p /= p.sum()
    margin = float(np.exp(sums[0])) if len(p) < 2 else float(np.sort(p)[-1] - np.sort(p)[-2])
    return row | {"margin": margin, "gold": gold, "pred": int(sums.argmax()) if several else -1}


def _arguments(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Context and continuation of each request, as lm-eval keeps them in memory or as it writes them."""
    held = sample["arguments"]
    if isinstance(held, Mapping):
        return [(request["arg_0"], request["arg_1"]) for request in held.values()]
    return [(request[0], request[1]) for request in held]


def _is_share(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number) and 0 <= float(value) <= 1


def _items(rows: Sequence[Mapping[str, Any]]) -> Items:
    n = len(rows)
    flat = [choice for row in rows for choice in row["choices"]]
    names = ("id", "group", "doc_hash", "prompt_hash", "score", "pred", "gold", "text", "margin")
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in names}
    columns |= {name: [choice[k] for choice in flat] for k, name in enumerate(("logprob", "tokens", "chars", "true"))}
    return Items.of(columns | {
        "cluster": np.arange(n), "starts": np.concatenate([[0], np.cumsum([len(row["choices"]) for row in rows])]),
        "role": np.zeros(len(flat)), "length": np.zeros(n), "stop_reason": [""] * n, "parse_ok": np.ones(n),
        "answer": columns["text"], "written_starts": np.zeros(n + 1), "written": [],
    })  # fmt: skip
