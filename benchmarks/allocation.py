"""Does a budget of bytes, spent by predicted sensitivity, buy more than one format for all linears?

    python benchmarks/allocation.py --model DIR --calibration train.txt --text test.txt --out rows.jsonl

For each of ``--uniform``: the model in that one format, and the mix that ``lowbit quantize --bytes`` chooses for at
most as many bytes, both scored on the same tokens beside the original. The ratio of their KL is paired by token and
has an interval clustered by window. KL of every token is kept under ``--keep`` (formats that stand there are not run
again), and ``--beside`` names such a folder of an earlier run (another predictor, say), to whose mixes these are
compared in the same way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import lowbit
from lowbit.calibration import text as texts
from lowbit.cli.sensitivity import coded, spend
from lowbit.evaluation import protocol
from lowbit.evaluation.scorer import Scorer
from lowbit.evaluation.statistics import cluster_ratio, paired_mean
from lowbit.models.resolve import open_model
from lowbit.pipeline.recipe import Recipe, parse, with_calibration
from lowbit.study.stages import make


class Scored(NamedTuple):
    """KL of every token, the window that it stands in, and the bytes of the files."""

    kl: np.ndarray
    window: np.ndarray
    nbytes: int


def main() -> None:
    arguments = _arguments()
    logging.disable_progress_bar()
    source = open_model(arguments.model)
    read = texts.read(arguments.text, "evaluation")
    ids = texts.encode(read, source.tokenizer)
    windows = protocol.parse(f"windows-{arguments.length}").cut(ids, arguments.windows, read.name, read.digest)
    assert source.root is not None  # it was opened from a directory
    original = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32)
    reference = Scorer(original, source.digest).reference(windows)

    def scored(recipe: Recipe, name: str) -> Scored:
        file = None if arguments.keep is None else arguments.keep / f"{name}.npz"
        if file is not None and file.exists() and not name.startswith("mix"):
            return _kept(file)
        with tempfile.TemporaryDirectory() as folder:
            made = make(open_model(arguments.model), recipe, Path(folder) / "out", torch.float32, lambda *_: None)
            model = lowbit.load(Path(folder) / "out", dtype=torch.float32, kernels="dense")
            tokens, _ = Scorer(model, made["digest"]).score(windows, reference)
        found = Scored(np.asarray(tokens.kl), np.asarray(tokens.chunk), made["bytes_total"])
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, **found._asdict())
        return found

    for fmt in arguments.uniform.split(","):
        recipe = with_calibration(
            parse(coded(arguments.recipe, fmt)), text=arguments.calibration, samples=arguments.samples,
            length=arguments.calibration_length,
        )  # fmt: skip
        uniform = scored(recipe, fmt)
        started = time.perf_counter()
        spent = spend(open_model(arguments.model), recipe, uniform.nbytes, arguments.formats, None, torch.float32)
        seconds = time.perf_counter() - started
        mix = scored(spent.recipe, f"mix-{fmt}")
        row: dict[str, Any] = {
            "model": Path(arguments.model).name, "recipe": recipe.line, "tokens": windows.scored,
            "uniform": {"bytes": uniform.nbytes, "kl": _interval(uniform)},
            "mix": {"bytes": mix.nbytes, "kl": _interval(mix), "predicted": spent.loss,
                    "linears": dict(sorted(Counter(spent.formats.values()).items())), "seconds": round(seconds, 1)},
            "ratio": _ratio(mix, uniform),
        }  # fmt: skip
        if arguments.beside is not None:
            row["ratio_beside"] = _ratio(mix, _kept(arguments.beside / f"mix-{fmt}.npz"))
        with arguments.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def _kept(file: Path) -> Scored:
    with np.load(file) as kept:
        return Scored(kept["kl"], kept["window"], int(kept["nbytes"]))


def _interval(scored: Scored) -> list[float]:
    return list(paired_mean(scored.kl, scored.window)[:3])


def _ratio(a: Scored, b: Scored) -> list[float]:
    """KL of ``a`` over KL of ``b`` on the same tokens: estimate, low, high."""
    return list(cluster_ratio(a.kl, b.kl, a.window)[:3])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--recipe", default="gptq", help="whose encoder makes both")
    parser.add_argument("--uniform", default="int3-g64,int3-g32,int4-g128,int4-g64", help="the sizes that are spent")
    parser.add_argument("--formats", default=None, help="what mixes may hold; by default integers of 2 to 8 bits")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--keep", type=Path, help="folder for the KL of every token")
    parser.add_argument("--beside", type=Path, help="such a folder of an earlier run")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
