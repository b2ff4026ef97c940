"""Tasks by lowbit's scorer and by lm-eval's own transformers model, side by side: the same numbers in what time?

    python benchmarks/task_speed.py MODEL DATA [--items 40] [--tasks hellaswag,arc_easy,lambada,mmlu,gsm8k]

MODEL is a directory or 'smollm2', DATA the folder of task files. Every task is asked in the same words of both: first
HFLM with each batch size, then lowbit, in one process; HFLM counts with its fastest batch size. Prints one JSON line a
task: seconds of processor time of both (one thread, so that other work on the machine counts less), their ratio, and
the largest relative difference of a log-likelihood (for generation the share of answers that are the same text).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lowbit.evaluation.generation import Limits
from lowbit.evaluation.scorer import Scorer
from lowbit.evaluation.tasks import readers, registry
from lowbit.evaluation.tokens import Reader
from lowbit.models.pretrained import from_directory
from lowbit.models.resolve import locate
from lowbit.models.source import of_directory

NEW_TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--tasks", default="hellaswag,arc_easy,lambada,mmlu,gsm8k")
    parser.add_argument("--batches", default="8,32", help="HFLM's batch sizes")
    parser.add_argument("--batch", type=int, default=32, help="lowbit's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = locate(options.model)
    model, tokenizer = from_directory(root, torch.float32), of_directory(root).tokenizer
    scorer, reader = Scorer(model, "benchmark", batch=options.batch), Reader(tokenizer)
    sizes = [int(n) for n in options.batches.split(",")]
    for name in options.tasks.split(","):
        questions = ask(name, options.data, options.items)
        kind = generated if questions[0].prompt else scored
        found = kind(scorer, reader, model, tokenizer, questions, sizes)
        print(json.dumps({"task": name, "model": root.name, "items": len(questions), **found}), flush=True)


def ask(name: str, data: Path, items: int) -> list[Any]:
    """The questions of a task, as lowbit asks them."""
    (chosen,) = registry.choose([name], data)
    assert chosen.file is not None
    shots = [] if chosen.shots is None else registry.examples(chosen.task, readers.read_any(chosen.shots))
    records = readers.read(chosen.file, chosen.task.schema, items)
    return [chosen.task.ask(record.value, shots) for record in records]


def scored(
    scorer: Scorer, reader: Reader, model: Any, tokenizer: Any, questions: list[Any], sizes: list[int]
) -> dict[str, Any]:
    """Choices: log-likelihoods of both."""
    texts = [(o.context, o.text) for q in questions for o in q.options]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]
    theirs, seconds = [], {}
    for size in sizes:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu")
        started = time.process_time()
        theirs = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        seconds[size] = time.process_time() - started
    started = time.process_time()
    pairs = [reader.pair(*pair) for pair in texts]
    ours = [float(v.double().sum()) for v, _ in scorer.log_likelihoods([(p.context, p.continuation) for p in pairs])]
    mine = time.process_time() - started
    worst = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours, theirs, strict=True))
    return timed(seconds, mine) | {"largest_relative_difference": worst}


def generated(
    scorer: Scorer, reader: Reader, model: Any, tokenizer: Any, questions: list[Any], sizes: list[int]
) -> dict[str, Any]:
    """Greedy texts of both."""
    settings = {"until": ["Question:"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    requests = [Instance("generate_until", {}, (q.prompt, settings), i) for i, q in enumerate(questions)]
    theirs, seconds = [], {}
    for size in sizes:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu")
        started = time.process_time()
        theirs = lm.generate_until(requests, disable_tqdm=True)
        seconds[size] = time.process_time() - started
    started = time.process_time()
    limits = Limits(NEW_TOKENS, ("Question:",), frozenset({tokenizer.eos_token_id}))
    written = scorer.generate([reader.prompt(q.prompt) for q in questions], tokenizer, limits)
    mine = time.process_time() - started
    same = sum(w.text == text for w, text in zip(written, theirs, strict=True)) / len(questions)
    return timed(seconds, mine) | {"same_texts": same}


def timed(theirs: dict[int, float], ours: float) -> dict[str, Any]:
    best = min(theirs, key=lambda size: theirs[size])
    return {
        "hflm_seconds": round(theirs[best], 2), "hflm_batch": best, "lowbit_seconds": round(ours, 2),
        "times_faster": round(theirs[best] / ours, 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
