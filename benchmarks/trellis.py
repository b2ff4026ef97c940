"""What a trellis would gain over the plain entropy-coded grid, with GPTQ's error feedback on both, at equal rate.

Dependent quantization with four states (two grids: even multiples of the step; odd ones and zero) by a Viterbi search
in which every survivor carries its own feedback, against rounding each number alone. Both weigh distortion against
rate. Rates are order-0 entropies, one table a grid. docs/decisions/0018 holds the outcome.

    python benchmarks/trellis.py                                   independent Gaussian numbers
    python benchmarks/trellis.py --model DIR --text train.txt --block 12 --sites q_proj,o_proj,gate_proj
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch

from lowbit.calibration import text as texts
from lowbit.calibration.stats import Gram
from lowbit.methods.columns import feedback
from lowbit.models.resolve import open_model
from lowbit.models.stream import Stream

TRELLIS = {1: ([[0, 0]], [0]), 4: ([[0, 2], [2, 0], [1, 3], [3, 1]], [0, 0, 1, 1])}
"""By states: the next state for an even and an odd number, and the grid of a state."""
REACH = 200  # numbers beyond it share a bin


class Outcome(NamedTuple):
    bits: float
    error: float
    cost: torch.Tensor


def value(number: torch.Tensor, grid: int) -> torch.Tensor:
    """In halves of a step: even multiples on grid 0, odd ones and zero on grid 1."""
    return 2 * number - torch.sign(number) * grid


def best(x: torch.Tensor, states: int, grid: int, parity: int, cost: torch.Tensor, weight: float) -> torch.Tensor:
    """Cost, number and value, stacked, of the cheapest number of a parity (of any, without a trellis) for targets x."""
    base = torch.round(x) if states == 1 else torch.round(x / 2)
    offers = []
    for step in (-1, 0, 1) if states == 1 else (-2, -1, 0, 1, 2):
        n = base + step
        v = n if states == 1 else value(n, grid)
        price = (x - v) ** 2 + weight * cost[grid][(n.long() + REACH).clamp(0, 2 * REACH)]
        if states > 1:
            price = torch.where((n.long() & 1) == parity, price, torch.full_like(price, 1e30))
        offers.append(torch.stack([price, n, v]))
    offered = torch.stack(offers)  # (offers, 3, ...)
    at = offered[:, 0].argmin(0)
    return torch.gather(offered, 0, at[None, None].expand(1, 3, *at.shape))[0]


def rounded(W: torch.Tensor, L: torch.Tensor, unit: torch.Tensor, states: int, weight: float, passes: int) -> Outcome:
    """Rate and error of rows W with a step ``unit`` a column, errors fed forward by L; the code's lengths are learned
    in ``passes``. The error is in steps, squared and averaged."""
    rows, columns = W.shape
    following, grids = TRELLIS[states]
    fine = 1.0 if states == 1 else 0.5
    cost = torch.zeros(2, 2 * REACH + 1)
    bits = error = 0.0
    for _ in range(passes):
        T = W[:, None, :].expand(rows, states, columns).clone()
        total = torch.full((rows, states), 1e30)
        total[:, 0] = 0
        numbers = torch.zeros(rows, states, columns, dtype=torch.int16)
        taken = torch.zeros(rows, states, columns, dtype=torch.int8)
        spent = torch.zeros(rows, states)
        for j in range(columns):
            step = float(unit[j]) * fine
            arriving: dict[int, list[tuple[int, torch.Tensor]]] = {s: [] for s in range(states)}
            for s in range(states):
                for parity in (0, 1)[: 1 if states == 1 else 2]:
                    offer = best(T[:, s, j] / step, states, grids[s], parity, cost, weight)
                    offer[0] += total[:, s]
                    arriving[following[s][parity]].append((s, offer))
            chosen = []
            for s in range(states):
                offers = torch.stack([offer for _, offer in arriving[s]])  # (offers, 3, rows)
                at = offers[:, 0].argmin(0)
                came = torch.tensor([source for source, _ in arriving[s]])[at]
                chosen.append((came, torch.gather(offers, 0, at[None, None].expand(1, 3, rows))[0]))
            source = torch.stack([came for came, _ in chosen], 1)  # (rows, states)
            picked = torch.stack([offer for _, offer in chosen], 2)  # (3, rows, states)
            whole = source[:, :, None].expand(-1, -1, columns)
            T, numbers, taken = (torch.gather(x, 1, whole) for x in (T, numbers, taken))
            d = T[:, :, j] - picked[2] * step  # what this survivor's feedback left to round, less what it became
            spent = torch.gather(spent, 1, source) + (d / float(unit[j])) ** 2
            total = picked[0]
            numbers[:, :, j], taken[:, :, j] = picked[1].to(torch.int16), torch.tensor(grids)[source].to(torch.int8)
            if j + 1 < columns:
                off = W[:, None, j] - picked[2] * step
                T[:, :, j + 1 :] += off[:, :, None] * L[j + 1 :, j]
        end, row = total.argmin(1), torch.arange(rows)
        n, grid = numbers[row, end].long(), taken[row, end]
        error, bits = float(spent[row, end].sum()) / W.numel(), 0.0
        for g in (0, 1):
            counts = torch.bincount((n[grid == g] + REACH).clamp(0, 2 * REACH), minlength=2 * REACH + 1).double()
            if counts.sum():
                p = counts / counts.sum()
                bits -= float((p[p > 0] * p[p > 0].log2()).sum() * counts.sum()) / W.numel()
                smooth = counts + 0.02
                cost[g] = -(smooth / smooth.sum()).log2()
    return Outcome(bits, error, cost)


def study(W: torch.Tensor, L: torch.Tensor, relative: torch.Tensor, name: str, rates: list[float]) -> None:
    """Prints the error of both, in dB at the asked rate (a bit is 6.02 dB), and the gain."""
    spread = float((W / relative).std())
    for rate in rates:
        found = {}
        for states in TRELLIS:
            trials = []
            for share in (0.0, 0.5, 1.0):  # of the slope of distortion over rate
                scale = spread * 2 ** (2.05 - rate)
                for _ in range(4):
                    distortion = 1 / 12 if states == 1 else 0.8 / 3  # about, in the units of ``best``
                    out = rounded(
                        W, L, relative * scale, states, share * 2 * math.log(2) * distortion, 3 if share else 1
                    )
                    if abs(out.bits - rate) < 0.02:
                        break
                    scale *= 2 ** (out.bits - rate)
                trials.append(10 * math.log10(out.error * scale**2 / spread**2) + 6.02 * (out.bits - rate))
            found[states] = min(trials), trials[0]
        gain = found[1][0] - found[4][0]
        print(
            f"{name} at {rate} bits: plain {found[1][0]:.2f} dB ({found[1][1]:.2f} without weighing the rate), "
            f"four states {found[4][0]:.2f} dB, gain {gain:.2f} dB = {gain / 6.02:.2f} bit",
            flush=True,
        )


def layers(arguments: argparse.Namespace) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows of real matrices in rounding order, with L and the relative steps of their columns."""
    source = open_model(arguments.model)
    ids = texts.encode(texts.read(str(arguments.text), "calibration"), source.tokenizer)
    tokens = torch.as_tensor(ids[: 16 * 512], dtype=torch.int64).view(16, 512)
    stream = Stream(source, torch.float32)
    hidden = stream.embed(tokens)
    for i in range(arguments.block):
        hidden = stream.run(i, stream.load(i), hidden)
    block, grams = stream.load(arguments.block), {}
    linears = {n.rpartition(".")[2]: m for n, m in block.named_modules() if n.rpartition(".")[2] in arguments.sites}
    for leaf, module in linears.items():
        grams[leaf] = Gram(module.weight.shape[1])
        module.register_forward_pre_hook(lambda _m, a, n=leaf: grams[n].update(a[0].reshape(-1, a[0].shape[-1])))
    stream.run(arguments.block, block, hidden)
    found = []
    for leaf, module in linears.items():
        order, L = feedback(grams[leaf], 0.01, True, leaf)
        rows = torch.randperm(len(module.weight), generator=torch.Generator().manual_seed(0))[: arguments.rows]
        step = L.diagonal().rsqrt()  # every column adds the same error then (lowbit/methods/columns/lattice.py)
        found.append((leaf, module.weight.detach()[rows][:, order].contiguous(), L, step / step.mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--sites", type=lambda s: s.split(","), default=["q_proj", "o_proj", "gate_proj"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.model is None:
        study(torch.randn(128, 512), torch.eye(512), torch.ones(512), "Gaussian", [2.0, 3.3])
        return
    for name, W, L, step in layers(arguments):
        study(W, L, step, name, [2.3, 3.3])


if __name__ == "__main__":
    main()
