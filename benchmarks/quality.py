"""Quality and cost of recipes on one model, one text, one protocol: the numbers behind the README's claims.

    python benchmarks/quality.py --model smollm2 --calibration train.txt --text test.txt rtn:int4-g64 gptq:int3-g64

Every recipe is quantized into a temporary directory (timed: wall, CPU of this process, peak memory), loaded back
from its files, and scored in float32 beside the float32 original: KL, perplexity, top-1, with clustered intervals.
Prints one JSON line a recipe. For CPU seconds that compare across runs set OMP_NUM_THREADS=1 on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import lowbit
from lowbit.calibration import text as texts
from lowbit.evaluation import protocol
from lowbit.evaluation.findings import findings
from lowbit.evaluation.scorer import Scorer
from lowbit.models.resolve import open_model
from lowbit.pipeline.recipe import parse, with_calibration
from lowbit.study.stages import make, torch_dtype


def main() -> None:
    arguments = _arguments()
    logging.disable_progress_bar()
    source = open_model(arguments.model)
    read = texts.read(arguments.text, "evaluation")
    ids = texts.encode(read, source.tokenizer)
    windows = protocol.parse(f"windows-{arguments.length}").cut(ids, arguments.windows, read.name, read.digest)
    original = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32)
    reference = Scorer(original, source.digest).reference(windows)
    del original
    print(json.dumps({
        "model": arguments.model, "protocol": windows.protocol, "tokens": windows.scored, "text": read.name,
        "ppl": math.exp(float(reference.tokens.nll.mean())), "machine": platform.processor(),
        "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }))  # fmt: skip
    for line in arguments.recipes:
        recipe = with_calibration(
            parse(line), text=arguments.calibration, samples=arguments.samples, length=arguments.calibration_length,
            seed=arguments.calibration_seed,
        )  # fmt: skip
        if arguments.calibration_seed < 0:  # the first windows of the text, as peers take them
            calibration = recipe.calibration.model_copy(update={"seed": None})
            recipe = recipe.model_copy(update={"calibration": calibration})
        with tempfile.TemporaryDirectory() as folder:
            started, cpu = time.perf_counter(), time.process_time()
            fresh = open_model(arguments.model)  # opening it is part of the cost
            made = make(fresh, recipe, Path(folder) / "out", torch_dtype(arguments.dtype), lambda *_: None)
            cost = time.perf_counter() - started, time.process_time() - cpu
            candidate = lowbit.load(Path(folder) / "out", dtype=torch.float32, kernels="dense")
            tokens, _ = Scorer(candidate, made["digest"]).score(windows, reference)
        found = {f.metric: [f.value, f.low, f.high] for f in findings(tokens)}
        print(json.dumps({
            "recipe": line, "bits_per_weight": made["bits_per_weight"], "bytes": made["bytes_total"],
            "ppl": math.exp(float(tokens.nll.mean())), **found,
            "wall_s": cost[0], "cpu_s": cost[1],
            "peak_gib_of_process_so_far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }), flush=True)  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--calibration-seed", type=int, default=0, help="negative: the first windows of the text")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("recipes", nargs="+")
    return parser.parse_args()


if __name__ == "__main__":
    main()
