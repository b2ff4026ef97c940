"""Every method on one model, beside the 16-bit original: the rows of docs/results/methods.md.

    python benchmarks/method_table.py --model smollm2 --calibration train.txt --text test.txt --out rows.jsonl
    python benchmarks/method_table.py --model DIR --text test.txt --out rows.jsonl --only W4,KV4

Each recipe is quantized into a temporary directory, loaded back from its files and scored in float32, paired with the
original on the same tokens: KL, perplexity, top-1, with clustered intervals. Recipes whose KV cache is rounded are
scored through the cache, ``--chunk`` tokens at a time, beside the original run the same way. One JSON line a recipe is
appended to ``--out``; recipes that it holds already are not run again, so an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from recipes import GROUPS, SHORT
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import lowbit
from lowbit.calibration import text as texts
from lowbit.errors import LowbitError
from lowbit.evaluation import protocol
from lowbit.evaluation.findings import findings
from lowbit.evaluation.scorer import Scorer
from lowbit.io.native import cache_format
from lowbit.models.resolve import open_model
from lowbit.pipeline.recipe import parse, with_calibration
from lowbit.study.stages import make, torch_dtype


def main() -> None:
    arguments = _arguments()
    logging.disable_progress_bar()
    source = open_model(arguments.model)
    read = texts.read(arguments.text, "evaluation")
    ids = texts.encode(read, source.tokenizer)
    assert source.root is not None  # it was opened from a directory
    original = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32).to(arguments.device)
    references: dict[int | None, Any] = {}
    done, name = _done(arguments.out), Path(arguments.model).name
    for group, lines in (SHORT if arguments.short else GROUPS).items():
        if arguments.only and group not in arguments.only.split(","):
            continue
        for line in lines:
            line = line.replace("g64", f"g{arguments.group}")
            if (name, line) in done:
                continue
            recipe = with_calibration(
                parse(line), text=arguments.calibration, samples=arguments.samples, length=arguments.calibration_length,
            )  # fmt: skip
            # the first windows of the text, as peers take them
            calibration = recipe.calibration.model_copy(update={"seed": None})
            recipe = recipe.model_copy(update={"calibration": calibration})
            chunk = arguments.chunk if recipe.kv else None
            cut = protocol.parse(f"windows-{arguments.length}" + (f"/chunk-{chunk}" if chunk else ""))
            windows = cut.cut(ids, arguments.windows, read.name, read.digest)
            if chunk not in references:
                references[chunk] = Scorer(original, source.digest, chunk=chunk).reference(windows)
            row: dict[str, Any] = {"model": name, "group": group, "recipe": line, "protocol": str(cut)}
            row |= _measure(arguments, recipe, windows, references[chunk])
            row |= {"tokens": windows.scored, "calibration": [read_name(arguments), arguments.samples,
                    arguments.calibration_length], "device": arguments.device, "processor": platform.processor(),
                    "torch": torch.__version__, "dtype": arguments.dtype}  # fmt: skip
            with arguments.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def _measure(arguments: argparse.Namespace, recipe: Any, windows: Any, reference: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.perf_counter(), time.process_time()
        try:
            source = open_model(arguments.model)
            dtype = torch_dtype(arguments.dtype)
            made = make(source, recipe, Path(folder) / "out", dtype, lambda *_: None, device=arguments.device)
            cost = time.perf_counter() - started, time.process_time() - cpu
            model = lowbit.load(Path(folder) / "out", dtype=torch.float32, kernels="dense", device=arguments.device)
            kv = cache_format(recipe)
            chunk = arguments.chunk if kv else None
            tokens, _ = Scorer(model, made["digest"], kv=kv, chunk=chunk).score(windows, reference)
        except LowbitError as error:  # what a model's graph or a method refuses is a row of the table too
            return {"refused": f"{type(error).__name__}: {error.what}"}
    found = {f.metric: [f.value, f.low, f.high, f.verdict] for f in findings(tokens)}
    return {
        "bits_per_weight": made["bits_per_weight"], "bytes": made["bytes_total"],
        "ppl": math.exp(float(tokens.nll.mean())), "ppl_original": math.exp(float(tokens.nll_ref.mean())), **found,
        "wall_s": round(cost[0], 1), "cpu_s": round(cost[1], 1),
    }  # fmt: skip


def read_name(arguments: argparse.Namespace) -> str:
    return Path(arguments.calibration).name


def _done(path: Path) -> set[tuple[str, str]]:
    if not path.exists():
        return set()
    return {(row["model"], row["recipe"]) for row in map(json.loads, path.read_text().splitlines())}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=64, help="tokens at a time, for recipes that round the KV cache")
    parser.add_argument("--group", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--only", default="", help=f"some of {', '.join(GROUPS)}")
    parser.add_argument("--short", action="store_true", help="a choice of recipes, for slow machines")
    parser.add_argument("--dtype", default="auto", help="of the calibration passes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
