"""Size at equal error: entropy-coded linears against integers in groups and nf4, each by GPTQ on the same statistics.

    python benchmarks/ec_layers.py --model smollm2 --calibration train.txt --block 12

For every linear of a block and every fixed format: its output error tr(dW G dWᵀ), and the stored bits at which the
entropy-coded linear has just that error (between two rates a tenth of a bit apart, errors fall in a straight line in
log2). Prints one JSON line a linear and format, and the total over the block. Fisher weights are left out: the error
compared is the plain one.
"""

from __future__ import annotations

import argparse
import json
import math

import torch

from lowbit.calibration import text as texts
from lowbit.calibration.stats import Gram
from lowbit.formats.ec import Entropy
from lowbit.formats.presets import preset
from lowbit.methods.base import Weight
from lowbit.methods.gptq import Gptq
from lowbit.models.graph import matrix
from lowbit.models.resolve import open_model
from lowbit.models.stream import Stream
from lowbit.pipeline.observe import discover, observe
from lowbit.pipeline.spill import Hidden

FIXED = ("int4-g128", "int3-g128", "int2-g64", "nf4")


def main() -> None:
    arguments = _arguments()
    source = open_model(arguments.model)
    read = texts.read(arguments.calibration, "calibration")
    tokens = texts.sample(read, source.tokenizer, arguments.samples, arguments.length, None).ids
    stream = Stream(source, torch.float32)
    hidden = Hidden.embed(stream, tokens, 4)
    for i in range(arguments.block):
        block = stream.load(i)
        hidden.advance(stream, i, block)
    name, block = source.blocks[arguments.block], stream.load(arguments.block)
    sites = [site.name for site in source.sites(name)]
    stages = discover(stream, arguments.block, block, hidden, sites)
    found = observe(stream, arguments.block, block, hidden, stages, dict.fromkeys(sites, frozenset({Gram})), {})
    totals = {fmt: [0.0, 0.0] for fmt in FIXED}
    for site in sites:
        w = Weight(site, matrix(source.load(site, torch.float32)).contiguous())
        G = found[site][Gram].sum()

        def error(q: torch.Tensor, w: Weight = w, G: torch.Tensor = G) -> float:
            dW = q - w.matrix
            return float((dW @ G).mul_(dW).sum())

        for fixed in FIXED:
            q = Gptq()(w, found[site], preset(fixed))
            wanted, rate = error(q.decode()), q.bits_per_weight - 0.6
            for _ in range(3):  # the rate of the same error, by steps of log2(error) / 2
                ours = Gptq()(w, found[site], Entropy.of(round(rate, 3)))
                gap = math.log2(error(ours.decode()) / wanted) / 2
                rate = ours.bits_per_weight + gap
                if abs(gap) < 0.01:
                    break
            saved = 1 - rate / q.bits_per_weight
            totals[fixed][0] += rate * w.matrix.numel()
            totals[fixed][1] += q.bits_per_weight * w.matrix.numel()
            print(json.dumps({"site": site, "format": fixed, "bits": q.bits_per_weight, "ec_bits": round(rate, 4),
                              "smaller": round(saved, 4)}), flush=True)  # fmt: skip
    for fixed, (coded, grouped) in totals.items():
        print(json.dumps({"block": name, "format": fixed, "smaller": round(1 - coded / grouped, 4)}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--block", type=int, default=12)
    return parser.parse_args()


if __name__ == "__main__":
    main()
