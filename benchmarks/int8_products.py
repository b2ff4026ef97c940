"""Integer products beside float32 ones: a model of int8 weights whose inputs are rounded to int8.

    lowbit quantize smollm2 rtn:int8-row-sym+a:int8-token -o OUT
    python benchmarks/int8_products.py OUT [--prompt 512] [--tokens 8] [--rounds 5] [--threads 1]

One JSON line: tokens a second of processor time (of all threads) of a prompt read in one call, and of one token after
another in a cache, by both kernels in turns in every round, so that a busy machine slows both; medians. Then the
largest difference of logits relative to the largest logit: an input that is rounded the other way is a whole step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import PreTrainedModel

import lowbit
from lowbit.runtime.kernels import Kernel
from lowbit.runtime.kernels.packed import PACKED
from lowbit.runtime.linear import QLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8, help="written one by one, a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = lowbit.load(a.model, dtype=torch.float32)
    prompt = torch.randint(0, model.config.vocab_size, (1, a.prompt), generator=torch.Generator().manual_seed(0))
    ways: dict[str, Kernel | None] = {"integer": None, "float": PACKED}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    logits = {}
    with torch.inference_mode():
        for turn in range(a.rounds + 1):
            for way, kernel in ways.items():
                use(model, kernel)
                read, write, logits[way] = timed(model, prompt, a.tokens)
                if turn:  # the first prepares weights
                    seconds[way].append((read, write))
    found: dict[str, float] = {}
    for way, spent in seconds.items():
        found[f"{way} prompt tokens/s"] = a.prompt / statistics.median(read for read, _ in spent)
        found[f"{way} written tokens/s"] = a.tokens / statistics.median(write for _, write in spent)
    found["difference"] = float((logits["integer"] - logits["float"]).abs().max() / logits["float"].abs().max())
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))


def use(model: PreTrainedModel, kernel: Kernel | None) -> None:
    """Let every low-bit linear run one kernel; None: what is chosen."""
    for module in model.modules():
        if isinstance(module, QLinear):
            if kernel is None and module.only is not None:
                module.use("auto")
            elif kernel is not None and module.only is not kernel:
                module.use_only(kernel)


def timed(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> tuple[float, float, torch.Tensor]:
    """Seconds to read the prompt and to write on, and the logits of the prompt's last token."""
    started = time.process_time()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    read, cache = time.process_time(), out.past_key_values
    for _ in range(tokens):
        model(prompt[:, -1:], past_key_values=cache, use_cache=True)
    return read - started, time.process_time() - read, out.logits[0, -1]


if __name__ == "__main__":
    main()
