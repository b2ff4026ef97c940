"""What llama.cpp computes from our GGUF files, beside what lowbit computes from the checkpoint they were made of.

    python benchmarks/gguf_peers.py --python VENV/bin/python MODEL[=RECIPE] ... [--kind f32] [--out table.md]

VENV has ``llama-cpp-python``. Each MODEL (a directory, or ``smollm2``) is quantized by RECIPE (``gptq:q4_0`` where none
is given), exported, and run on the same tokens by both. KL is that of llama.cpp's logits against lowbit's in float32,
mean over positions with a 95 % interval over windows; a file's blocks decode bit for bit, so what is left is
arithmetic: llama.cpp rounds the inputs of low-bit linears to 8 bits and keeps keys and values in float16.
``--kind f32`` decodes the weights first, which leaves the latter only.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import lowbit
from lowbit.calibration.text import read
from lowbit.io.gguf.write import write
from lowbit.io.opening import open_low_bit
from lowbit.models.resolve import open_model

WINDOWS, LENGTH = 4, 128
_THERE = """
import sys, numpy as np
from llama_cpp import Llama
path, tokens, out = sys.argv[1:]
rows = np.load(tokens)
model = Llama(path, n_ctx=rows.shape[1] + 8, logits_all=True, verbose=False, n_threads=1)
found = []
for row in rows:
    model.reset()
    model.eval(row.tolist())
    found.append(np.array(model.scores[: len(row)], dtype=np.float32))
np.save(out, np.stack(found))
print(" ".join(map(str, model.tokenize(b"Three 33 times: it's na\\xc3\\xafve.", add_bos=False))))
"""
_TEXT = "Three 33 times: it's naïve."


class Row(NamedTuple):
    """One model, one file."""

    model: str
    recipe: str
    kinds: str
    megabytes: float
    kl: float
    half: float
    top1: float
    largest: float
    same_tokens: bool


def measure(python: str, model: str, recipe: str, kind: str | None, folder: Path) -> Row:
    """Quantize, export, run in both."""
    out, file = folder / "out", folder / "model.gguf"
    subprocess.run(["lowbit", "quantize", model, recipe, "-o", str(out)], check=True, capture_output=True)
    write(open_low_bit(out), file, kind)
    tokenizer = open_model(model).tokenizer
    ids = tokenizer(read("pydoc", "evaluation").content[: 40 * LENGTH * WINDOWS])["input_ids"][: WINDOWS * LENGTH]
    tokens = torch.tensor(ids).view(WINDOWS, LENGTH)
    np.save(folder / "tokens.npy", tokens.numpy())
    there = subprocess.run(
        [python, "-c", _THERE, str(file), str(folder / "tokens.npy"), str(folder / "logits.npy")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    theirs = torch.from_numpy(np.load(folder / "logits.npy")).double()
    with torch.no_grad():
        ours = lowbit.load(out, dtype=torch.float32)(tokens).logits.double()
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    by_window = (p.exp() * (p - q)).sum(-1).mean(-1)
    return Row(
        Path(model).name, recipe, kind or _kinds(file), file.stat().st_size / 1e6, float(by_window.mean()),
        float(3.182 * by_window.std() / math.sqrt(WINDOWS)),  # Student's t, three degrees of freedom
        float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), float((ours - theirs).abs().max()),
        there.stdout.split() == [str(i) for i in tokenizer(_TEXT, add_special_tokens=False)["input_ids"]],
    )  # fmt: skip


def _kinds(file: Path) -> str:
    from gguf import GGUFReader

    found = {t.tensor_type.name: None for t in GGUFReader(file).tensors if t.name.startswith("blk.")}
    return ", ".join(name for name in found if name != "F32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--python", required=True)
    parser.add_argument("--kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| model | recipe | blocks | MB | KL to lowbit | same top-1 | largest logit difference | same tokens |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    print("\n".join(lines), flush=True)
    for spec in options.models:
        model, _, recipe = spec.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            r = measure(options.python, model, recipe or "gptq:q4_0", options.kind, Path(folder))
        lines.append(
            f"| {r.model} | `{r.recipe}` | {r.kinds} | {r.megabytes:.2f} | {r.kl:.2g} ± {r.half:.1g} | {r.top1:.1%} "
            f"| {r.largest:.2g} | {'yes' if r.same_tokens else 'no'} |"
        )
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
