"""What every peer script shares: the calibration windows, the cost of a run, and the dense directory it leaves.

A peer's result is judged as the float32 matrices that its codes stand for, in an ordinary Hugging Face directory: one
scorer then reads them all, and no peer's own kernels, dtype or forward enter the comparison.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_SIDE_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja")


class Cost(NamedTuple):
    """What a stage took: seconds by the clock, seconds of CPU of this process (all threads), peak memory so far."""

    wall_s: float
    cpu_s: float
    peak_rss_gib: float


class Meter:
    """Starts at construction; ``read`` gives the cost since then (the peak is the whole process's)."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Cost:
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kibibytes on Linux
        return Cost(time.perf_counter() - self._wall, time.process_time() - self._cpu, peak_kib / 2**20)


def parser(description: str | None) -> argparse.ArgumentParser:
    """What every script that quantizes from text is told."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", type=Path, required=True, help="dense Hugging Face directory")
    found.add_argument("--text", type=Path, required=True, help="UTF-8 calibration text")
    found.add_argument("--out", type=Path, required=True, help="directory for the dequantised model")
    found.add_argument("--bits", type=int, default=4)
    found.add_argument("--group", type=int, default=64)
    found.add_argument("--samples", type=int, default=32)
    found.add_argument("--length", type=int, default=512)
    found.add_argument("--threads", type=int, default=1)
    return found


def calibration_windows(tokenizer: Any, text: Path, samples: int, length: int) -> torch.Tensor:
    """``(samples, length)`` token ids: the first windows of a file that was tokenised whole, end to end, unshuffled.

    Raises ValueError when the text is too short.
    """
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    if len(ids) < samples * length:
        raise ValueError(f"{text.name}: {len(ids)} tokens; {samples} x {length} are needed: take a longer text")
    return torch.tensor(ids[: samples * length]).view(samples, length)


def most_levels(weight: torch.Tensor, group: int) -> int:
    """The largest number of distinct values in any run of ``group`` columns of an ``(out, in)`` matrix."""
    ordered = weight.reshape(-1, group).sort(dim=1).values
    return int((ordered[:, 1:] != ordered[:, :-1]).sum(dim=1).max()) + 1


def save_dense(source: Path, out: Path, changed: Mapping[str, torch.Tensor]) -> None:
    """Write ``source`` again in float32 under ``out`` with the ``changed`` weights in place of its own.

    Everything else comes from the source file rather than from the peer's model, so nothing can drift unseen.
    Raises ValueError when a changed weight is unknown to the source or has another shape.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            tensors |= {name: f.get_tensor(name).float() for name in f.keys()}  # noqa: SIM118 (no mapping)
    for name, weight in changed.items():
        if name not in tensors or tensors[name].shape != weight.shape:
            raise ValueError(f"{name} of shape {tuple(weight.shape)} is not in {source.name}: is this its own result?")
        tensors[name] = weight.detach().float().contiguous()
    out.mkdir(parents=True, exist_ok=True)
    for pattern in _SIDE_FILES:
        for file in source.glob(pattern):
            shutil.copy2(file, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def write_report(out: Path, packages: Iterable[str], fields: Mapping[str, object]) -> None:
    """``out/peer.json``: the fields of a run with the versions of the named packages and the machine's CPU count."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    machine = {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    report = dict(fields) | {"versions": versions} | machine
    (out / "peer.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
