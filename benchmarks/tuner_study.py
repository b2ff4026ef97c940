"""What learned rounding gains, part by part and at several widths, beside GPTQ: the numbers behind `tune`'s defaults.

    python benchmarks/tuner_study.py --model smollm2 --calibration train.txt --text test.txt --device cuda \
        gptq:int3-g64 tune:int3-g64,share=0 tune:int3-g64,steps=0 tune:int3-g64

Walks every recipe in memory (calibration from the first windows of the text) and scores it on the same device in
float32 beside the original, with plain transformers: KL(original || candidate), perplexity, top-1 kept. Writes no
checkpoint: `quality.py` measures what users get, files included. Prints one JSON line a recipe.

What was found on SmolLM2-135M-Instruct (all 210 linears, groups of 64, windows of 512 of raw WikiText-2 train, KL on
the first 10 windows of 1024 of test; H200, forward passes of the descent in TF32). The figures are those of a prototype
with CUDA graphs, which draws its windows one by one; before the descent, `tune` agreed with it to 1 % in the error of
the first two blocks. One run each, good to about 0.005 at int3. "cost" counts forward passes of one window through the
model (back propagation as two), without GPTQ's own loops; auto-round's 50 steps of 8, on 16 windows, cost 1230.

    KL                                                          windows  cost    int4    int3    int2
    gptq, true sequential / from one pass                            32    64          .474/.473
    correction alone (share .7, ridge .3)                            32   160            .336
    correction alone, ridge .1                                   64/128   320/640     .309/.294
    descent alone, 50 steps of 4, lr .01                             32   700   .092     .305    1.03
    descent alone, 64 steps of 2, lr .005                            64   580            .288
    both (the defaults, scale_lr 0)                                  64   700   .076     .272
    both, lr .01, scale_lr 0                                         64   700                     .987
    both, ridge .2; at int2 ridge .3 and scale_lr .002              128  1020            .269     .877

Correction at 32 windows, (share, ridge): (1, .01) .432, (.7, .1) .347, (.7, .3) .339, (.5, .1) .332, (1, 1) .345,
(.5, 1) .350. Tokens not weighted by 1/|target|²: .352. Statistics from already rounded predecessors: no difference.

Left out. Descent alone, 32 windows, 50 steps of 4; the plain loss gives .373 at lr .04, .336 at .02 (where not said),
.305 at .01, .309 at .005, .324 at .0025:

- targets computed from the rounded inputs: .764 (scales alone .389 for .370);
- GPTAQ's correction of each linear's own output, closed form, instead of the block's: diverges at share 1, .489 at .5;
- a loss through one more, original, block: .343; channels weighted by 1 / mean square: .366; plain squares: .338;
- Adam instead of signs: .372; sign of the momentum: .758; gradients over their root mean square a tensor, row or column
  (lr .005): .326, .314, .303;
- positions from GPTQ's compensated values: .349; kept .05 or .1 from the boundary (lr .01, .005): .315, .368;
  round to nearest as the start: .314;
- learned scales alone: .370; after the correction, 64 windows: .299; beside rounding no gain at int3, 1.016 for 1.032
  at int2 (lr .01);
- inputs with their errors scaled at random, or by 1.25 (lr .01): .317, .328; a tenth or a fifth of the target from the
  rounded inputs (lr .01): .306, .314; blocks learned on alternating halves of the windows (lr .01): .329, with 128
  windows .288 for .294;
- four times the steps on the same 32 windows (lr .01): .309; on 128 windows .263.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lowbit.arrays import Float, Int, Tensor
from lowbit.calibration import text as texts
from lowbit.evaluation import protocol
from lowbit.models.graph import set_matrix
from lowbit.models.resolve import open_model
from lowbit.pipeline.recipe import parse, with_calibration
from lowbit.pipeline.result import Finished
from lowbit.pipeline.walk import walk


@dataclass
class Kept:
    """A sink in memory."""

    blocks: dict[str, Finished] = field(default_factory=dict)

    def has(self, block: str) -> bool:
        return block in self.blocks

    def read(self, block: str) -> Finished:
        return self.blocks[block]

    def write(self, block: str, module: nn.Module, done: Finished) -> None:
        self.blocks[block] = done


def main() -> None:
    arguments = _arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    source = open_model(arguments.model)
    read = texts.read(arguments.text, "evaluation")
    ids = texts.encode(read, source.tokenizer)
    windows = protocol.parse(f"windows-{arguments.length}").cut(ids, arguments.windows, read.name, read.digest).ids
    assert source.root is not None  # it was opened from a folder
    original = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32).to(arguments.device).eval()
    for line in arguments.recipes:
        recipe = with_calibration(
            parse(line), text=arguments.calibration, samples=arguments.samples, length=arguments.calibration_length,
        )  # fmt: skip
        text = texts.read(arguments.calibration, "calibration")
        tokens = texts.sample(text, source.tokenizer, arguments.samples, arguments.calibration_length, None).ids
        sink = Kept()
        wall, cpu = time.perf_counter(), time.process_time()
        walk(source, recipe, tokens, sink, dtype=getattr(torch, arguments.dtype), device=arguments.device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        candidate = _candidate(original, {site: q for done in sink.blocks.values() for site, q in done.codes.items()})
        nbytes = sum(report.nbytes for done in sink.blocks.values() for report in done.reports)
        weights = sum(math.prod(q.shape) for done in sink.blocks.values() for q in done.codes.values())
        print(json.dumps({
            "recipe": line, "samples": arguments.samples, "bits": round(8 * nbytes / weights, 3),
            **_compare(original, candidate, windows.to(arguments.device)),
            "wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "device": str(arguments.device), "dtype": arguments.dtype,
        }), flush=True)  # fmt: skip


def _candidate(original: nn.Module, codes: Mapping[str, Any]) -> nn.Module:
    model = copy.deepcopy(original)
    for site, q in codes.items():
        module = model.get_submodule(site)
        set_matrix(module, q.decode().to(module.weight.device))  # type: ignore[union-attr, arg-type]
    return model


@torch.no_grad()
def _compare(original: nn.Module, candidate: nn.Module, windows: Int[Tensor, "windows length"]) -> dict[str, float]:
    """Means over every scored token: all but a window's first."""
    kl = nll = same = 0.0
    for window in windows:
        p, q = (_log_probabilities(model, window) for model in (original, candidate))
        kl += float((p.exp() * (p - q)).sum(-1, dtype=torch.float64).sum())
        nll -= float(q.gather(1, window[1:, None]).sum(dtype=torch.float64))
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
    scored = windows.shape[0] * (windows.shape[1] - 1)
    return {"kl": round(kl / scored, 4), "ppl": round(math.exp(nll / scored), 2), "top1": round(same / scored, 4)}


def _log_probabilities(model: nn.Module, window: Int[Tensor, "length"]) -> Float[Tensor, "positions vocab"]:
    logits: Tensor = model(input_ids=window[None]).logits[0, :-1]
    return logits.float().log_softmax(-1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("recipes", nargs="+")
    return parser.parse_args()


if __name__ == "__main__":
    main()
