"""Products with coded matrices against decoding them: the same whole numbers, and the same floats to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit import _native
from lowbit.codec import product, stream
from lowbit.codec.product import LARGEST, Product
from lowbit.errors import FormatError

CASES = [  # sigma, rows, widths, segment
    (1.3, 1, [1], 64),
    (1.3, 37, [63], 64),
    (1.3, 70, [64, 128, 65], 900),
    (0.3, 29, [128], 1 << 17),
    (18.0, 33, [100], 300),  # a raw bit, joined to its symbol
    (60.0, 40, [192], 2000),  # raw bits apart
    (4.0, 13, [4096], 1 << 14),
]


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LOWBIT_ISA", request.param)
    return str(request.param)


def coded(sigma: float, rows: int, widths: list[int], segment: int) -> torch.Tensor:
    """With heavy tails, so that some numbers are exceptions, and panels of different spread."""
    rng = np.random.default_rng(0)
    scale = np.repeat(sigma * np.arange(1, 1 + len(widths)), widths)
    numbers = np.round(rng.standard_t(4, (rows, sum(widths))) * scale + 2).clip(-30000, 30000)
    return stream.encode(torch.from_numpy(numbers.astype(np.int16)), widths, segment=segment)


def factors(tokens: int, columns: int, largest: int = LARGEST) -> torch.Tensor:
    g = torch.Generator().manual_seed(tokens)
    return torch.randint(-largest, largest + 1, (tokens, columns), generator=g).to(torch.int16)


def test_products_are_exact_on_every_processor(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = 0
    for case in CASES:
        blob = coded(*case)
        p = Product(blob)
        exceptions += p._native.exceptions
        assert p.fits
        for tokens, threads in ((1, 1), (2, 3), (5, 2)):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            x = factors(tokens, p.shape[1])
            expected = stream.decode(blob).numpy().astype(np.int64) @ x.numpy().astype(np.int64).T
            assert np.array_equal(p.multiply(x).numpy(), expected.T), (isa, case, tokens)
            assert torch.equal(product.multiply(blob, x), torch.from_numpy(expected.T))
    assert exceptions > 100


def test_the_largest_sums_do_not_overflow(isa: str) -> None:
    """Symbols and factors at their ends, in the widest panel that is multiplied."""
    numbers = torch.zeros(2, 1 << 17, dtype=torch.int16)
    numbers[:, ::2] = 63
    numbers[0] = 63
    blob = stream.encode(numbers)
    x = torch.full((1, 1 << 17), LARGEST, dtype=torch.int16)
    assert Product(blob).multiply(x).tolist() == (numbers.long() @ x[0].long()).view(1, 2).tolist()


def test_linear_is_its_twin_to_the_last_bit(isa: str) -> None:
    g = torch.Generator().manual_seed(0)
    for case in CASES:
        blob = coded(*case)
        p = Product(blob)
        rows, columns = p.shape
        x = torch.randn(3, columns, generator=g) * torch.tensor([[1.0], [1e-20], [1e20]])
        order = torch.randperm(columns, generator=g).to(torch.int32)
        step, gain = torch.rand(columns, generator=g) + 0.1, torch.rand(rows, generator=g) + 0.5
        y = p.linear(x, order, step, gain)
        assert torch.equal(y, product.linear(blob, x, order, step, gain)), case
        exact = (x[:, order.long()] * step).double() @ stream.decode(blob).double().T * gain.double()
        bound = exact.abs().amax() * 0 + 1.01 / (2 * LARGEST) * (
            (x[:, order.long()] * step).abs().amax(1, keepdim=True).double()
            * stream.decode(blob).double().abs().sum(1) * gain.double()
        )  # fmt: skip
        assert bool(((y.double() - exact).abs() <= bound + exact.abs() * 1e-6).all())


def test_rounding_is_to_the_nearest_and_of_zeros_zero() -> None:
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    numbers, scale = product.rounding(x)
    assert numbers.abs().amax(1).tolist() == [LARGEST] * 3 + [0]
    assert bool(((numbers * scale - x.double()).abs() <= 0.5001 * scale).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others(value: float) -> None:
    blob = coded(*CASES[3])
    p = Product(blob)
    rows, columns = p.shape
    x = torch.ones(3, columns)
    x[1, 5] = value
    one = torch.ones(columns)
    y = p.linear(x, torch.arange(columns, dtype=torch.int32), one, torch.ones(rows))
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())


def test_what_cannot_be_multiplied_is_told_and_refused() -> None:
    p = Product(coded(3000.0, 8, [64], 64))
    assert not p.fits
    with pytest.raises(FormatError, match="raw bits"):
        p.multiply(factors(1, 64))


def test_wrong_sizes_and_factors_are_refused() -> None:
    p = Product(coded(*CASES[3]))
    with pytest.raises(FormatError, match="shape"):
        p.multiply(factors(1, 64))
    with pytest.raises(FormatError, match="32512"):
        p.multiply(torch.full((1, 128), LARGEST + 1, dtype=torch.int16))
    with pytest.raises(FormatError, match="none"):
        p.linear(torch.ones(1, 128), torch.full((128,), 128, dtype=torch.int32), torch.ones(128), torch.ones(29))


def test_a_corrupt_segment_is_refused(isa: str) -> None:
    blob = coded(1.3, 37, [64, 64], 300)
    blob[-9:] ^= 0x55
    with pytest.raises(FormatError, match="corrupt"):
        Product(blob).multiply(factors(1, 128))
    with pytest.raises(FormatError, match="LBEC"):
        Product(torch.zeros(100, dtype=torch.uint8))


def test_a_block_of_more_rows_than_there_are_allocates_no_more() -> None:
    """A stream may say so; what is summed is what there is."""
    codes = torch.randint(-3, 4, (2, 64), dtype=torch.int16)
    blob = stream.encode(codes)
    assert int.from_bytes(bytes(blob[12:16].tolist()), "little") >= 2
    blob[12:16] = 255
    x = torch.randint(-100, 100, (2, 64), dtype=torch.int16)
    assert torch.equal(Product(blob).multiply(x), x.to(torch.int64) @ codes.to(torch.int64).T)
