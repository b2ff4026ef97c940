"""Do transformers' own GPTQ and AWQ paths read what lowbit exports? ``from_pretrained``, with the kernels of GPTQModel.

    pip install torch transformers optimum gptqmodel accelerate jaxtyping gguf scipy psutil
    python benchmarks/readers_gptq.py DIR REF

DIR is an export (``gptq``, ``gptq-v2``, ``awq``), REF the native checkpoint that it was made of. For each dtype prints
one JSON line: the kernels that were chosen; how many matrices their dequantizers show and how many of these are the
checkpoint's to the bit (rounded to the dtype of the scales); how many of those that the kernels multiply by are (what
they make of an identity, rounded to the dtype that they run in), and the largest difference as a share of a matrix's
largest weight; KL and the share of equal first choices on 256 tokens against lowbit in float32. ``auto`` is what
``from_pretrained(DIR)`` takes by itself. A path that fails is a line with its error, and the end is 1.
GPTQModel 7.7 wants torch 2.14.1 or newer: use an environment of its own, with lowbit on
PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lowbit.io.check import TOKENS, divergence, layout_of, native_logits, sample_tokens
from lowbit.io.opening import LowBit, open_low_bit
from lowbit.io.readers import packed_matrix

PACKAGES = ("torch", "transformers", "optimum", "gptqmodel", "accelerate")


def read(
    folder: Path, dtype: str, reference: LowBit, tokens: torch.Tensor, expected: torch.Tensor
) -> dict[str, object]:
    """One loading: its kernels, its matrices, its logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **({} if dtype == "auto" else {"dtype": dtype})).eval()
    shown = compared(model, reference, packed_matrix)  # before the first pass, in which fused kernels repack codes
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0].float()
    used = compared(model, reference, lambda module: multiplied_by(module, model.dtype))
    kl, agree = divergence(expected, logits)
    return {
        "kernels": sorted({type(model.get_submodule(site)).__name__ for site in reference.specs}),
        "runs_in": str(model.dtype).removeprefix("torch."), "matrices": shown.count, "dequantized_equal": shown.equal,
        "multiplied_equal": used.equal, "multiplied_off": used.off, "kl": kl, "same_top": agree,
    }  # fmt: skip


class Compared(NamedTuple):
    """Matrices, how many of them are equal to the bit, and the largest difference as a share of the largest weight."""

    count: int
    equal: int
    off: float


def compared(
    model: nn.Module, reference: LowBit, matrix: Callable[[nn.Module], torch.Tensor | None]
) -> Compared:  # fmt: skip
    equal = count = 0
    off = 0.0
    for group in reference.groups():
        for site, q in group.codes.items():
            found, exact = matrix(model.get_submodule(site)), q.decode()
            if found is not None:
                same = torch.equal(exact.to(found.dtype), found)
                equal, count = equal + same, count + 1
                off = off if same else max(off, float((exact - found.float()).abs().max() / exact.abs().max()))
    return Compared(count, equal, off)


def multiplied_by(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (out, in) that a linear without a bias uses."""
    with torch.inference_mode():
        return module(torch.eye(module.in_features, dtype=dtype)).t()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("reference", type=Path, metavar="REF")
    parser.add_argument("--dtype", action="append", choices=["auto", "float32", "float16", "bfloat16"])
    given = parser.parse_args()
    reference = open_low_bit(given.reference)
    tokens = sample_tokens(reference, TOKENS)
    expected = native_logits(reference, tokens)
    head = {"layout": layout_of(given.folder), "recipe": reference.recipe, "tokens": len(tokens)}
    packages = {name: version(name) for name in PACKAGES}
    failed = False
    for dtype in given.dtype or ["auto", "float32", "float16"]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the package tells its progress there
                found = read(given.folder, dtype, reference, tokens, expected)
        except Exception as error:  # somebody else's code: whatever it raises is the finding
            found, failed = {"error": f"{type(error).__name__}: {error}"[:300]}, True
        print(json.dumps({**head, "dtype": dtype, **found, "packages": packages}), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
