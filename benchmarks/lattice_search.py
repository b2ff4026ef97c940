"""What several rows of numbers, kept side by side, would gain over rounding each column at once (docs/decisions/0024).

GPTQ on the entropy-coded grid is Babai's nearest plane. Here every row of numbers that is kept goes on with the two
nearest numbers of each column, and the K rows whose error is least so far stay (a breadth-first lattice search).
Prints the output error at equal rate, as a gain in dB over K = 1 (6.02 dB are a bit), for some rows of real matrices.

    python benchmarks/lattice_search.py --model DIR --text train.txt --block 3 --sites q_proj,o_proj,gate_proj
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from trellis import layers

KEPT = (1, 2, 4, 16)


def searched(W: torch.Tensor, L: torch.Tensor, step: torch.Tensor, kept: int) -> torch.Tensor:
    """Whole numbers for rows W, columns in rounding order; L as lowbit.methods.columns.feedback gives it."""
    rows, columns = W.shape
    weight = L.diagonal() * step.square()
    aims, numbers = W[:, None].clone(), torch.zeros(rows, 1, columns)
    cost = torch.zeros(rows, 1)
    for j in range(columns):
        x = aims[:, :, j] / step[j]
        near = x.round()
        offers = torch.cat([near, near + torch.where(x >= near, 1.0, -1.0)], 1)
        price = torch.cat([cost, cost], 1) + weight[j] * (torch.cat([x, x], 1) - offers).square()
        stay = price.argsort(dim=1, stable=True)[:, :kept]
        parent = (stay % x.shape[1])[..., None].expand(-1, -1, columns)
        cost = price.gather(1, stay)
        aims, numbers = aims.gather(1, parent), numbers.gather(1, parent)
        numbers[:, :, j] = offers.gather(1, stay)
        error = W[:, None, j] - numbers[:, :, j] * step[j]
        aims[:, :, j + 1 :] += error[..., None] * L[j + 1 :, j]
    return numbers[:, 0]


def rate(numbers: torch.Tensor) -> float:
    """Order-0 entropy, one table for all columns."""
    counts = torch.unique(numbers, return_counts=True)[1].double()
    p = counts / counts.sum()
    return float(-(p * p.log2()).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--sites", type=lambda s: s.split(","), default=["q_proj", "o_proj", "gate_proj"])
    arguments = parser.parse_args()
    for name, W, L, relative in layers(arguments):
        strict = L.tril(-1)
        for wanted in (2.3, 3.3):
            step = relative * float((W / relative).std()) * 2 ** (2.05 - wanted)
            found = []
            for kept in KEPT:
                numbers = searched(W, L, step, kept)
                gap = W - numbers * step
                error = ((gap + gap @ strict.t()).square() @ L.diagonal()).sum()
                found.append(10 * math.log10(float(error)) + 6.02 * rate(numbers))
            gains = ", ".join(f"{kept}: {found[0] - f:.2f}" for kept, f in zip(KEPT[1:], found[1:], strict=True))
            print(f"{name} at about {wanted} bits, dB gained by rows kept: {gains}", flush=True)


if __name__ == "__main__":
    main()
