"""CRC-32C, the checksum of coded files: fast enough (several GB/s) to be verified at every read."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from lowbit import _native


def crc32c(data: UInt8[np.ndarray, "_"] | bytes, before: int = 0) -> int:
    """CRC-32C (Castagnoli) of bytes, or of what has the checksum ``before`` followed by them.

    It finds damage, not malice: whoever alters bytes can alter their checksum. Runs without the interpreter's lock.
    """
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    return int(_native.crc32c(array, before))  # type: ignore[attr-defined]
