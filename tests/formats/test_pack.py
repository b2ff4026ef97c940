"""Packing against big integers: a row is one number, written little-endian."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.formats.pack import Codes, bits_for, pack, reachable, row_bytes, unpack


def big_integer_row(codes: list[int], levels: int) -> bytes:
    """A row by the definition of the layout, with Python integers."""
    if levels == 3:
        fives = [codes[i : i + 5] for i in range(0, len(codes), 5)]
        return bytes(sum(digit * 3**i for i, digit in enumerate(five)) for five in fives)
    bits = (levels - 1).bit_length()
    number = sum(code << (bits * j) for j, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


def random_codes(rows: int, columns: int, levels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (rows, columns), generator=generator)


@pytest.mark.parametrize("levels", range(2, 257))
def test_every_level_count_round_trips_in_its_exact_bytes(levels: int) -> None:
    codes = random_codes(3, 19, levels, seed=levels)
    codes[0, :2] = torch.tensor([0, levels - 1])
    packed = pack(codes, levels)
    assert packed.shape == (3, row_bytes(19, levels))
    assert [bytes(row.tolist()) for row in packed] == [big_integer_row(row, levels) for row in codes.tolist()]
    assert torch.equal(unpack(packed, 19, levels).long(), codes)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 70), st.sampled_from([2, 3, 4, 5, 8, 11, 16, 32, 64, 100, 128, 255, 256]))
def test_any_width_round_trips_and_any_row_unpacks_alone(rows: int, columns: int, levels: int) -> None:
    codes = Codes.of(random_codes(rows, columns, levels, seed=columns), levels)
    assert codes.data.numel() == Codes.nbytes(rows, columns, levels)
    for i in range(rows):
        assert torch.equal(codes.unpack(slice(i, i + 1))[0], codes.unpack()[i])
        assert bytes(codes.data[i].tolist()) == big_integer_row(codes.unpack()[i].tolist(), levels)


@pytest.mark.parametrize(
    ("columns", "levels", "expected"),
    [(1, 2, 1), (8, 2, 1), (9, 2, 2), (5, 3, 1), (6, 3, 2), (576, 3, 116), (3, 8, 2), (8, 8, 3), (100, 8, 38),
     (7, 16, 4), (7, 32, 5), (7, 64, 6), (9, 128, 8), (7, 129, 7), (7, 256, 7)],
)  # fmt: skip
def test_bytes_of_a_row(columns: int, levels: int, expected: int) -> None:
    assert row_bytes(columns, levels) == expected


def test_bit_order_is_little_endian() -> None:
    assert pack(torch.tensor([[1, 2]]), 16).tolist() == [[0x21]]
    assert pack(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1]]), 2).tolist() == [[1, 1]]
    assert pack(torch.tensor([[7, 0, 1]]), 8).tolist() == [[0b01000111, 0]]
    assert pack(torch.tensor([[1, 2, 0, 0, 2]]), 3).tolist() == [[1 + 2 * 3 + 2 * 81]]


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 16, 100, 256])
def test_hostile_bytes_unpack_to_reachable_codes_only(levels: int) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(8).view(1, -1)
    columns = 5 * 2048 if levels == 3 else 8 * 2048 // bits_for(levels)
    assert int(unpack(every_byte, columns, levels).max()) == reachable(levels) - 1


@pytest.mark.parametrize("levels", [3, 8, 16])
def test_logical_bits_leave_out_the_padding_of_rows(levels: int) -> None:
    codes = Codes.of(random_codes(4, 13, levels), levels)
    per_row = 8 * math.ceil(13 / 5) if levels == 3 else 13 * int(math.log2(levels))
    assert codes.logical_bits == 4 * per_row <= 8 * codes.data.numel()


def test_codes_come_in_any_integer_or_float_dtype() -> None:
    codes = random_codes(2, 11, 8)
    for dtype in (torch.uint8, torch.int16, torch.int64, torch.float32):
        assert torch.equal(pack(codes.to(dtype), 8), pack(codes, 8))
