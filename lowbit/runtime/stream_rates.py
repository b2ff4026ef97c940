"""Rates of this machine on a checkpoint's own files and weights, for a prediction before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import linear

from lowbit.errors import CheckpointError
from lowbit.io.layout import read_shard
from lowbit.runtime.inner import Inner
from lowbit.runtime.reader import disk_rate
from lowbit.runtime.schedule import Prediction, Rates, Schedule
from lowbit.runtime.stream_kernel import PANELS
from lowbit.runtime.stream_model import Outline

_HEAD_ROWS = 4096  # of the head, timed for the whole


def measure(found: Outline, disk: float | None, dtype: torch.dtype = torch.float32) -> Rates:
    """About a second: the disk (unless given), every linear of the middle block at one token, and a part of the head.

    Attention and norms are not timed: at short texts they are a few percent. Raises CheckpointError where no block is
    low-bit.
    """
    if not found.blocks:
        raise CheckpointError("holds no low-bit weights", where=str(found.root), fix="lowbit quantize")
    middle = found.extents[len(found.extents) // 2]
    seconds, weights = 0.0, 0
    for q in read_shard(middle.path).codes.values():
        inner = Inner.of(q)
        x = torch.randn(1, q.shape[1], dtype=dtype)
        seconds += _best(lambda inner=inner, x=x: PANELS.run(inner.enter(x), inner.weight))  # type: ignore[misc]
        weights += q.shape[0] * q.shape[1]
    text = found.model.config.get_text_config(decoder=True)
    rows = min(text.vocab_size, _HEAD_ROWS)
    x, head = torch.randn(1, text.hidden_size, dtype=dtype), torch.randn(rows, text.hidden_size, dtype=dtype)
    projecting = _best(lambda: linear(x, head)) * text.vocab_size / rows
    compute = seconds * found.weights / weights + projecting
    rate = disk or disk_rate([extent.path for extent in found.extents])
    return Rates(rate, compute, 2 * weights / seconds)


def predict(found: Outline, schedule: Schedule, rates: Rates) -> Prediction:
    """What a schedule of this checkpoint's blocks will do; coded ones are decoded at every pass, which is timed."""
    middle = found.extents[len(found.extents) // 2]
    if middle.coded and schedule.streamed:
        with middle.path.open("rb") as file:
            file.seek(middle.offset)
            stored = torch.frombuffer(bytearray(file.read(middle.length)), dtype=torch.uint8)
        decoding = _best(lambda: middle.parts(stored)) * schedule.moved / middle.decoded
        rates = replace(rates, compute=rates.compute + decoding)
    return Prediction(schedule, rates, found.outside, 2 * found.weights)


def _best(work: Callable[[], object]) -> float:
    """Seconds, by the best of five."""
    work()
    timings = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        timings.append(time.perf_counter() - started)
    return min(timings)
