"""Will it run, and how fast: memory needed against memory there is, and decode speed from bytes and bandwidth.

Pure arithmetic in bytes, seconds and tokens. Decoding one token reads every resident weight and the cache once, so

    tokens/s = efficiency x bandwidth / (bytes of weights read + bytes of keys and values)

with an efficiency of 0.4 to 0.6 in engines that are measured (llama.cpp on an M2 Ultra: 0.50 for F16, 0.55 for Q8_0,
0.42 for Q4_0 of LLaMA-7B); ``efficiency`` fits one to rows of your own. Machines with one memory for processor and
accelerator give an accelerator three quarters of it (Metal's recommended working set: 73.7 GB of 96).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lowbit.errors import RecipeError

UNIFIED_SHARE = 0.75
EFFICIENCY = (0.4, 0.5, 0.6)
"""Low, middle and high share of the bandwidth that decoding reaches."""


@dataclass(frozen=True)
class Shape:
    """What of a model's shape its memory depends on."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int

    def kv_bytes(self, tokens: int, bits: float = 16, batch: int = 1) -> int:
        """Keys and values of ``batch`` texts of ``tokens``; ``bits`` a number, scales included."""
        return math.ceil(2 * self.layers * self.kv_heads * self.head_dim * tokens * batch * bits / 8)

    def activation_bytes(self, tokens: int, *, bytes_each: int = 2) -> int:
        """The largest set of activations alive at once while ``tokens`` pass together: one block's, and the logits of
        one position in float32. Attention is taken to be computed in tiles."""
        heads = 2 * self.kv_heads * self.head_dim
        widest = max(2 * self.hidden + heads + self.hidden, self.hidden + 2 * self.intermediate)
        return tokens * widest * bytes_each + 4 * self.vocab


def shape_of(config: Any) -> Shape:
    """From a transformers configuration of any decoder."""
    text = config.get_text_config(decoder=True)
    heads, hidden = text.num_attention_heads, text.hidden_size
    inner = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * hidden
    shared = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
    grouped = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    return Shape(
        layers=text.num_hidden_layers, kv_heads=1 if shared else grouped,
        head_dim=getattr(text, "head_dim", None) or hidden // heads, hidden=hidden, intermediate=inner,
        vocab=text.vocab_size,
    )  # fmt: skip


@dataclass(frozen=True)
class Need:
    """Bytes that running takes, by what they are for."""

    weights: int
    kv: int = 0
    activations: int = 0
    reserve: int = 0
    """Of the runtime itself: libraries, context of the driver, buffers."""

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.reserve


@dataclass(frozen=True)
class Device:
    """Memory in bytes, bandwidth in bytes a second (None where unknown)."""

    memory: int
    bandwidth: float | None = None
    unified: bool = False
    """One memory for processor and accelerator."""

    @property
    def usable(self) -> int:
        return int(self.memory * UNIFIED_SHARE) if self.unified else self.memory


class Fit(NamedTuple):
    """Whether a need fits, and what is left or missing."""

    fits: bool
    need: Need
    usable: int
    spare: int
    """Bytes left over; below 0 so many are missing."""
    resident: float
    """Share of the weights that can stay in this memory, the rest being read from elsewhere at every token; 0 where
    not even keys, values and activations fit."""


def fit(need: Need, device: Device) -> Fit:
    """Hold a need against a device."""
    spare = device.usable - need.total
    room = device.usable - (need.total - need.weights)
    resident = 1.0 if need.weights == 0 else min(max(room / need.weights, 0.0), 1.0)
    return Fit(spare >= 0, need, device.usable, spare, resident)


def longest_context(need: Need, device: Device, shape: Shape, bits: float = 16) -> int:
    """Most tokens of keys and values that fit beside the rest of the need (its own ``kv`` put aside)."""
    room = device.usable - (need.total - need.kv)
    return max(int(room // (2 * shape.layers * shape.kv_heads * shape.head_dim * bits / 8)), 0)


class Rate(NamedTuple):
    """Tokens a second: predicted, with the ends of what engines reach."""

    low: float
    middle: float
    high: float


def decode_rate(
    weights: int, kv: int, bandwidth: float, *, efficiency: tuple[float, float, float] = EFFICIENCY,
    resident: float = 1.0, slow_bandwidth: float | None = None,
) -> Rate:  # fmt: skip
    """Tokens a second of one text. ``weights`` are the bytes read a token: of a mixture, its active experts only.

    With ``resident`` below 1 the other weights come from a disk or host at ``slow_bandwidth``, which bounds the rate
    by itself. Raises RecipeError for bytes or bandwidths that are not above 0, or a slow part without its bandwidth.
    """
    if weights + kv <= 0 or bandwidth <= 0 or (resident < 1 and not slow_bandwidth):
        raise RecipeError(
            f"no rate for {weights + kv} bytes at {bandwidth:g} bytes/s, {resident:.0%} resident", where="decode rate",
            fix="bytes and bandwidths above 0, and slow_bandwidth where weights are offloaded",
        )  # fmt: skip
    slow = 0.0 if resident >= 1 or slow_bandwidth is None else (1 - resident) * weights / slow_bandwidth
    fast = (min(resident, 1.0) * weights + kv) / bandwidth
    low, middle, high = (1 / (fast / e + slow) for e in efficiency)
    return Rate(low, middle, high)


class Measured(NamedTuple):
    """A decode speed that was measured: bytes read a token, and tokens a second."""

    nbytes: float
    rate: float


def efficiency(rows: Sequence[Measured], bandwidth: float) -> tuple[float, float, float]:
    """Lowest, geometric mean and highest share of the bandwidth that these rows reach. Raises RecipeError for none.

    The geometric mean is the one efficiency whose predictions have the least squared error in percent.
    """
    if not rows:
        raise RecipeError("no measured rows", where="efficiency", fix="bytes a token and tokens a second")
    shares = [row.nbytes * row.rate / bandwidth for row in rows]
    return min(shares), math.exp(sum(map(math.log, shares)) / len(shares)), max(shares)
