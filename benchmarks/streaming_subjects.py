"""One subject of streaming.py in one process: load, run a prompt, then tokens; a JSON line of what they took.

The process is in its cgroup already, and may be run by another interpreter than lowbit's: nothing but the standard
library is imported before the subject's own function does. ``lowbit`` sets the limit itself, from what it is told it
may hold; all others are given the limit that it had.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from streaming_limits import LIMIT, number, read_bytes
from streaming_models import DENSE, GGUF, LOW

PROMPT, SEED_TOKEN = 8, 101
Step = Callable[[list[int]], int]
"""Runs some tokens behind those before, and returns the next one."""


class Asked(NamedTuple):
    folder: Path
    share: float
    tokens: int
    threads: int
    group: Path
    low: str


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=list(SUBJECTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--group", type=Path, required=True)
    a = parser.parse_args()
    print(json.dumps(measure(a.how, Asked(a.folder, a.share, a.tokens, a.threads, a.group, LOW))), flush=True)
    sys.stdout.flush()
    os._exit(0)  # threads of a peer that prefetches for ever


def measure(how: str, asked: Asked) -> dict[str, Any]:
    started = time.perf_counter()
    step, told = SUBJECTS[how](asked)
    loaded = time.perf_counter()
    token = step([(SEED_TOKEN * i) % 250 + 1 for i in range(PROMPT)])
    prompt, read, times = time.perf_counter(), read_bytes(), list[float]()
    for _ in range(asked.tokens):
        begun = time.perf_counter()
        token = step([token])
        times.append(time.perf_counter() - begun)
    stat = dict(line.split() for line in (asked.group / "memory.stat").read_text().splitlines())
    return {
        "seconds": statistics.median(times), "fastest": min(times), "slowest": max(times), "tokens": len(times),
        "read_a_token": (read_bytes() - read) / asked.tokens, "loading": loaded - started, "prompt": prompt - loaded,
        "limit": number(asked.group, LIMIT), "most": number(asked.group, "memory.max_usage_in_bytes"),
        "anonymous": int(stat["rss"]), "cached": int(stat["cache"]), **told,
    }  # fmt: skip


def streamed(asked: Asked) -> tuple[Step, dict[str, Any]]:
    """lowbit: a share of the blocks stays, the others pass through two buffers."""
    import psutil
    import torch

    from lowbit.runtime.stream_model import outline, stream

    torch.set_num_threads(asked.threads)
    tokens = PROMPT + asked.tokens
    found, base = outline(asked.folder / LOW), int(psutil.Process().memory_info().rss)
    memory = found.fixed(tokens, torch.float32, base) + round(asked.share * len(found.sizes)) * max(found.sizes)
    if asked.share < 1:
        memory += 2 * max(found.sizes)
        (asked.group / LIMIT).write_text(str(memory))
    opened = stream(asked.folder / LOW, memory, tokens=tokens, base=base)
    s = opened.schedule
    return _transformers(opened.model), {
        "blocks": len(s.blocks), "streamed": len(s.streamed), "total": s.total, "moved": s.moved, "fixed": s.fixed,
        "engine": opened.engine,
    }  # fmt: skip


def mapped(asked: Asked) -> tuple[Step, dict[str, Any]]:
    """The same model and kernels with weights in the page cache."""
    import torch
    from safetensors import safe_open

    from lowbit.runtime import stream_model
    from lowbit.runtime.stream_kernel import PANELS

    torch.set_num_threads(asked.threads)
    found = stream_model.outline(asked.folder / LOW)
    stream_model._fill(found, torch.float32)
    linears = stream_model._linears(found.model)
    for extent in found.extents:
        handle = safe_open(extent.path, framework="pt")
        for site, places in extent.places.items():
            linears[site].point({part: handle.get_tensor(f"{site}.weight.{part}") for part in places})
            linears[site].use_only(PANELS)
    return _transformers(found.model.eval()), {}


def llama_cpp(asked: Asked, repack: bool = False) -> tuple[Step, dict[str, Any]]:
    """llama.cpp, weights mapped. Repacking them for the processor, its default, makes a copy that must fit."""
    import llama_cpp
    import llama_cpp.llama_cpp as inner
    import numpy as np

    defaults = inner.llama_model_default_params

    def with_or_without_copy() -> Any:
        params = defaults()
        params.use_extra_bufts = repack
        return params

    inner.llama_model_default_params = with_or_without_copy
    path = asked.folder / GGUF
    model = llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=asked.threads, n_threads_batch=asked.threads, use_mmap=True, verbose=False
    )
    vocab = model.n_vocab()

    def step(tokens: list[int]) -> int:
        model.eval(tokens)
        return int(np.ctypeslib.as_array(model._ctx.get_logits(), (vocab,)).argmax())

    return step, {"version": llama_cpp.__version__, "file": path.stat().st_size}


def llama_cpp_repacked(asked: Asked) -> tuple[Step, dict[str, Any]]:
    """Its default, for what fits."""
    return llama_cpp(asked, repack=True)


def offloaded(asked: Asked) -> tuple[Step, dict[str, Any]]:
    """transformers with accelerate: every block on disk in bf16."""
    import accelerate
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(asked.threads)
    dense = asked.folder / DENSE
    blocks = AutoConfig.from_pretrained(dense).num_hidden_layers
    places: dict[str, Any] = {f"model.layers.{i}": "disk" for i in range(blocks)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.bfloat16, device_map=places, offload_folder=asked.folder / "offload"
    )
    return _transformers(model.eval()), {"version": accelerate.__version__, "total": _blocks(dense)}


def airllm(asked: Asked) -> tuple[Step, dict[str, Any]]:
    """AirLLM on the CPU, bf16, its defaults: one file a layer (ours is a link), the next one read ahead by a thread."""
    import importlib.metadata

    import torch
    from airllm import AutoModel

    torch.set_num_threads(asked.threads)
    dense = asked.folder / DENSE
    model = AutoModel.from_pretrained(str(dense), device="cpu", layer_shards_saving_path=str(asked.folder / "airllm"))
    return _transformers(model), {"version": importlib.metadata.version("airllm"), "total": _blocks(dense)}


def _blocks(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model.layers.*.safetensors"))


def _transformers(model: Any) -> Step:
    import torch

    past: list[Any] = [None]

    def step(tokens: list[int]) -> int:
        with torch.inference_mode():
            out = model(torch.tensor([tokens]), past_key_values=past[0], use_cache=True)
        past[0] = out.past_key_values
        return int(out.logits[0, -1].argmax())

    return step


SUBJECTS: dict[str, Callable[[Asked], tuple[Step, dict[str, Any]]]] = {
    "lowbit": streamed, "mmap": mapped, "llama.cpp": llama_cpp, "llama.cpp, repacked": llama_cpp_repacked,
    "accelerate": offloaded, "airllm": airllm,
}  # fmt: skip

if __name__ == "__main__":
    main()
