"""One token of a stream: how long it takes, before and after a model is prepared for decoding, and what it must take.

    python benchmarks/decoding.py OUT [--threads 1 2] [--streams 1 4] [--context 64] [--rounds 7]

One JSON line a number of threads, streams and tokens of context. Ways take turns within a round, so that a busy machine
slows all of them; times are of a whole pass of the model over one new token a stream, without sampling and HTTP.
``limit_ms`` is the bytes that a token reads (weights once, keys and values of every stream) over the rate at which this
machine reads memory with so many threads, measured in the same run. ``products_ms`` and ``head_ms`` are of the packed
products and of the head alone, ``launches`` the operators of torch in one pass. ``cpu_ms`` is the least time of
processors in a turn, the one to read where others work on the machine (one thread: two that wait for each other count).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from lowbit.io import native
from lowbit.models.pretrained import from_directory
from lowbit.runtime import decoding, facade
from lowbit.runtime.linear import QLinear
from lowbit.runtime.rows import Rows, own_cache

BIG = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a native checkpoint, or a model's directory")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--streams", nargs="*", type=int, default=[1])
    parser.add_argument("--context", nargs="*", type=int, default=[64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=5, help="of a turn")
    a = parser.parse_args()
    load = facade.load if native.is_native(a.model) else from_directory
    plain, ready = (load(a.model, dtype=torch.float32).eval() for _ in range(2))
    decoding.prepare(ready)
    for threads in a.threads:
        torch.set_num_threads(threads)
        for streams in a.streams:
            for context in a.context:
                print(json.dumps(measure(plain, ready, threads, streams, context, a.rounds, a.tokens)), flush=True)


@torch.inference_mode()
def measure(
    plain: PreTrainedModel, ready: PreTrainedModel, threads: int, streams: int, context: int, rounds: int, tokens: int
) -> dict[str, Any]:
    big = torch.ones(BIG // 4)
    steps = {"before": step(plain, streams, context), "after": step(ready, streams, context)}
    head: Any = ready.get_output_embeddings()
    hidden = torch.randn(streams, 1, head.in_features)
    linears = [m for m in ready.modules() if isinstance(m, QLinear)]
    inputs = {m.in_features: torch.randn(streams, 1, m.in_features) for m in linears}
    ways: dict[str, Callable[[], object]] = {
        **steps, "head": lambda: head(hidden), "read": big.sum,
        "products": lambda: [m(inputs[m.in_features]) for m in linears],
    }  # fmt: skip
    found: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            begin, worked = time.perf_counter(), time.process_time()
            for _ in range(tokens):
                run()
            found[way].append((time.perf_counter() - begin) / tokens)
            cpu[way].append((time.process_time() - worked) / tokens)
    ms = {way: 1e3 * statistics.median(times) for way, times in found.items()}
    weights = sum(m.weight.qtensor().nbytes for m in linears) + head.weight.nbytes
    config = ready.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * 4 * streams * context * config.num_hidden_layers * heads * size
    rate = BIG / min(found["read"])
    return {
        "threads": threads, "streams": streams, "context": context,
        "before_ms": round(ms["before"], 2), "after_ms": round(ms["after"], 2),
        "best_ms": {way: round(1e3 * min(found[way]), 2) for way in ("before", "after")},
        "cpu_ms": {way: round(1e3 * min(times), 2) for way, times in cpu.items() if way != "read"},
        "products_ms": round(ms["products"], 2), "head_ms": round(ms["head"], 2),
        "launches": {way: launches(run) for way, run in steps.items()},
        "read_MB": round((weights + cached) / 1e6, 1), "read_GB_s": round(rate / 1e9, 1),
        "limit_ms": round(1e3 * (weights + cached) / rate, 2),
    }  # fmt: skip


def step(model: Any, streams: int, context: int) -> Callable[[], object]:
    """A pass over one token of every stream, which have read ``context`` tokens."""
    rows = Rows(model.config, None)
    for i in range(streams):
        cache = own_cache(model.config, None)
        model(input_ids=torch.arange(context)[None] % 97 + i, past_key_values=cache, use_cache=True, logits_to_keep=1)
        rows.join(cache, context)

    def run() -> object:
        inputs = rows.inputs([7] * streams, model.device)
        logits: object = model(**inputs, past_key_values=rows, use_cache=True, logits_to_keep=1).logits
        rows.advance()
        return logits

    run()
    return run


def launches(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum(event.count for event in seen.key_averages() if event.key.startswith("aten::"))


if __name__ == "__main__":
    main()
