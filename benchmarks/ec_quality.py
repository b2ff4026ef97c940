"""Entropy-coded recipes on one model: KL with intervals, stored bits and seconds, beside groups of integers.

    python benchmarks/ec_quality.py --model smollm2 --calibration train.txt --text test.txt --out rows.jsonl \\
        gptq:ec3.3 gptq:ec@3.3 tune:ec@2.28,steps=0,ridge=0.1 gptq:int3-g64

``ec3.3`` gives every linear that rate; ``ec@3.3`` shares the same bytes among linears by their sensitivity, which is
measured once a model and text. Each recipe is quantized into a temporary directory, loaded back from its files and
scored in float32 beside the original on the same tokens. One JSON line a recipe is appended to ``--out``; recipes that
it holds already are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import lowbit
from lowbit.calibration import text as texts
from lowbit.cli.sensitivity import measured
from lowbit.evaluation import protocol
from lowbit.evaluation.findings import findings
from lowbit.evaluation.scorer import Scorer
from lowbit.formats.presets import preset
from lowbit.models.resolve import open_model
from lowbit.models.source import Source
from lowbit.pipeline.coverage import audit
from lowbit.pipeline.rates import FORMATS, measurable, share
from lowbit.pipeline.recipe import Recipe, parse, with_calibration
from lowbit.study.stages import make, torch_dtype


def main() -> None:
    arguments = _arguments()
    logging.disable_progress_bar()
    source = open_model(arguments.model)
    read = texts.read(arguments.text, "evaluation")
    ids = texts.encode(read, source.tokenizer)
    windows = protocol.parse(f"windows-{arguments.length}").cut(ids, arguments.windows, read.name, read.digest)
    original = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32).to(arguments.device)
    reference = Scorer(original, source.digest).reference(windows)
    del original
    done = {json.loads(row)["recipe"] for row in _lines(arguments.out)}
    for line in arguments.recipes:
        if line in done:
            continue
        row = {"model": arguments.model, "recipe": line, "protocol": windows.protocol, "tokens": windows.scored}
        row |= {"text": read.name, "samples": arguments.samples, "device": arguments.device, "dtype": arguments.dtype}
        row |= _measure(arguments, line, windows, reference)
        with arguments.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def _measure(arguments: argparse.Namespace, line: str, windows: Any, reference: Any) -> dict[str, Any]:
    source, dtype = open_model(arguments.model), torch_dtype(arguments.dtype)
    shared = re.search(r"ec@(\d+(?:\.\d+)?)", line)
    recipe = with_calibration(
        parse(line.replace(shared[0], "ec") if shared else line), text=arguments.calibration,
        samples=arguments.samples, length=arguments.calibration_length,
    )  # fmt: skip
    budget = 0
    if shared:
        recipe, budget = _at_rate(source, recipe, float(shared[1]), dtype)
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.perf_counter(), time.process_time()
        out = Path(folder) / "out"
        made = make(source, recipe, out, dtype, lambda *_: None, device=arguments.device)
        cost = time.perf_counter() - started, time.process_time() - cpu
        shards = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        started = time.perf_counter()
        model = lowbit.load(out, dtype=torch.float32, kernels="dense", device=arguments.device)
        loading = time.perf_counter() - started
        tokens, _ = Scorer(model, made["digest"]).score(windows, reference)
    found = {f.metric: [f.value, f.low, f.high] for f in findings(tokens)}
    return {
        "bits_per_weight": made["bits_per_weight"], "bytes_shards": shards, "budget": budget,
        "budget_used": shards / budget if budget else None, "ppl": math.exp(float(tokens.nll.mean())),
        "ppl_original": math.exp(float(tokens.nll_ref.mean())), **found, "wall_s": round(cost[0], 1),
        "cpu_s": round(cost[1], 1), "load_s": round(loading, 2),
    }  # fmt: skip


def _at_rate(source: Source, recipe: Recipe, bits: float, dtype: torch.dtype) -> tuple[Recipe, int]:
    """The recipe with the bytes of ``bits`` a weight shared among linears, and the size of all files that makes."""
    known = measured(source, measurable(recipe), list(FORMATS), dtype)
    weights = audit(source, measurable(recipe)).quantized
    sites = {row.name: row.shape for row in known.sites}
    found = share(source, recipe, known, 1 << 50)
    beside = found.nbytes - sum(preset(fmt).nbytes(sites[name]) for name, fmt in found.formats.items())
    budget = beside + int(bits * weights / 8)
    return share(source, recipe, known, budget).recipe, budget


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="auto", help="of the calibration passes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("recipes", nargs="+")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
