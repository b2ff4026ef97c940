"""The kernel of packed weights beside what bounds it: bytes over bandwidth, and torch's product in float32.

    python benchmarks/packed_kernel.py [--formats q4_0 int4-g64 nf4] [--shape 1536 576] [--tokens 1 4 8 16 32 128]

One JSON line a format and number of tokens, after one with the bandwidth that reading and copying reach. Calls go round
a set of weights that is larger than the caches, as a model's layers do. Times are medians of rounds, in which every way
has its turn, so that a busy machine slows all of them. ``decode`` makes float32 panels and multiplies them by torch,
what many tokens take; ``dense`` is torch's product in float32, ``read`` a sum over the packed codes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from lowbit import _native
from lowbit.formats.presets import preset
from lowbit.runtime.kernels import packed

CACHES = 96 << 20  # bytes: weights that are gone round take more
BIG = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--formats", nargs="*", default=["q4_0", "int4-g64", "nf4", "q4_1", "int3-g64", "int2-g64", "int8-g64"]
    )
    parser.add_argument("--shape", nargs=2, type=int, default=[1536, 576])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--threads", nargs="*", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    for threads in a.threads:
        torch.set_num_threads(threads)
        read, copy = bandwidth(a.rounds)
        print(json.dumps({"threads": threads, "isa": _native.isa(), "read_GB_s": read, "copy_GB_s": copy}), flush=True)
        for name in a.formats:
            measure(name, (a.shape[0], a.shape[1]), a.tokens, threads, a.rounds)


def measure(name: str, shape: tuple[int, int], counts: list[int], threads: int, rounds: int) -> None:
    fmt, W = preset(name), torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    q = fmt.encode(W, fmt.fit(W))
    each = q.nbytes
    trees = [q.map(torch.clone) for _ in range(CACHES // each + 1)]
    states = [packed.PACKED.prepare(tree, torch.float32) for tree in trees]
    dense = [W.clone() for _ in range(CACHES // (4 * W.numel()) + 1)]
    for tokens in counts:
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1))
        ways: dict[str, Callable[[], float]] = {
            "packed": partial(around, partial(product, x), states),
            "decode": partial(around, partial(packed._many, x), states[: len(states) // 4 + 1]),
            "dense": partial(around, partial(linear, x), dense),
        }
        if tokens == 1:
            ways["reference"] = partial(around, lambda tree: tree.decode(), trees[:8])
            ways["read"] = partial(around, reading, [next(iter(tree.parts())).data for tree in trees])
        seconds = {way: statistics.median(times) for way, times in turns(ways, rounds).items()}
        ours = seconds["packed"]
        row = {
            "format": name, "bits": round(q.bits_per_weight, 3), "shape": list(shape), "tokens": tokens,
            "threads": threads, "GB_s": round(each / ours / 1e9, 2),
            "Gweights_s": round(W.numel() / ours / 1e9, 2),
            "us": {way: round(1e6 * s, 1) for way, s in seconds.items()},
            "over_dense": round(seconds["dense"] / ours, 2),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


def product(x: torch.Tensor, state: packed.State) -> object:
    return packed.together(x, (state,))


def turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            found[way].append(run())
    return found


def around(call: Callable[[Any], object], over: list[Any]) -> float:
    """Seconds a call, going round."""
    begin = time.perf_counter()
    for one in over:
        call(one)
    return (time.perf_counter() - begin) / len(over)


def bandwidth(rounds: int) -> tuple[float, float]:
    """Gigabytes a second of memory that is read, and that is copied (counted once)."""
    big = torch.ones(BIG // 4)
    to = torch.empty_like(big)
    found = turns({"read": lambda: around(reading, [big]), "copy": lambda: around(to.copy_, [big])}, rounds)
    return round(BIG / min(found["read"]) / 1e9, 2), round(BIG / min(found["copy"]) / 1e9, 2)


def reading(data: torch.Tensor) -> object:
    return data.view(torch.float32).sum()


if __name__ == "__main__":
    main()
