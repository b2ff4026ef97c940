"""Seconds and memory of quantizing a model of a given shape on a GPU: random weights, random tokens, the real walk.

Weights are random bfloat16 on the device (or in host memory, as a file's pages would be), tokens are random; speed
depends on neither. Prints one line of JSON: seconds of the whole walk and of a block, peak memory, the mean relative
output error, and with ``--stages`` (a run of its own: timers wait for the device) where the time goes. With
``--blocks N`` only N blocks are made and walked, and ``estimate`` is for all of the shape's.

``--peer`` walks one block and gives the very same weights, Gram matrices and grids to llm-compressor's GPTQ (its
``accumulate_hessian`` and ``quantize_weight``; the packages llmcompressor and compressed-tensors must be importable):
seconds a block of each, and the ratio of the output errors tr(dW H dWᵀ).

    python benchmarks/gpu_quantize.py gptq:int4-g128
    python benchmarks/gpu_quantize.py gptq:int4-g128 --stages --blocks 4
    python benchmarks/gpu_quantize.py gptq:int4-g128 --shape llama-2-70b --blocks 3
    python benchmarks/gpu_quantize.py gptq:int4-g128 --blocks 1 --peer
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import statistics
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lowbit.calibration.stats import Gram, Stats
from lowbit.formats.format import Format
from lowbit.formats.qtensor import QTensor
from lowbit.methods.base import Weight
from lowbit.methods.gptq import Gptq
from lowbit.models.source import Source
from lowbit.models.store import Memory
from lowbit.pipeline.recipe import parse
from lowbit.pipeline.walk import Finished, walk

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-2-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000},
    "toy": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 4, "vocab_size": 288},
}  # fmt: skip

STAGES = {
    "lowbit.models.stream:Stream.load": "load", "lowbit.pipeline.view:View.to_encode": "load",
    "lowbit.pipeline.spill:Hidden.embed": "embed", "lowbit.pipeline.encode:discover": "discover",
    "lowbit.pipeline.lockstep:Lockstep.until": "forward", "lowbit.pipeline.lockstep:Lockstep.finish": "forward",
    "lowbit.pipeline.encode:observe": "forward", "lowbit.pipeline.spill:Hidden.advance": "forward",
    "lowbit.calibration.stats:Gram.update": "gram", "lowbit.methods.gptq:feedback": "factor",
    "lowbit.formats.format:Format.fit": "clip search", "lowbit.methods.gptq:round_columns": "column loop",
    "lowbit.formats.format:Format.assemble": "packing", "lowbit.pipeline.encode:BlockWork._finish": "report",
    "lowbit.pipeline.walk:_on_cpu": "to the host", "lowbit.pipeline.encode:BlockWork._transform": "transform",
    "lowbit.pipeline.view:Edges.of": "edges", "lowbit.methods.awq:Awq._search": "scale search",
    "lowbit.pipeline.view:View.apply": "edits",
}  # fmt: skip


def random_model(shape: str, blocks: int | None, device: torch.device, store: torch.device) -> Source:
    """A Llama of a shape with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(SHAPES[shape])
    settings["num_hidden_layers"] = blocks or settings["num_hidden_layers"]
    config = AutoConfig.for_model("llama", **settings, max_position_embeddings=4096, tie_word_embeddings=False)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, p in skeleton.named_parameters():
        if p.dim() == 1:
            state[name] = torch.ones(p.shape, dtype=torch.bfloat16, device=store)
        else:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.bfloat16, device=device)
            state[name] = noise.mul_(0.02).to(store)
    return Source(f"random {shape}", config, Memory(state), None)


class Sink:
    """Keeps what was found out about every site, and when a block was done; drops the codes."""

    def __init__(self) -> None:
        self.times: list[float] = [time.perf_counter()]
        self.nbytes = 0
        self.errors: list[float] = []

    def has(self, block: str) -> bool:
        return False

    def read(self, block: str) -> Finished:
        raise KeyError(block)

    def write(self, block: str, module: nn.Module, done: Finished) -> None:
        self.times.append(time.perf_counter())
        self.nbytes += sum(report.nbytes for report in done.reports)
        self.errors += [report.output_error for report in done.reports if report.output_error is not None]


class Stages:
    """Exclusive seconds of functions, by stage; every border waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.stack = device, defaultdict[str, float](float), ["other"]
        self.since = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def border(self) -> None:
        now = self.now()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def install(self) -> None:
        for place, stage in STAGES.items():
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)
            *parents, leaf = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            held = vars(owner)[leaf]
            work = held.__func__ if isinstance(held, classmethod) else held
            timed = self.timed(work, stage)
            setattr(owner, leaf, classmethod(timed) if isinstance(held, classmethod) else timed)

    def timed(self, work: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(work)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.border()
            self.stack.append(stage)
            try:
                return work(*args, **kwargs)
            finally:
                self.border()
                self.stack.pop()

        return run


def measure(args: argparse.Namespace, device: torch.device, source: Source) -> dict[str, Any]:
    """One walk."""
    recipe = parse(args.recipe)
    calibration = recipe.calibration.model_copy(update={"batch": args.batch})
    recipe = recipe.model_copy(update={"calibration": calibration})
    tokens = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.windows, args.length))
    stages = Stages(device) if args.stages else None
    if stages is not None:
        stages.install()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    sink = Sink()
    dtype = torch.bfloat16 if gpu else torch.float32
    walk(source, recipe, tokens if recipe.calibrated else None, sink, dtype=dtype, device=device)
    if gpu:
        torch.cuda.synchronize(device)
    total = time.perf_counter() - sink.times[0]
    if stages is not None:
        stages.border()
    blocks = [b - a for a, b in zip(sink.times, sink.times[1:], strict=False)]
    whole, walked = SHAPES[args.shape]["num_hidden_layers"], len(blocks)
    inner = statistics.median(blocks[1:-1] or blocks)
    return {
        "recipe": args.recipe, "shape": args.shape, "tokens": tokens.numel(), "blocks": walked,
        "weights": "host" if args.host else args.device, "seconds": round(total, 3),
        "estimate": round(total + (whole - walked) * inner, 2), "first_block": round(blocks[0], 3),
        "block": round(inner, 4), "last_block": round(blocks[-1], 3), "bytes": sink.nbytes,
        "output_error": statistics.fmean(sink.errors) if sink.errors else None,
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 1) if gpu else None,
        "stages": {k: round(v, 3) for k, v in sorted(stages.seconds.items(), key=lambda i: -i[1])} if stages else None,
    }  # fmt: skip


class Taken(NamedTuple):
    """What a site was encoded from, and its codes."""

    weight: Weight
    stats: Stats
    format: Format
    q: QTensor


def beside_peer(args: argparse.Namespace, device: torch.device, source: Source) -> dict[str, Any]:
    """GPTQ of the linears of one block, ours and llm-compressor's, from equal Gram matrices and grids."""
    peer, helpers, arguments = llm_compressor()
    taken: list[Taken] = []
    encode = Gptq.__call__

    def remember(self: Gptq, w: Weight, stats: Stats, fmt: Format) -> QTensor:
        q = encode(self, w, stats, fmt)
        taken.append(Taken(w, stats, fmt, q))
        return q

    Gptq.__call__ = remember  # type: ignore[method-assign]
    measure(args, device, source)
    Gptq.__call__ = encode  # type: ignore[method-assign]
    gptq, clock, rows = Gptq(), Stages(device), []
    for site in taken:
        W, gram, fmt = site.weight.matrix, site.stats[Gram], site.format
        n = W.shape[1]
        start = clock.now()
        fmt.fit(W, gram.mean_square(), gptq.clip)
        fitted = clock.now()
        known = dict(gram.memo)
        gram.memo.clear()
        gptq(site.weight, site.stats, fmt)
        alone = clock.now()
        gram.memo.update(known)
        gptq(site.weight, site.stats, fmt)
        shared = clock.now()
        params = fmt.fit(W, gram.mean_square(), gptq.clip)
        H = gram.sum()
        assert params.zero is not None
        quant = arguments(num_bits=4, type="int", symmetric=False, strategy="group", group_size=128, actorder="static")
        their_W, their_H = W[None].clone(), H[None] * 2 / gram.tokens
        before = clock.now()
        theirs, _, fell_back = peer(
            their_W, their_H, params.step[None], params.zero[None] - 8, None, quant, percdamp=gptq.damp
        )
        theirs_done = clock.now()
        x = torch.randn(args.length, n, device=device, dtype=torch.bfloat16)
        linear = nn.Linear(n, 1, bias=False, device=device)
        their_hessian, count = torch.zeros(n, n, device=device), torch.zeros((), device=device)
        helpers.accumulate_hessian(x[None], linear, their_hessian, count)
        begun = clock.now()
        for _ in range(8):
            helpers.accumulate_hessian(x[None], linear, their_hessian, count)
        watched = (clock.now() - begun) / 8 * args.windows
        exact = H.double()
        errors = [float(((q - W).double() @ exact * (q - W).double()).sum()) for q in (site.q.decode(), theirs[0])]
        rows.append({
            "site": site.weight.name.partition(".layers.0.")[2], "shape": list(W.shape),
            "ours_with_factor": alone - fitted, "ours": shared - alone, "clip_search": fitted - start,
            "peer": theirs_done - before, "peer_hessian": watched, "error_ratio": errors[0] / errors[1],
            "peer_fell_back": bool(fell_back.any()),
        })  # fmt: skip
    factors = {id(site.stats): row["ours_with_factor"] - row["ours"] for site, row in zip(taken, rows, strict=True)}
    sums = {key: sum(float(row[key]) for row in rows) for key in ("ours", "peer", "peer_hessian", "clip_search")}
    return {"tool": "llm-compressor", "our_factors": sum(factors.values()), **sums, "sites": rows}


def llm_compressor() -> tuple[Any, Any, Any]:
    """Its functions, without importing the rest of the package (which needs data set and trainer libraries)."""
    root = importlib.util.find_spec("llmcompressor")
    assert root is not None, "llmcompressor is not importable"
    for name in ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.gptq"):
        package = types.ModuleType(name)
        places = root.submodule_search_locations or []
        package.__path__ = [str(Path(place, *name.split(".")[1:])) for place in places]
        sys.modules[name] = package
    helpers = importlib.import_module("llmcompressor.modifiers.gptq.helpers")
    quantize = importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize").quantize_weight
    return quantize, helpers, importlib.import_module("compressed_tensors.quantization").QuantizationArgs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--blocks", type=int, help="make and walk only so many")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--host", action="store_true", help="weights lie in host memory")
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    source = random_model(args.shape, args.blocks, device, torch.device("cpu") if args.host else device)
    print(json.dumps((beside_peer if args.peer else measure)(args, device, source)), flush=True)


if __name__ == "__main__":
    main()
