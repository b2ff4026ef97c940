"""Devices by name: memory and bandwidth of processors that people run models on, and of this one.

Figures of the list are the vendors' own, in bytes of 10⁹; what a driver reports is a few percent more or less.
"""

from __future__ import annotations

import time

import psutil
import torch

from lowbit.errors import RecipeError, nearest
from lowbit.study.fit import Device

THIS = "this"
DEVICES = {
    "b200": Device(int(180e9), 8.0e12), "h200": Device(int(141e9), 4.8e12), "h100": Device(int(80e9), 3.35e12),
    "h100-pcie": Device(int(80e9), 2.0e12), "a100-80g": Device(int(80e9), 2.04e12),
    "a100-40g": Device(int(40e9), 1.56e12), "mi300x": Device(int(192e9), 5.3e12), "l40s": Device(int(48e9), 864e9),
    "l4": Device(int(24e9), 300e9), "a10": Device(int(24e9), 600e9), "t4": Device(int(16e9), 320e9),
    "rtx-5090": Device(int(32e9), 1792e9), "rtx-4090": Device(int(24e9), 1008e9), "rtx-3090": Device(int(24e9), 936e9),
    "rtx-3060": Device(int(12e9), 360e9), "m2-ultra": Device(int(192e9), 800e9, unified=True),
    "m4-max": Device(int(128e9), 546e9, unified=True), "m1-max": Device(int(64e9), 400e9, unified=True),
    "dgx-spark": Device(int(128e9), 273e9, unified=True),
}  # fmt: skip
_PROBE = 256 << 20  # bytes that are read to find a bandwidth: beyond any cache


def named(name: str) -> Device:
    """A device of the list, or ``this``: the free memory and the measured bandwidth of the machine that asks.

    Raises RecipeError with the nearest names.
    """
    if name == THIS:
        return this()
    if name not in DEVICES:
        raise RecipeError(f"no device {name!r}", where="--device", fix=nearest(name, [THIS, *DEVICES]))
    return DEVICES[name]


def this() -> Device:
    """The accelerator if torch has one, else the processor; about a third of a second."""
    if torch.cuda.is_available():
        return Device(int(torch.cuda.mem_get_info()[0]), _read_rate("cuda"))
    return Device(int(psutil.virtual_memory().available), _read_rate("cpu"))


def _read_rate(device: str) -> float:
    """Bytes a second of reading, the best of five sums."""
    buffer = torch.ones(_PROBE // 4, device=device)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        buffer.sum().item()  # waits for the device
        best = max(best, _PROBE / (time.perf_counter() - started))
    return best
