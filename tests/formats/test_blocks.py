"""Blocks against naive double loops."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import FormatError
from lowbit.formats.blocks import Block

BLOCKS = [
    "tensor",
    "row",
    "group:4",
    "group:7",
    "group:1000",
    "tile:2:3",
    "tile:4:4",
    "tile:99:5",
    "flat:5",
    "flat:9999",
]
SHAPES = [(1, 1), (4, 8), (3, 7), (5, 10), (6, 21)]


def block_of(block: Block, shape: tuple[int, int], i: int, j: int) -> tuple[int, int]:
    """Which block an element is in, by definition."""
    match block.kind:
        case "tensor":
            return 0, 0
        case "row":
            return i, 0
        case "group":
            return i, j // block.size[0]
        case "tile":
            return i // block.size[0], j // block.size[1]
        case "flat":
            return (i * shape[1] + j) // block.size[0], 0


def matrix(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", BLOCKS)
def test_split_holds_each_element_in_its_block_and_spread_returns_its_value(text: str, shape: tuple[int, int]) -> None:
    block, w = Block.parse(text), matrix(shape)
    sums = torch.zeros(block.count(shape))
    counts = torch.zeros(block.count(shape))
    for i in range(shape[0]):
        for j in range(shape[1]):
            at = block_of(block, shape, i, j)
            sums[at] += w[i, j]
            counts[at] += 1
    parts = block.split(w)
    assert parts.shape[:2] == block.count(shape)
    assert parts.shape[2] >= counts.max()
    assert parts.numel() <= 4 * w.numel() + 40, "padding must not grow with the size of a block"
    torch.testing.assert_close(parts.sum(-1), sums)
    assert int((parts != 0).sum()) == int((w != 0).sum())

    spread = block.spread(sums, shape).expand(shape)
    expected = [[float(sums[block_of(block, shape, i, j)]) for j in range(shape[1])] for i in range(shape[0])]
    assert spread.tolist() == expected


@pytest.mark.parametrize("text", BLOCKS)
def test_spread_of_some_rows(text: str) -> None:
    block, shape, rows = Block.parse(text), (6, 21), slice(2, 5)
    values = torch.arange(torch.tensor(block.count(shape)).prod()).view(block.count(shape)).float()
    some = block.spread(values[rows] if block.follows_rows else values, shape, rows)
    assert torch.equal(some.expand(3, 21), block.spread(values, shape).expand(shape)[rows])


@pytest.mark.parametrize("text", BLOCKS)
def test_text_is_the_identity_of_a_block(text: str) -> None:
    assert str(Block.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "group", "group:0", "group:-4", "group:4:4", "tile:4", "row:1", "flat:x", "column", "group:٤", "group:4.0",
     "group:" + "9" * 5000],
)  # fmt: skip
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="unknown block"):
        Block.parse(text)


def test_a_block_larger_than_memory_costs_nothing() -> None:
    huge = Block.parse("group:999999999999")
    w = matrix((5, 10))
    assert huge.split(w).shape == (5, 1, 10)
    assert huge.spread(w[:, :1], (5, 10)).shape == (5, 10)
