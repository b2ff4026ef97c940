"""Streaming: seconds a token of a model larger than the memory it is given, over the bound max(Tc, (M - R) / B).

    python benchmarks/streaming.py make FOLDER             # 24 blocks of random weights: 1.15 GB in q4_0, 4.1 in bf16
    python benchmarks/streaming.py run FOLDER --llama-cpp VENV/bin/python --airllm VENV/bin/python
    python benchmarks/streaming.py make FOLDER --shape 7b  # Llama-2-7B's shape: 3.6 GB in q4_0
    python benchmarks/streaming.py run FOLDER --peers llama.cpp --llama-cpp VENV/bin/python
    python benchmarks/streaming.py compare FOLDER --memory 1400MiB    # lowbit compare in so much memory, and without

Every measurement is a process of its own in a cgroup of its own (streaming_limits.py) whose memory.limit_in_bytes is
what lowbit is told it may hold when the share of its blocks stays; peers get the very same limit right after it. Files
leave the page cache before each. B is a direct read of the subject's own files, for one second before and one after
each process (the faster); Tc is the subject's own pass with everything in memory (0 for accelerate and AirLLM, where it
is not measured); M is the bytes of its blocks, and R what lowbit keeps of its own in that limit. llama.cpp, which holds
less besides the blocks, is measured once more in a limit with as much room for them as lowbit has.

Subjects (streaming_subjects.py): ``lowbit``; ``mmap``, its kernels on weights mapped from files; ``llama.cpp``, the
same codes as GGUF, mapped; ``accelerate``, all blocks offloaded to disk, and ``airllm``, in bf16. Values are random:
they do not change speed.

`compare` scores both checkpoints, first with --memory in a cgroup that allows just that, then in memory, and says how
far apart their numbers are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from streaming_limits import LIMIT, drop_cache, group, inside, number, remove, weight_files
from streaming_models import DENSE, GGUF, LOW, SHAPES, make

PEERS = ("mmap", "llama.cpp", "accelerate", "airllm")
_WHOLE = {"llama.cpp": ("llama.cpp", "llama.cpp, repacked")}
"""What peers run as with everything in memory: the first gives their Tc."""
_SHARES = {"mmap": (0.8, 0.5), "accelerate": (0.5,), "airllm": (0.5,)}
"""Where not all of them are measured, to save time: what reads everything at every token takes as long in any."""
_HEAD = "| | resident | limit | seconds a token | over the bound | bound | read a token | disk | load |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "run", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--format", default="q4_0")
    parser.add_argument("--gguf", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.8, 0.5, 0.1], help="of the blocks, resident")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--tokens", type=int, nargs=2, default=[7, 3], help="lowbit's, and each peer's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--priority", type=int, default=-20)
    parser.add_argument("--llama-cpp", default=sys.executable, metavar="PYTHON", help="with llama-cpp-python")
    parser.add_argument("--airllm", default=sys.executable, metavar="PYTHON", help="with airllm")
    parser.add_argument("--memory", default="1400MiB")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    a = parser.parse_args()
    if a.command == "make":
        make(a.folder, a.shape, a.format, a.gguf)
    elif a.command == "compare":
        compare(a)
    else:
        raise_priority(a.priority)
        run(a)


def raise_priority(nice: int) -> None:
    """Of this process and its children; on Linux first of the whole session, whose share of the processors it is."""
    os.nice(nice)
    session = Path("/proc/self/autogroup")
    if session.exists():
        session.write_text(str(nice))


def run(a: argparse.Namespace) -> None:
    """lowbit with everything resident, peers without a limit, then every share: lowbit, and peers within its limit."""
    print(json.dumps({"cpu": _cpu(), "cpus": os.cpu_count(), "threads": a.threads}), flush=True)
    rows = [whole := subject(a, "lowbit", 1.0)]
    compute = {"lowbit": whole["seconds"], "mmap": whole["seconds"]}
    for peer in a.peers:
        for how in _WHOLE.get(peer, ()):
            rows.append(subject(a, how, 1.0))
            compute.setdefault(peer, rows[-1].get("seconds", 0.0))
    for share in a.shares:
        rows.append(ours := subject(a, "lowbit", share))
        held = ours["total"] - ours["moved"]
        found = [subject(a, p, share, ours["limit"]) for p in a.peers if share in _SHARES.get(p, a.shares)]
        if "llama.cpp" in a.peers and "seconds" in rows[1]:
            besides = rows[1]["anonymous"] + rows[1]["file"] - ours["total"]
            found.append(subject(a, "llama.cpp", share, ours["limit"] - ours["fixed"] + besides))
        rows += found
        for row in [ours, *found]:
            if "seconds" in row:
                row["resident"] = held / ours["total"]
                row["bound"] = max(compute.get(row["how"], 0.0), (row.get("total", ours["total"]) - held) / row["disk"])
                row["over_bound"] = row["seconds"] / row["bound"]
    print("\n".join([_HEAD, "|---|---|---|---|---|---|---|---|---|", *map(_line, rows)]))


def subject(a: argparse.Namespace, how: str, share: float, limit: int | None = None) -> dict[str, Any]:
    """One row: what the process told, or how it ended."""
    python = {"llama.cpp": a.llama_cpp, "llama.cpp, repacked": a.llama_cpp, "airllm": a.airllm}.get(how, sys.executable)
    tokens = a.tokens[0] if how == "lowbit" else a.tokens[1]
    files = _files(a.folder, how)
    where, load = group(limit), os.getloadavg()[0]
    drop_cache(a.folder)
    before = _rate(files)
    command = [python, str(Path(__file__).with_name("streaming_subjects.py")), how, str(a.folder)]
    command += ["--share", str(share), "--tokens", str(tokens), "--threads", str(a.threads), "--group", str(where)]
    environment = os.environ | {"OMP_NUM_THREADS": str(a.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(inside(where, command), capture_output=True, check=False, text=True, env=environment)
    row: dict[str, Any] = {"how": how, "share": share, "load": round(load, 1)}
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        row |= {"limit": number(where, LIMIT), "ended": done.returncode, "said": " ".join(said)[-300:]}
    else:
        row |= json.loads(done.stdout.splitlines()[-1])
    row |= {"disk": max(before, after := _rate(files)), "disk_before": before, "disk_after": after}
    remove(where)
    print(json.dumps(row), flush=True)
    return row


def _line(row: dict[str, Any]) -> str:
    limit = f"{row['limit'] / 1e9:.2f} GB" if row["limit"] < 1 << 40 else "none"
    if "seconds" not in row:
        return f"| {row['how']} | | {limit} | ended with {row['ended']} | | | | | {row['load']} |"
    resident, over, bound = (f"{row[key]:.2f}" if key in row else "" for key in ("resident", "over_bound", "bound"))
    read, disk = row["read_a_token"] / 1e9, row["disk"] / 1e9
    return (
        f"| {row['how']} | {resident} | {limit} | {row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f}) "
        f"| {over} | {bound} | {read:.2f} GB | {disk:.2f} GB/s | {row['load']} |"
    )


def _files(folder: Path, how: str) -> list[Path]:
    if how.startswith("llama.cpp"):
        return [folder / GGUF]
    return weight_files(folder / (LOW if how in ("lowbit", "mmap") else DENSE))


def _rate(files: list[Path]) -> float:
    from lowbit.runtime.reader import disk_rate

    return disk_rate(files, 1.0)


def compare(a: argparse.Namespace) -> None:
    """Three cells each: the bf16 original, itself again with another batch, and the low-bit one beside it."""
    from lowbit.evaluation.evidence import read_tokens
    from lowbit.pipeline.allocate import size

    found = {}
    for memory in (a.memory, None):
        with tempfile.TemporaryDirectory() as name:
            store = Path(name)
            command = [sys.executable, "-m", "lowbit.cli", "compare", str(a.folder / DENSE), str(a.folder / LOW)]
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
    where = group(limit)
    drop_cache(folder)
    started, most = time.perf_counter(), 0
    process = subprocess.Popen(inside(where, command), stdout=subprocess.DEVNULL)
    done, status = 0, 0
    while not done:
        done, status, used = os.wait4(process.pid, os.WNOHANG)
        stat = dict(line.split() for line in (where / "memory.stat").read_text().splitlines())
        most = max(most, int(stat["rss"]))
        time.sleep(0.05)
    told = {
        "status": status, "seconds": round(time.perf_counter() - started, 1), "limit": limit, "most_rss": most,
        "most_resident_with_mapped_files": used.ru_maxrss * 1024, "read": used.ru_inblock * 512,
        "most_in_cgroup": number(where, "memory.max_usage_in_bytes"), "over_limit": number(where, "memory.failcnt"),
    }  # fmt: skip
    remove(where)
    return told


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
