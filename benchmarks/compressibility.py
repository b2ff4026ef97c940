"""What lossless coding of quantized weights gives, beside their quality: the trade-off of arXiv 2403.01384.

    python benchmarks/compressibility.py --model DIR --calibration tail.txt --text test.txt --out rows.jsonl
    python benchmarks/compressibility.py --synthetic --out rows.jsonl

Each recipe is quantized into a temporary directory, scored in float32 beside the original on the same tokens, and the
stored bytes of all its linears (codes, scales, zeros) go through every coder: zstandard takes them as they are, Huffman
and FSE are sizes computed over the fields of those bytes, ours is what ``lowbit compress`` does, or, of entropy-coded
recipes, what the checkpoint holds already. One JSON line a recipe is appended to ``--out``; recipes that it holds are
not run again. ``--synthetic`` makes the table of made-up tensors instead. ``--peers`` is a folder with zstandard, which
is no dependency of the package: without it its columns stay empty. Decoding is measured in processor time of one
thread, loading by the clock. ``compressibility_page.py`` makes tables and the chart of the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressibility_coders import (
    Coder,
    Piece,
    computed,
    entropy,
    fse,
    huffman,
    ours,
    own,
    stored,
    streams,
    zstandard_coders,
)  # fmt: skip
from lossless import Throttled

from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Coded

RECIPES = [
    "bf16", "rtn:int8-tensor-sym", "smoothquant+rtn:int8-tensor-sym", "rtn:int8-row-sym", "rtn:int4-g128",
    "gptq:int4-g128", "rtn:nf4", "rtn:int3-g64", "gptq:int3-g64", "gptq:ec6.5", "gptq:ec4.3", "gptq:ec3.3",
    "gptq:ec2.5",
]  # fmt: skip
RATES = {"200 MB/s": 200e6, "2 GB/s": 2e9}


def speeds(coders: dict[str, Coder], pieces: list[Piece], repeats: int) -> dict[str, float]:
    """Uncoded bytes a second of processor time, median; every coder's result is compared with the original first."""
    raw = sum(piece.data.size for piece in pieces)
    original = sorted(piece.data.tobytes() for piece in pieces)
    for name, coder in coders.items():
        assert sorted(bytes(np.ascontiguousarray(b)) for b in coder.decode()) == original, name
    spent: dict[str, list[float]] = {name: [] for name in coders}
    for _ in range(repeats):  # interleaved: what slows one down slows the others too
        for name, coder in coders.items():
            started = time.process_time()
            coder.decode()
            spent[name].append(time.process_time() - started)
    return {name: raw / statistics.median(values) for name, values in spent.items()}


def loads(raw: int, coder: Coder, decode: float, repeats: int, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds by the clock to have the bytes, coded or not, from a throttled reader; decoding begins when all is read.

    The least of the repeats: other work on the machine only adds. Beside them what the rule says of ``decode`` bytes a
    second: coding pays where it is more than ``rate * r / (r - 1)``.
    """
    path, r, found = folder / "bytes", raw / coder.nbytes, {}
    path.write_bytes(bytes(raw))
    for name, rate in RATES.items():
        plain, coded = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            Throttled(rate).read(path, raw)
            plain.append(time.perf_counter() - started)
            started = time.perf_counter()
            Throttled(rate).read(path, coder.nbytes)
            coder.decode()
            coded.append(time.perf_counter() - started)
        found[name] = {
            "plain_s": min(plain), "coded_s": min(coded), "change": min(coded) / min(plain) - 1,
            "predicted": 1 / r + rate / decode - 1, "needed": rate * r / (r - 1) if r > 1 else math.inf,
        }  # fmt: skip
    path.unlink()
    return found


def coded_row(pieces: list[Piece], coder: Coder, repeats: int, folder: Path) -> dict[str, Any]:
    """Everything but quality; bits are over the weights of all linears."""
    weights = sum(p.fields()[0].size for p in pieces if p.weights)
    raw = sum(piece.data.size for piece in pieces)
    zstd = zstandard_coders(pieces)
    coders = {**zstd, "lowbit": coder}
    sizes = {name: c.nbytes for name, c in coders.items()}
    sizes |= {"Huffman": computed(pieces, huffman), "FSE": computed(pieces, fse)}
    decode = speeds(coders, pieces, repeats)
    return {
        "weights": weights, "stored": 8 * raw / weights, "entropy": entropy(pieces),
        "bits": {name: 8 * size / weights for name, size in sizes.items()}, "ratio": raw / coder.nbytes,
        "decode": decode, "load": loads(raw, coder, decode["lowbit"], repeats, folder),
    }  # fmt: skip


def model_rows(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import lowbit
    from lowbit.calibration import text as texts
    from lowbit.evaluation import protocol
    from lowbit.evaluation.findings import findings
    from lowbit.evaluation.scorer import Scorer
    from lowbit.io import native
    from lowbit.models.resolve import open_model
    from lowbit.pipeline.recipe import parse, with_calibration
    from lowbit.study.stages import make

    logging.disable_progress_bar()
    done = {(row["model"], row["recipe"]) for row in rows_of(arguments.out)}
    source = open_model(str(arguments.model))
    read = texts.read(arguments.text, "evaluation")
    ids = texts.encode(read, source.tokenizer)
    windows = protocol.parse(f"windows-{arguments.length}").cut(ids, arguments.windows, read.name, read.digest)
    original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    reference = Scorer(original, source.digest).reference(windows)
    for line in arguments.recipes or RECIPES:
        if (arguments.model.name, line) in done:
            continue
        row: dict[str, Any] = {"model": arguments.model.name, "recipe": line, "tokens": windows.scored}
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "out"
            if line == "bf16":  # the model itself: nothing to score
                pieces = own(arguments.model)
                coder = ours(pieces)
            else:
                recipe = with_calibration(
                    parse(line), text=arguments.calibration, samples=arguments.samples,
                    length=arguments.calibration_length,
                )  # fmt: skip
                first = recipe.calibration.model_copy(update={"seed": None})  # the first windows of the text
                recipe = recipe.model_copy(update={"calibration": first})
                made = make(open_model(str(arguments.model)), recipe, out, torch.float32, lambda *_: None)
                model = lowbit.load(out, dtype=torch.float32, kernels="dense")
                tokens, _ = Scorer(model, made["digest"]).score(windows, reference)
                row |= {f.metric: [f.value, f.low, f.high] for f in findings(tokens)}
                trees = [q for _, q in native.qtensors(out)]
                pieces = [piece for q in trees for piece in stored(q)]
                coder = streams(trees) if any(isinstance(q, Coded) for q in trees) else ours(pieces)
            row |= coded_row(pieces, coder, arguments.repeats, Path(name))
        write(arguments, row)


def tensors(draw: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The published kinds of tensor, 2048 x 4096; every draw from random numbers of its own."""
    g, shape = np.random.default_rng(draw), (2048, 4096)
    z = g.standard_normal(shape, np.float32)
    yield "Gaussian", torch.from_numpy(z)
    scale = np.exp(0.35 * g.standard_normal((2048, 1), np.float32))
    yield "rows with lognormal (0.35) scale", torch.from_numpy(z * scale)
    yield "Student t (6)", torch.from_numpy(z / np.sqrt(g.standard_gamma(3.0, shape, np.float32) / 3))
    z.reshape(-1)[g.choice(z.size, round(1e-5 * z.size), replace=False)] *= 15
    yield "1e-5 of the entries x 15", torch.from_numpy(z)


def synthetic_rows(arguments: argparse.Namespace) -> None:
    """int8 codes with one scale a tensor or a row; every round trip is compared."""
    for draw in range(arguments.draws):
        for name, w in tensors(draw):
            for kind in ("tensor", "row"):
                fmt = preset(f"int8-{kind}-sym")
                pieces = [piece for piece in stored(fmt.encode(w, fmt.fit(w))) if piece.weights]
                row: dict[str, Any] = {"model": "synthetic", "recipe": f"{name}, {kind}"}
                with tempfile.TemporaryDirectory() as folder:
                    write(arguments, row | coded_row(pieces, ours(pieces), arguments.repeats, Path(folder)))


def write(arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    with arguments.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a directory of weights that were never quantized before")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9, help="of every measurement of time; medians count")
    parser.add_argument("--peers", help="a folder with zstandard")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("recipes", nargs="*", help=f"default: {' '.join(RECIPES)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.peers:
        sys.path.append(arguments.peers)
    if arguments.synthetic:
        synthetic_rows(arguments)
    if arguments.model:
        model_rows(arguments)


if __name__ == "__main__":
    main()
