"""Streaming: seconds a token of a model larger than the memory it is given, over the bound max(Tc, (M - R) / B).

    python benchmarks/streaming.py make FOLDER    # random weights: 24 LLaMA blocks, bf16 (4.1 GB) and int4 (1.1 GB)
    python benchmarks/streaming.py run FOLDER     # shares 1, 0.8, 0.5, 0.1, and the peers; a JSON line each
    python benchmarks/streaming.py compare FOLDER --memory 1400MiB    # lowbit compare in so much memory, and without

Every measurement is a process of its own in a cgroup (v1, needs root) whose memory.limit_in_bytes is what the model is
told it may hold: RLIMIT_AS and RLIMIT_DATA do not count the page cache, so that a file smaller than the machine's
memory would never be read twice. Tc is a pass with everything resident, B a direct read of the model's own files, both
in the same run. `mmap` is the same model and kernels with its weights mapped from the files, as llama.cpp has them;
`accelerate` is transformers with all blocks offloaded to disk, in bf16. Values are random: they do not change speed.

`compare` scores both checkpoints, first with --memory in a cgroup that allows just that, then in memory, and says how
far apart their numbers are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup/memory/lowbit-streaming")
SHAPE: dict[str, Any] = {
    "hidden_size": 2560, "intermediate_size": 7680, "num_attention_heads": 20, "num_key_value_heads": 20,
    "num_hidden_layers": 24, "vocab_size": 8192, "max_position_embeddings": 1024,
}  # fmt: skip
FORMAT, PROMPT = "int4-g64", 16
_PEERS = (("mmap", 0.8), ("mmap", 0.5), ("accelerate", 0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["make", "run", "one", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shares", type=float, nargs="*", default=[1.0, 0.8, 0.5, 0.1])
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--how", choices=["lowbit", "mmap", "accelerate"], default="lowbit")
    parser.add_argument("--share", type=float)
    parser.add_argument("--memory", default="1400MiB")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    a = parser.parse_args()
    if a.command == "make":
        make(a.folder)
    elif a.command == "one":
        print(json.dumps(measure(a)))
    elif a.command == "compare":
        compare(a)
    else:
        run(a)


def run(a: argparse.Namespace) -> None:
    print(json.dumps({"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(), **_cpu()}))
    compute = None
    for how, share in [*(("lowbit", s) for s in a.shares), *(_PEERS if a.peers else ())]:
        command = [sys.executable, __file__, "one", str(a.folder), "--how", how, "--share", str(share)]
        command += ["--tokens", str(a.tokens if how == "lowbit" else 3), "--engine", a.engine]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
        if done.returncode:
            print(json.dumps({"how": how, "share": share, "failed": done.returncode}), flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        if how == "lowbit":
            compute = compute or found["seconds"]  # the first: everything resident
            found["bound"] = max(compute, found["moved"] / found["disk"])
            found["over_bound"] = round(found["seconds"] / found["bound"], 3)
        print(json.dumps(found), flush=True)


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """One process: enter the cgroup, load, run some tokens, and say what was held."""
    group = _enter()
    _drop_cache(a.folder)
    import torch

    model, told = {"lowbit": streamed, "mmap": mapped, "accelerate": offloaded}[a.how](a, group)
    ids = torch.randint(1, SHAPE["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    times: list[float] = []
    with torch.inference_mode():
        out = model(ids, use_cache=True)
        read = _read_bytes()
        for _ in range(a.tokens):
            started = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - started)
    return {
        "how": a.how, "share": a.share, "seconds": statistics.median(times), "slowest": max(times),
        "read_a_token": (_read_bytes() - read) / a.tokens, **told,
        "limit": int((group / "memory.limit_in_bytes").read_text()),
        "most_held": int((group / "memory.max_usage_in_bytes").read_text()),
        "rss": _rss(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def compare(a: argparse.Namespace) -> None:
    """Three cells each: the bf16 original, itself again with another batch, and int4 beside it."""
    from lowbit.evaluation.evidence import read_tokens
    from lowbit.pipeline.allocate import size

    found = {}
    for memory in (a.memory, None):
        with tempfile.TemporaryDirectory() as name:
            store = Path(name)
            command = [sys.executable, "-m", "lowbit.cli", "compare", str(a.folder / "bf16"), str(a.folder / "int4")]
            command += ["--windows", str(a.windows), "--protocol", f"windows-{a.length}", "--store", name, "--json"]
            command += [] if memory is None else ["--memory", memory]
            told = _held(command, None if memory is None else size(memory), a.folder)
            scores = {path.parent.name: read_tokens(path.parent)[0] for path in store.rglob("tokens.parquet")}
        found[memory] = sorted(scores.values(), key=lambda tokens: float(tokens.kl.mean()))
        print(json.dumps({"memory": memory, **told}), flush=True)
    apart = {name: 0.0 for name in found[None][0].columns()}
    for ours, theirs in zip(found[a.memory], found[None], strict=True):
        for name, column in theirs.columns().items():
            apart[name] = max(apart[name], float(abs(ours.columns()[name] - column).max()))
    print(json.dumps({"kl": [float(t.kl.mean()) for t in found[None]], "furthest_apart": apart}))


def _held(command: list[str], limit: int | None, folder: Path) -> dict[str, Any]:
    """Run a command in a cgroup of its own; what it held and read."""
    group = _group()
    if limit is not None:
        (group / "memory.limit_in_bytes").write_text(str(limit))
    _drop_cache(folder)
    started, most = time.perf_counter(), 0
    join = ["sh", "-c", f'echo $$ > {group}/tasks; exec "$@"', "sh", *command]
    process = subprocess.Popen(join, stdout=subprocess.DEVNULL)
    done, status = 0, 0
    while not done:
        done, status, used = os.wait4(process.pid, os.WNOHANG)
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        most = max(most, int(stat["rss"]))
        time.sleep(0.05)
    return {
        "status": status, "seconds": round(time.perf_counter() - started, 1), "limit": limit, "most_rss": most,
        "most_resident_with_mapped_files": used.ru_maxrss * 1024, "read": used.ru_inblock * 512,
        "most_in_cgroup": int((group / "memory.max_usage_in_bytes").read_text()),
        "over_limit": int((group / "memory.failcnt").read_text()),
    }  # fmt: skip


def allowed(a: argparse.Namespace) -> tuple[Any, int, int]:
    """The checkpoint's outline, this process's size, and the memory in which a share of the blocks stays."""
    import torch

    from lowbit.runtime.stream_model import outline

    found, base = outline(a.folder / "int4"), _rss()
    fixed, block = found.fixed(PROMPT + a.tokens, torch.float32, base), max(found.sizes)
    return found, base, fixed + round(a.share * len(found.sizes)) * block + (2 * block if a.share < 1 else 0)


def streamed(a: argparse.Namespace, group: Path) -> tuple[Any, dict[str, Any]]:
    from lowbit.runtime.reader import disk_rate
    from lowbit.runtime.stream_model import stream

    found, base, memory = allowed(a)
    paths = [extent.path for extent in found.extents]
    if a.share < 1:
        (group / "memory.limit_in_bytes").write_text(str(memory))
    disk = disk_rate(paths, 1.0)
    started = time.perf_counter()
    opened = stream(a.folder / "int4", memory, tokens=PROMPT + a.tokens, engine=a.engine, base=base)
    loading = time.perf_counter() - started
    s = opened.schedule
    return opened.model, {
        "disk": disk, "blocks": len(s.blocks), "streamed": len(s.streamed), "total": s.total, "moved": s.moved,
        "resident": s.resident, "fixed": s.fixed, "told": memory, "loading": loading, "engine": opened.engine,
    }  # fmt: skip


def mapped(a: argparse.Namespace, group: Path) -> tuple[Any, dict[str, Any]]:
    """The same model and kernels with weights in the page cache, in the same memory."""
    import torch
    from safetensors import safe_open

    from lowbit.runtime import stream_model
    from lowbit.runtime.stream_kernel import PANELS

    found, _, memory = allowed(a)
    (group / "memory.limit_in_bytes").write_text(str(memory))
    stream_model._fill(found, torch.float32)
    linears = stream_model._linears(found.model)
    for extent in found.extents:
        handle = safe_open(extent.path, framework="pt")
        for site, places in extent.places.items():
            linears[site].point({part: handle.get_tensor(f"{site}.weight.{part}") for part in places})
            linears[site].use_only(PANELS)
    return found.model.eval(), {"total": sum(found.sizes)}


def offloaded(a: argparse.Namespace, group: Path) -> tuple[Any, dict[str, Any]]:
    """transformers with accelerate: every block on disk in bf16, in the memory that lowbit has for its share."""
    import accelerate
    import torch
    from transformers import AutoModelForCausalLM

    _, _, memory = allowed(a)
    (group / "memory.limit_in_bytes").write_text(str(memory))
    places: dict[str, Any] = {f"model.layers.{i}": "disk" for i in range(SHAPE["num_hidden_layers"])}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        a.folder / "bf16", dtype=torch.bfloat16, device_map=places, offload_folder=a.folder / "offload"
    )
    nbytes = sum(path.stat().st_size for path in (a.folder / "bf16").glob("*.safetensors"))
    return model.eval(), {"total": nbytes, "accelerate": accelerate.__version__}


def make(folder: Path) -> None:
    """Both checkpoints, every block with the same random weights under its own names."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from lowbit.formats.presets import preset
    from lowbit.io.native import Writer
    from lowbit.models.source import of_directory
    from lowbit.models.store import INDEX
    from lowbit.pipeline.recipe import parse
    from lowbit.pipeline.result import Finished

    dense = folder / "bf16"
    dense.mkdir(parents=True)
    LlamaConfig(**SHAPE, tie_word_embeddings=False, architectures=["LlamaForCausalLM"]).save_pretrained(dense)
    _bytes_as_tokens().save_pretrained(dense)
    d, f, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    shapes = {f"self_attn.{n}_proj": (d, d) for n in "qkvo"} | {
        "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    weights = {f"{n}.weight": (torch.randn(s) * s[1] ** -0.5).bfloat16() for n, s in shapes.items()}
    norms = {f"{n}_layernorm.weight": torch.ones(d).bfloat16() for n in ("input", "post_attention")}
    where: dict[str, str] = {}

    def write(name: str, tensors: dict[str, Any]) -> None:
        save_file(tensors, dense / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    ends = {"model.embed_tokens.weight": torch.randn(v, d).bfloat16(), "model.norm.weight": torch.ones(d).bfloat16(),
            "lm_head.weight": (torch.randn(v, d) * d**-0.5).bfloat16()}  # fmt: skip
    write("rest.safetensors", ends)
    for i in range(SHAPE["num_hidden_layers"]):
        write(f"block-{i:02d}.safetensors", {f"model.layers.{i}.{n}": t for n, t in (weights | norms).items()})
    (dense / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    source, fmt = of_directory(dense), preset(FORMAT)
    codes = {n: fmt.encode(w, fmt.fit(w)) for n in shapes for w in [weights[f"{n}.weight"].float()]}
    with Writer(folder / "int4", source, parse(f"rtn:{FORMAT}"), None) as sink:
        for block in source.blocks:
            named = {f"{block}.{n}": q for n, q in codes.items()}
            sink.write(block, source.skeleton.get_submodule(block), Finished(named, {}, {}))
        sink.finish({"seconds": 0.0, "cpu_seconds": 0.0, "resumed": False})


def _bytes_as_tokens() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def _enter() -> Path:
    group = _group()
    (group / "tasks").write_text(str(os.getpid()))
    return group


def _group() -> Path:
    CGROUP.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(dir=CGROUP))


def _drop_cache(folder: Path) -> None:
    """What is in the page cache already is free for everybody, whatever the limit of a group."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes() -> int:
    """What this process has had the disk read."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def _rss() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _cpu() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {"cpu": next(line.split(": ")[1] for line in lines if line.startswith("model name"))}


if __name__ == "__main__":
    main()
