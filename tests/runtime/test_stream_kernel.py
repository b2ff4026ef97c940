"""The kernel of streamed weights against plain decoding, over formats, shapes and token counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowbit import _native
from lowbit.formats.format import Stored
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Columns, QTensor, Raw, Sum
from lowbit.runtime.stream_kernel import PANEL, PANELS, _decode, _grouped

NATIVE = ["int4-g32", "int4-g64", "int4-g128-sym", "int4-g48", "int4-row", "int8-row-sym", "int8-g32", "int2-g64",
          "int3-g32", "int5-g64", "int4-g64-half", "nf4", "nf4-dq", "fp8-e4m3", "mxfp4", "nvfp4"]  # fmt: skip
SHAPES = [(32, 256), (41, 208), (33, 100), (PANEL + 3, 64)]


def quantized(name: str, shape: tuple[int, int]) -> QTensor:
    fmt = preset(name.removesuffix("-half"))
    if name.endswith("-half"):  # zero points that are no whole numbers
        fmt = dataclasses.replace(fmt, zero=Stored(torch.float16))
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.02
    return fmt.encode(W, fmt.fit(W))


def inputs(tokens: tuple[int, ...], width: int) -> torch.Tensor:
    return torch.randn(*tokens, width, generator=torch.Generator().manual_seed(1))


def check(q: QTensor) -> None:
    exact = q.decode().double()
    for tokens in ((1,), (2, 3), (8,), (9,)):
        x = inputs(tokens, q.shape[1])
        expected = x.double() @ exact.T
        y = PANELS.run(x, q)
        assert y.shape == expected.shape
        assert float((y - expected).abs().max()) <= PANELS.tolerance * float(expected.abs().max())


@pytest.mark.parametrize("name", NATIVE)
def test_products_and_decoded_rows_are_the_references(name: str) -> None:
    taken = 0
    for shape in SHAPES:
        q = quantized(name, shape)
        check(q)
        if (grouped := _grouped(q)) is not None:
            taken += 1
            assert torch.equal(_decode(grouped, slice(3, shape[0] - 2)), q.decode()[3:-2])
    assert taken > 0


def test_sums_columns_and_base_three_decode_in_panels() -> None:
    shape = (PANEL + 9, 96)
    q, index = quantized("int4-g32", shape), torch.tensor([3, 50, 95])
    extra = Columns(shape, index, Raw.of(torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(2))))
    for tree in (Sum(shape, (q, extra)), quantized("ternary", shape)):
        check(tree)


def test_bfloat16_inputs_keep_their_dtype() -> None:
    q = quantized("int4-g64", (48, 128))
    x = inputs((4,), 128).bfloat16()
    y = PANELS.run(x, q)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), x.double() @ q.decode().double().T, rtol=1e-2, atol=1e-2)


def test_sizes_that_disagree_are_refused_before_memory_is_touched() -> None:
    q = quantized("int4-g32", (8, 64))
    grouped = _grouped(q)
    assert grouped is not None
    x, y = inputs((2,), 64), torch.empty(2, 8)
    for wrong in (
        grouped._replace(columns=66), grouped._replace(bits=5), grouped._replace(group=16),
        grouped._replace(scale=grouped.scale[:7]), grouped._replace(table=torch.zeros(15)), grouped._replace(bits=0),
    ):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011 - each has its own words
            _native.grouped_multiply(x, *wrong, y, 1)
    with pytest.raises(ValueError, match="tokens"):
        _native.grouped_multiply(x[:, :32].contiguous(), *grouped, y, 1)
