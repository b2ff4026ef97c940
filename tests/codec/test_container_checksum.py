"""CRC-32C against the vectors of RFC 3720, a bit-by-bit division, and itself over pieces."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit import _native
from lowbit.codec.checksum import crc32c


def bit_by_bit(data: bytes) -> int:
    """The remainder of the definition: polynomial 0x1EDC6F41, reflected, with ones before and after."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [(bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E), (b"123456789", 0xE3069283),
     (b"", 0)],
)  # fmt: skip
def test_published_vectors(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [1, 7, 8, 4095, 3 * 4096, 3 * 4096 + 13, 50_001])
def test_both_paths_are_the_definition(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    expected = bit_by_bit(data.tobytes())
    assert crc32c(data) == expected
    assert _native.crc32c(data, 0, tables=True) == expected


def test_pieces_go_on_where_the_last_ended() -> None:
    data = np.random.default_rng(0).integers(0, 256, 30_000).astype(np.uint8)
    assert crc32c(data[20_001:], crc32c(data[:20_001])) == crc32c(data)
