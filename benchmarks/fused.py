"""Decoding and multiplying in one pass, beside torch's int4 and bf16 products, on the shapes of Llama-3-8B's layers.

    python benchmarks/fused.py [--threads 1 2] [--prefill] [--rounds 12]

The bar, at one token: at least 1.0 times the weights a second of ``_weight_int4pack_mm_for_cpu`` (4.25 bits) at no more
than 2.7 stored bits, and at least 2.5 times those of bf16. Each contender walks its own copies of a matrix, of more
than 300 MB together, so that none comes from a cache; the three take turns in one process. Stored bits are everything
that is stored: stream, tables, segment heads and exceptions. Weights are random: speed depends on their entropy alone.
`coded` is the whole kernel as a layer calls it, its rounding of inputs included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from lowbit import _native
from lowbit.codec import stream
from lowbit.formats.nodes_coded import Coded
from lowbit.runtime.kernels.coded import CODED

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
SIGMA = 1.42  # of a Gaussian in steps, rounded: 2.6 stored bits
BYTES = 300 << 20
GROUP = 128
BF16 = torch.bfloat16
Call = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--bytes", type=int, default=BYTES)
    a = parser.parse_args()
    print(machine())
    for rows, columns in SHAPES:
        bits, calls = contenders(rows, columns, a.bytes)
        for threads in a.threads:
            torch.set_num_threads(threads)
            for tokens in (1, 4, 64, 256) if a.prefill else (1,):
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(BF16)
                report(rows, columns, threads, tokens, bits, race(calls, x, a.rounds if tokens <= 4 else 3))


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    flags = info.split()
    missing = [f for f in ("avx2", "avx512bw", "avx512_vnni", "avx512vbmi", "amx_int8") if f not in flags]
    lacks = ", ".join(missing) or "nothing"
    return f"{model}; decoding with {_native.isa()}; the processor lacks {lacks}; torch {torch.__version__}"


def contenders(rows: int, columns: int, nbytes: int) -> tuple[float, dict[str, list[Call]]]:
    """Stored bits a weight of the coded matrix, and for each name products with enough copies to leave the caches."""
    g = torch.Generator().manual_seed(0)
    numbers = torch.empty(rows, columns).normal_(generator=g).mul_(SIGMA).round_().to(torch.int16)
    blob = stream.encode(numbers)
    dense = numbers.to(BF16)
    codes = (numbers.clamp(-8, 7) + 8).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.ones(columns // GROUP, rows, 2, dtype=BF16)
    del numbers, codes

    def copies(size: int) -> range:
        return range(1 + nbytes // size)

    def coded() -> Call:
        state = CODED.prepare(Coded((rows, columns), blob.clone(), None, None, 0.0, 0.0, 0.0), BF16)
        return lambda x: CODED.run(x, state)

    def int4(weight: torch.Tensor) -> Call:
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, GROUP, scales)

    def bf16(weight: torch.Tensor) -> Call:
        return lambda x: linear(x, weight)

    return 8 * blob.numel() / (rows * columns), {
        "coded": [coded() for _ in copies(blob.numel())],
        "int4": [int4(packed.clone()) for _ in copies(packed.numel() * packed.element_size())],
        "bf16": [bf16(dense.clone()) for _ in copies(2 * dense.numel())],
    }


def race(calls: dict[str, list[Call]], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of single calls by contender; each takes its turn of a few calls a round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    at = dict.fromkeys(calls, 0)
    for _ in range(rounds):
        for name, several in calls.items():
            turn = []
            for _ in range(3 if len(x) <= 4 else 1):
                call = several[at[name] % len(several)]
                at[name] += 1
                started = time.perf_counter()
                call(x)
                turn.append(time.perf_counter() - started)
            seconds[name] += turn[1:] or turn  # the first of a turn wakes the threads
    return seconds


def report(rows: int, columns: int, threads: int, tokens: int, bits: float, seconds: dict[str, list[float]]) -> None:
    weights = rows * columns / 1e9
    best = {name: weights / min(s) for name, s in seconds.items()}
    usual = {name: weights / statistics.median(s) for name, s in seconds.items()}
    text = ", ".join(f"{name} {best[name]:.2f} (median {usual[name]:.2f})" for name in seconds)
    ratios = f"{best['coded'] / best['int4']:.2f}x int4, {best['coded'] / best['bf16']:.2f}x bf16"
    medians = f"{usual['coded'] / usual['int4']:.2f}x, {usual['coded'] / usual['bf16']:.2f}x"
    head = f"{rows}x{columns} {threads} threads {tokens} tokens {bits:.3f} bits"
    print(f"{head}: Gweights/s {text}; best {ratios}; median {medians}", flush=True)


if __name__ == "__main__":
    main()
