"""Checks that need trained models and so are no tests: the figures behind docs/results/acceptance.md.

    python benchmarks/acceptance.py --models DIR --text novel.txt ladder llama-2m llama-5m llama-15m llama-30m
    python benchmarks/acceptance.py --models DIR --text novel.txt router mixtral-8m

``--models`` holds one directory a model. Everything runs in float32 on one thread or as many as torch is given, scored
on the first ``--windows`` windows of ``--length`` tokens of the text; calibration takes the windows after them. Prints
one JSON line a figure. Intervals are paired by token and clustered by window.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import lowbit
from lowbit.arrays import Tensor
from lowbit.calibration import cards
from lowbit.calibration import text as texts
from lowbit.calibration.stats import Gram, Moments
from lowbit.evaluation import protocol
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.scorer import Scorer
from lowbit.evaluation.statistics import cluster_ratio, paired_mean
from lowbit.formats.presets import preset
from lowbit.models.resolve import open_model
from lowbit.pipeline.recipe import parse, with_calibration
from lowbit.runtime.facade import use_kernels
from lowbit.study.stages import make


class Subject:
    """A model, the windows that it is scored on, and those that it is calibrated by."""

    def __init__(self, root: Path, arguments: argparse.Namespace) -> None:
        self.root, self.name = root, root.name
        self.source = open_model(str(root))
        read = texts.read(arguments.text, "evaluation")
        self.text = read.content
        ids = texts.encode(read, self.source.tokenizer)
        cut = protocol.parse(f"windows-{arguments.length}")
        self.windows = cut.cut(ids, arguments.windows, read.name, read.digest)
        seen = arguments.windows * arguments.length
        self.calibration = ids[seen : seen + 32 * 256].view(32, 256)
        self.reference = Scorer(self.original(), self.source.digest).reference(self.windows)
        self.nll = float(self.reference.tokens.nll.mean())

    def original(self, gain: float = 1.0) -> Any:
        """The model; with ``gain``, six channels of every norm of a LLaMA are so much larger, and weights smaller."""
        model = AutoModelForCausalLM.from_pretrained(self.root, dtype=torch.float32)
        for layer in model.model.layers if gain != 1 else []:
            heads, mlp, chosen = layer.self_attn, layer.mlp, torch.arange(6) * 17
            for norm, readers in (
                (layer.input_layernorm, (heads.q_proj, heads.k_proj, heads.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight.data[chosen] *= gain
                for reader in readers:
                    reader.weight.data[:, chosen] /= gain
        return model

    def quantized(self, recipe: str, calibration: Tensor | None = None, gain: float = 1.0) -> Any:
        model = self.original(gain)
        lowbit.quantize(model, recipe, tokens=self.calibration if calibration is None else calibration)
        use_kernels(model, "dense")
        return model

    def score(self, recipe: str, calibration: Tensor | None = None, gain: float = 1.0) -> Tokens:
        return Scorer(self.quantized(recipe, calibration, gain), recipe).score(self.windows, self.reference)[0]

    def bits(self, recipe: str) -> float:
        """Of the whole model, with what stays in 16 bit, from the files."""
        with tempfile.TemporaryDirectory() as folder:
            made = make(open_model(str(self.root)), parse(recipe), Path(folder) / "out", torch.float32, lambda *_: None)
        return float(8 * made["bytes_total"])


def loss(tokens: Tokens) -> list[float]:
    """Nats a token above the original: estimate, low, high."""
    return list(paired_mean(tokens.nll.astype(np.float64) - tokens.nll_ref, tokens.chunk)[:3])


def ladder(s: Subject) -> None:
    """A1.1, A6.1, A12.2, A17.14: loss of plain rounding by width, beside the bits of the whole model."""
    parameters = sum(p.numel() for p in s.source.skeleton.parameters())
    say(s, "ladder", recipe="16 bit", nll=s.nll, bits=16 * parameters, loss=[0.0, 0.0, 0.0])
    for fmt in ("int8-g128", "int4-g128", "int3-g128", "int8-g64", "int6-g64", "int4-g64", "int3-g64", "int2-g64"):
        tokens = s.score(f"rtn:{fmt}")
        say(s, "ladder", recipe=fmt, nll=s.nll + loss(tokens)[0], bits=s.bits(f"rtn:{fmt}"), loss=loss(tokens))


def injected(s: Subject) -> None:
    """A17.14: loss at 3 bits where channels stand out, by plain rounding and by what knows of them."""
    for recipe in ("rtn:int3-g64", "awq+rtn:int3-g64", "outliers:int3-g64,share=1.0"):
        found = loss(s.score(recipe, gain=32.0))
        say(s, "injected", recipe=recipe, loss=found, relative=[value / s.nll for value in found])


def propagation(s: Subject) -> None:
    """What it costs, and saves, to calibrate GPTQ on what the original computes: its statistics can then be shared."""
    with tempfile.TemporaryDirectory() as folder:
        text, card = Path(folder) / "tail.txt", Path(folder) / "card"
        text.write_text(s.text[-400_000:], encoding="utf-8")
        settings = {"text": str(text), "samples": 32, "length": 256}
        started = time.process_time()
        tokens = texts.sample(texts.read(str(text), "calibration"), s.source.tokenizer, 32, 256, 0)
        cards.make(card, s.source, tokens, kinds={Gram})
        say(s, "propagation", recipe="card", cpu_s=time.process_time() - started, bytes=card.stat().st_size)
        for fmt in ("int4-g64", "int3-g64"):
            recipe = with_calibration(parse(f"gptq:{fmt}"), **settings)
            scored, seconds = [], []
            for i, known in enumerate((None, card)):
                out = Path(folder) / f"{fmt}-{i}"
                made = make(open_model(str(s.root)), recipe, out, torch.float32, lambda *_: None, card=known)
                model = lowbit.load(out, dtype=torch.float32, kernels="dense")
                scored.append(Scorer(model, made["digest"]).score(s.windows, s.reference)[0])
                seconds.append(made["cpu_seconds"])
            default, original = scored
            say(s, "propagation", recipe=fmt, cpu_s=seconds,
                kl=[list(paired_mean(t.kl.astype(np.float64), t.chunk)[:3]) for t in scored],
                ratio=list(cluster_ratio(original.kl.astype(np.float64), default.kl, default.chunk)[:3]))  # fmt: skip


def gguf(s: Subject) -> None:
    """A17.12: KL by block type."""
    for fmt in ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q5_0", "q4_0"):
        kl = s.score(f"rtn:{fmt}").kl.astype(np.float64)
        say(s, "gguf", recipe=fmt, kl=list(paired_mean(kl, s.reference.tokens.chunk)[:3]))


def recovery(s: Subject) -> None:
    """A17.1: share of the loss of rounding that GPTQ takes back."""
    for fmt in ("int4-g128", "int3-row", "int3-g64"):
        rtn, gptq = s.score(f"rtn:{fmt}"), s.score(f"gptq:{fmt}")
        plain, ours = (t.nll.astype(np.float64) - t.nll_ref for t in (rtn, gptq))
        left = cluster_ratio(ours, plain, rtn.chunk)
        say(s, "recovery", recipe=fmt, recovered=[1 - left.estimate, 1 - left.high, 1 - left.low], rtn=loss(rtn))


def router(s: Subject) -> None:
    """A1.5: how often a router of 4 bits chooses other experts."""
    model, changed, seen = s.original(), 0, 0

    def watch(module: Any, inputs: Any, _out: Any) -> None:
        nonlocal changed, seen
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        fmt = preset("int4-g64")
        coded = fmt.encode(module.weight.data, fmt.fit(module.weight.data)).decode()
        chosen = [(x @ w.T).topk(2).indices.sort().values for w in (module.weight, coded)]
        changed += int((chosen[0] != chosen[1]).any(1).sum())
        seen += len(x)

    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(watch)
    with torch.inference_mode():
        model(s.windows.ids)
    say(s, "router", changed=changed / seen, choices=seen)


def kurtosis(s: Subject) -> None:
    """A1.4: the estimator on known tails, and at a norm's output before and after channels are injected."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, 256, generator=draw)
    chi = torch.randn(6, 4000, 256, generator=draw).square().mean(0)
    for name, x in (("gaussian", normal), ("student-t6", normal / chi.sqrt())):
        say(s, "kurtosis", of=name, value=_kurtosis(x))
    model = s.original()
    seen: dict[str, Tensor] = {}
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda _m, _i, out: seen.update(x=out.flatten(0, 1)))
    with torch.inference_mode():
        for k in (1, 8, 64):
            norm.weight[torch.arange(6) * 17] *= k
            model(s.windows.ids[:4])
            say(s, "kurtosis", of=f"norm, 6 channels x {k}", value=_kurtosis(seen["x"]))
            norm.weight[torch.arange(6) * 17] /= k


def _kurtosis(x: Tensor) -> float:
    moments = Moments(x.shape[1])
    moments.update(x)
    return moments.kurtosis


def temperature(s: Subject) -> None:
    """A2.2: KL at sampling temperatures, 8 and 4 bits, and where total variation is largest."""
    ids, grid = s.windows.ids[:8], [0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0]
    with torch.inference_mode():
        p = s.original()(ids).logits.flatten(0, 1)
        for recipe in ("rtn:int8-row", "rtn:nf4", "rtn:int4-g64"):
            q = s.quantized(recipe)(ids).logits.flatten(0, 1)
            kl, tv = [], []
            for t in grid:
                a, b = (p / t).log_softmax(-1), (q / t).log_softmax(-1)
                kl.append(float((a.exp() * (a - b)).sum(-1).mean()))
                tv.append(float((a.exp() - b.exp()).abs().sum(-1).mean() / 2))
            say(s, "temperature", recipe=recipe, grid=grid, kl=kl, tv=tv, most=grid[int(np.argmax(tv))])


def agreement(s: Subject) -> None:
    """A2.3: greedy tokens before the first that differs, over 64 prompts of 32 tokens."""
    prompts = s.windows.ids[:, :256].reshape(-1, 32)[:64]
    settings = {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
    plain = s.original().generate(prompts, **settings)[:, 32:]
    for recipe in ("rtn:int8-row", "rtn:nf4", "rtn:fp4", "rtn:int4-g64"):
        other = s.quantized(recipe).generate(prompts, **settings)[:, 32:]
        lengths = (plain == other).int().cumprod(1).sum(1)
        say(s, "agreement", recipe=recipe, median=float(lengths.median()), mean=float(lengths.float().mean()))


def sizes(s: Subject) -> None:
    """A2.4, A17.2: bytes of whole checkpoints beside bits a weight."""
    held = {site.name: math.prod(site.shape) for block in s.source.blocks for site in s.source.sites(block)}
    rest = 2 * (sum(p.numel() for p in s.source.skeleton.parameters()) - sum(held.values()))
    for fmt, bits in (("int4-g128", 4.15), ("nf4", 4.5), ("nf4-dq", 4.127)):
        files = s.bits(f"rtn:{fmt}") / 8
        say(s, "sizes", recipe=fmt, bytes=files, over=files / (sum(held.values()) * bits / 8 + rest))


def shift(s: Subject) -> None:
    """A4.3: GPTQ calibrated by prose, and by code, scored on prose."""
    code = texts.encode(texts.Text("code", Path(pydoc.__file__).read_text(encoding="utf-8")), s.source.tokenizer)
    prose = s.score("gptq:int3-g64")
    other = s.score("gptq:int3-g64", code[: 32 * 256].view(32, 256))
    say(s, "shift", prose=loss(prose), code=loss(other),
        more=list(paired_mean(other.nll.astype(np.float64) - prose.nll, prose.chunk)[:3]))  # fmt: skip


def prefix(s: Subject) -> None:
    """A10.4: loss by the number of terms of a series."""
    for terms in (1, 2, 3, 4):
        say(s, "prefix", terms=terms, loss=loss(s.score(f"series:int2-g64-sym,terms={terms}")))


def proxy(s: Subject) -> None:
    """A12.4: the share of injected channels among the columns that vary most; by the weight, and by the gain."""
    model = s.original()
    for how in ("weights x 8", "gain x 8, weights / 8"):
        found = total = 0
        for layer in model.model.layers:
            W = layer.mlp.gate_proj.weight.data.clone()
            wanted = torch.arange(6) * 37 % W.shape[1]
            W[:, wanted] *= 8.0 if how.startswith("weights") else 1 / 8
            found += int(torch.isin(W.std(0, correction=0).topk(6).indices, wanted).sum())
            total += 6
        say(s, "proxy", injected=how, recall=found / total)


CHECKS: dict[str, Callable[[Subject], None]] = {
    f.__name__: f
    for f in (
        ladder,
        injected,
        propagation,
        gguf,
        recovery,
        router,
        kurtosis,
        temperature,
        agreement,
        sizes,
        shift,
        prefix,
        proxy,
    )
}


def say(s: Subject, check: str, **figures: Any) -> None:
    print(json.dumps({"check": check, "model": s.name, **figures}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of model directories")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("checks", help=f"some of {', '.join(CHECKS)}, with commas")
    parser.add_argument("names", nargs="+", help="models")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    for name in arguments.names:
        subject = Subject(arguments.models / name, arguments)
        for check in arguments.checks.split(","):
            CHECKS[check](subject)


if __name__ == "__main__":
    main()
