"""Tokens a second of the Scorer beside the bare transformers forward with logits, on the same windows of one model.

Three ways, interleaved, the median of ``--reps``, wall and CPU: ``forward`` computes the logits of every position and
throws them away; ``reference`` keeps hidden states and every column of evidence; ``score`` adds a second projection,
the reference's, for the exact KL. Prints one line for people and one of JSON.

    python benchmarks/scoring_rate.py --model smollm2 --windows 2 --length 512 --dtype float32 --threads 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from lowbit.calibration import text as texts
from lowbit.evaluation.protocol import parse
from lowbit.evaluation.scorer import Scorer
from lowbit.models.resolve import open_model


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a directory, a .gguf file or 'smollm2'")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reps", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    source = open_model(args.model)
    text = texts.read(args.text, "evaluation")
    ids = texts.encode(text, source.tokenizer)
    windows = parse(f"windows-{args.length}").cut(ids, args.windows, text.name, text.digest)
    dtype = getattr(torch, args.dtype)
    assert source.root is not None  # it was opened from a directory
    model = AutoModelForCausalLM.from_pretrained(source.root, dtype=dtype, local_files_only=True).eval()
    scorer = Scorer(model, source.digest)
    reference = scorer.reference(windows)  # also warms everything up

    def forward() -> None:
        with torch.inference_mode():
            for window in windows.ids:
                model(input_ids=window[None], use_cache=False)

    ways: dict[str, Callable[[], object]] = {
        "forward": forward,
        "reference": lambda: scorer.reference(windows),
        "score": lambda: scorer.score(windows, reference),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.reps):
        for name, work in ways.items():
            seconds[name].append(timed(work))

    tokens = windows.ids.numel()
    rates = {
        name: {
            clock: round(tokens / statistics.median(taken[i] for taken in found), 1)
            for i, clock in enumerate(("wall", "cpu"))
        }
        for name, found in seconds.items()
    }
    print(", ".join(f"{name} {rate['wall']} tok/s wall, {rate['cpu']} CPU" for name, rate in rates.items()))
    bare = [cpu for _, cpu in seconds["forward"]]
    share = {  # paired within a repetition, so that a busy neighbour weighs on both
        name: round(statistics.median(b / cpu for b, (_, cpu) in zip(bare, seconds[name], strict=True)), 3)
        for name in ("reference", "score")
    }
    print(json.dumps({**vars(args), "tokens": tokens, "tokens_per_second": rates, "cpu_share_of_forward": share}))


if __name__ == "__main__":
    main()
