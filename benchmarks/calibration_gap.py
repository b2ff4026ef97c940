"""What calibration without data costs: a model's own text and random tokens beside real text.

    python benchmarks/calibration_gap.py --model MODEL --calibration train.txt --text test.txt gptq:int3-g64

Every recipe is calibrated with windows of real text, of the model's own and of random tokens, once a seed, and scored
in float32 beside the float32 original on the same evaluation windows. Prints JSON: what the calibration windows are
like (distinct 4-grams, and their loss under the original), one line a recipe, source and seed with KL and dNLL, and
one line a recipe with the ratios of self and random to real. Tokens are averaged over seeds before a ratio is taken;
its 95 % interval is clustered by evaluation window, and ``by_seed`` shows what the draw of the windows does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from lowbit import digest
from lowbit.calibration import text as texts
from lowbit.calibration.synthetic import calibration_tokens, distinct
from lowbit.evaluation import protocol, statistics
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.scorer import Scorer
from lowbit.models.resolve import open_model
from lowbit.models.source import Source
from lowbit.pipeline.recipe import parse, with_calibration
from lowbit.runtime import facade


def main() -> None:
    a = _arguments()
    logging.disable_progress_bar()
    source = open_model(a.model)
    read = texts.read(a.text, "evaluation")
    ids = texts.encode(read, source.tokenizer)
    windows = protocol.parse(f"windows-{a.length}").cut(ids, a.windows, read.name, read.digest)
    reference = Scorer(_original(source), source.digest).reference(windows)
    names = {"real": a.calibration, "self": "self", "random": "random"}
    calibration = {(label, seed): tokens for label, seed, tokens in _calibration(source, names, a)}
    for line in a.recipes:
        recipe = with_calibration(parse(line), samples=a.samples, length=a.calibration_length)
        found: dict[str, dict[str, list[np.ndarray]]] = {metric: {label: [] for label in names} for metric in METRICS}
        for (label, seed), tokens in calibration.items():
            model = facade.quantize(_original(source), line, tokens=tokens)
            facade.use_kernels(model, "dense")
            weights = digest.of_value([source.digest, recipe.digest, label, seed])
            scored, _ = Scorer(model, weights).score(windows, reference)
            for metric, value in METRICS.items():
                found[metric][label].append(value(scored))
            means = {m: statistics.paired_mean(found[m][label][-1], scored.doc)[:3] for m in METRICS}
            print(json.dumps({"recipe": line, "calibration": label, "seed": seed, **means}), flush=True)
        summary = {metric: _summary(found[metric], reference.tokens.doc) for metric in METRICS}
        print(json.dumps({"recipe": line, "seeds": a.seeds, "tokens": windows.scored, **summary}), flush=True)


METRICS: dict[str, Callable[[Tokens], np.ndarray]] = {
    "kl": lambda t: t.kl.astype(np.float64),
    "dnll": lambda t: t.nll.astype(np.float64) - t.nll_ref,
}


def _summary(found: dict[str, list[np.ndarray]], doc: np.ndarray) -> dict[str, Any]:
    """Ratios to real text, and the paired difference of self to real text and to random tokens."""
    mean = {label: np.mean(values, axis=0) for label, values in found.items()}
    ratios = {
        f"{label}_over_real": {
            "ratio": statistics.cluster_ratio(mean[label], mean["real"], doc)[:3],
            "by_seed": [float(x.mean() / y.mean()) for x, y in zip(found[label], found["real"], strict=True)],
        }
        for label in ("self", "random")
    }
    return ratios | {
        f"self_minus_{label}": statistics.paired_mean(mean["self"] - mean[label], doc)[:3]
        for label in ("real", "random")
    }


def _calibration(
    source: Source, names: dict[str, str], a: argparse.Namespace
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """The windows of every source and seed; says what they are like."""
    model = _original(source)
    for label, name in names.items():
        for seed in range(a.seeds):
            started = time.perf_counter()
            tokens = calibration_tokens(source, name, samples=a.samples, length=a.calibration_length, seed=seed)
            seconds = time.perf_counter() - started
            with torch.inference_mode():
                nll = [float(model(input_ids=row[None], labels=row[None]).loss) for row in tokens.ids]
            print(json.dumps({
                "calibration": label, "seed": seed, "windows": list(tokens.ids.shape), "seconds": seconds,
                "distinct_4grams": distinct(tokens.ids), "nll": float(np.mean(nll)), "digest": tokens.digest,
            }), flush=True)  # fmt: skip
            yield label, seed, tokens.ids


def _original(source: Source) -> PreTrainedModel:
    assert source.root is not None  # it was opened from a directory
    return AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32)  # type: ignore[no-any-return]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="pydoc", help="the real text")
    parser.add_argument("--text", default="pydoc", help="what is scored")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("recipes", nargs="+")
    return parser.parse_args()


if __name__ == "__main__":
    main()
