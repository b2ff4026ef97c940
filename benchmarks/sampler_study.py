"""What low bits do to sampled text: several modes over temperatures, top-k and lengths with shared random numbers.

    python benchmarks/sampler_study.py rtn:nf4 rtn:fp4 rtn:int8-row --model MODEL --prompts 24

Prints JSON lines: for every mode and setting the likelihood of the text under the original, repetition, loops, texts
that never end, and for how many tokens a text stays the original's, each less the original's own and with a paired
interval; for every mode and temperature the KL and total variation of the next token; prefill and decode rates taken
in turns, memory; and a verdict on each claim of arXiv:2309.05210 (``lowbit.evaluation.hypotheses``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from lowbit.calibration import text as texts
from lowbit.evaluation import hypotheses, sampler
from lowbit.evaluation.hypotheses import CLAIMS, Measured
from lowbit.evaluation.metrics import generations, survival
from lowbit.evaluation.sampler import Grid, Setting, Written
from lowbit.evaluation.statistics import Interval, tost
from lowbit.models.resolve import open_model
from lowbit.pipeline.recipe import parse
from lowbit.runtime import facade
from lowbit.study.stages import dense_model, make

ORIGINAL = "original"


def main() -> None:
    a = _arguments()
    logging.disable_progress_bar()
    source, kind = open_model(a.model), getattr(torch, a.dtype)
    original = dense_model(Path(source.store.root), a.dtype)
    models: dict[str, PreTrainedModel] = {ORIGINAL: original}
    with tempfile.TemporaryDirectory() as made:
        for i, recipe in enumerate(a.recipes):
            out = Path(made) / str(i)
            make(source, parse(recipe), out, kind, lambda *_: None)
            models[recipe] = facade.load(out, dtype=kind)
    ids = _ids(a, source)
    prompts = [ids[i * a.length : (i + 1) * a.length] for i in range(a.prompts)]
    grid = Grid.of(a.temperatures, [None, *a.top_k], range(a.seeds), a.tokens)
    written = {name: sampler.write(model, original, prompts, grid) for name, model in models.items()}
    for name, model in models.items():
        _say({"mode": name, "static_bytes": sampler.static_bytes(model),
              "cache_bytes": max(c.cache_bytes for c in written[name].costs),
              "peak_bytes": max(c.peak_bytes for c in written[name].costs)})  # fmt: skip
        if name != ORIGINAL:
            _texts(name, written[ORIGINAL], written[name])
    gaps = {n: _gaps(original, m, prompts, a.temperatures) for n, m in models.items() if n != ORIGINAL}
    rates = _rates(models, prompts, a.rounds, a.tokens)
    for found in hypotheses.judge(_claims(a.recipes, written, gaps, rates)):
        _say({"claim": found.hypothesis.claim, "verdict": found.verdict, **_interval(found.interval),
              "p_for": found.p_for, "p_against": found.p_against})  # fmt: skip


def _texts(name: str, ours: Written, theirs: Written) -> None:
    for setting, reference in ours.texts.items():
        candidate = theirs.texts[setting]
        row: dict[str, Any] = {"mode": name, **setting._asdict()}
        for metric in generations.PER_TEXT:
            row[metric] = _interval(generations.shift(metric, reference, candidate))
        d = generations.divergence(reference, candidate)
        row["agreement_length"] = _interval(survival.agreement_length(d, int(d.position.max())))
        row["median_divergence"] = survival.median(d)
        row["distinct_2"] = [generations.distinct(reference), generations.distinct(candidate)]
        _say(row)


def _gaps(
    original: PreTrainedModel, model: PreTrainedModel, prompts: list[list[int]], temperatures: list[float]
) -> dict[float, np.ndarray]:
    """Mean total variation of each prompt at each temperature."""
    settings = [Setting(t) for t in temperatures]
    found = [sampler.gaps(original, model, prompt, settings) for prompt in prompts]
    return {s.temperature: np.array([f[s].total_variation.mean() for f in found]) for s in settings}


def _rates(
    models: Mapping[str, PreTrainedModel], prompts: list[list[int]], rounds: int, tokens: int
) -> dict[str, np.ndarray]:
    """Decode rates of one text, the modes in turns, so that a slow minute of the machine falls on all."""
    grid = Grid.of([0.0], [None], [0], min(tokens, 24))
    found: dict[str, list[float]] = {name: [] for name in models}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            cost = sampler.write(model, model, prompts[:1], grid).costs[0]
            found[name].append(cost.decode_rate)
            prefill[name].append(cost.prefill_rate)
    for name in models:
        _say({"mode": name, "decode_tokens_per_second": float(np.median(found[name])),
              "prefill_tokens_per_second": float(np.median(prefill[name])), "rounds": rounds})  # fmt: skip
    return {name: np.array(values) for name, values in found.items()}


def _claims(
    recipes: list[str], written: Mapping[str, Written], gaps: Mapping[str, dict[float, np.ndarray]],
    rates: Mapping[str, np.ndarray],
) -> list[Measured]:  # fmt: skip
    found = []
    nf4, fp4 = ([r for r in recipes if kind in r] for kind in ("nf4", "fp4"))
    if nf4 and fp4:
        pairs = [generations.shift("text_nll_ref", written[fp4[0]].texts[s], written[nf4[0]].texts[s])
                 for s in written[nf4[0]].texts]  # fmt: skip
        furthest = max(pairs, key=lambda i: tost(i, CLAIMS.alike.margin))
        found.append(Measured(CLAIMS.alike, furthest, len(pairs)))
    four = [r for r in recipes if any(kind in r for kind in ("nf4", "fp4", "int4"))]
    if four:
        mean = {t: np.mean([gaps[r][t] for r in four], axis=0) for t in gaps[four[0]]}
        found.append(Measured(CLAIMS.band, hypotheses.sensitivity(mean, (0.5, 0.8))))
    others = len(rates) - 1
    for claim, mode, kind in ((CLAIMS.slowest, [r for r in recipes if "int8" in r], "below"),
                              (CLAIMS.fastest, [ORIGINAL], "above")):  # fmt: skip
        if mode and others:
            found.append(Measured(claim, hypotheses.worst(hypotheses.extremal(rates, mode[0]), kind), others))
    return found


def _ids(a: argparse.Namespace, source: Any) -> list[int]:
    tokenizer = source.tokenizer or AutoTokenizer.from_pretrained(a.model, local_files_only=True)
    text = texts.read(a.text, "evaluation")
    return [int(x) for x in texts.encode(text, tokenizer)[: a.prompts * a.length]]


def _interval(i: Interval) -> dict[str, float]:
    return {"estimate": round(i.estimate, 5), "low": round(i.low, 5), "high": round(i.high, 5)}


def _say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--length", type=int, default=32, help="tokens a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="written at most")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.65, 0.8, 1.0, 1.2])
    parser.add_argument("--top-k", type=int, nargs="*", default=[50])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
