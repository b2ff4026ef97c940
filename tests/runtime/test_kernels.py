"""Every kernel against the plain reference, which one is chosen, and that nothing else is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import linear

from lowbit.codec import stream
from lowbit.errors import RecipeError
from lowbit.formats.format import Stored
from lowbit.formats.nodes_coded import Coded
from lowbit.formats.pack import Codes
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Columns, QTensor, Raw, Sum
from lowbit.runtime.kernels import DENSE, REFERENCE, Kernel, choose, kernels, usable
from lowbit.runtime.kernels.coded import CODED
from lowbit.runtime.kernels.packed import PACKED
from lowbit.runtime.kernels.torch_cpu import FEW_TOKENS, INT4, INT8, works

FORMATS = [
    "int4-g32", "int4-g64", "int4-g128", "int4-g64-sym", "int4-g256-sym", "int8-row-sym", "int8-row", "int8-g32",
    "int3-g32", "nf4", "nf4-dq", "fp8-e4m3", "mxfp4", "nvfp4", "ternary", "int4-g64-half", "int8-row-half",
    "coded", "coded-wide", "coded-plain",
]  # fmt: skip
SHAPES = [(32, 256), (96, 512), (41, 208), (33, 100)]
DTYPES = [torch.float32, torch.bfloat16]
TOKENS = [(1,), (FEW_TOKENS,), (FEW_TOKENS + 1,), (2, 3)]

needs_vectors = pytest.mark.skipif(not works(), reason="this processor has neither AVX2 nor AVX-512")


def quantized(name: str, shape: tuple[int, int], seed: int = 0) -> QTensor:
    """Weights with a shift, so that zero points matter."""
    if name.startswith("coded"):
        return coded(shape, 2000.0 if name == "coded-wide" else 1.5, plain=name == "coded-plain")
    fmt = preset(name.removesuffix("-half"))
    if name.endswith("-half"):  # zero points that are no whole numbers
        fmt = dataclasses.replace(fmt, zero=Stored(torch.float16))
    W = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.02
    return fmt.encode(W, fmt.fit(W))


def coded(shape: tuple[int, int], sigma: float, plain: bool) -> Coded:
    """Numbers of a spread, with or without steps and gains; a wide one cannot be multiplied as it is decoded."""
    g = torch.Generator().manual_seed(0)
    numbers = (torch.randn(shape, generator=g) * sigma + 0.3).round().clamp(-30000, 30000).to(torch.int16)
    if plain:
        return Coded(shape, stream.encode(numbers), None, None, -4.0, 0.0, 0.0)
    steps = Codes.of(torch.randint(0, 32, (1, shape[1]), generator=g), 32)
    gains = Codes.of(torch.randint(0, 16, (1, shape[0]), generator=g), 16)
    return Coded(shape, stream.encode(numbers, segment=2000), steps, gains, -7.0, 0.05, 0.1)


def activations(leading: tuple[int, ...], width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*leading, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(kernel: Kernel, x: torch.Tensor, q: QTensor) -> torch.Tensor:
    return kernel.run(x, kernel.prepare(q, x.dtype) if kernel.prepared else q)


@pytest.mark.parametrize("kernel", [*kernels(), DENSE], ids=lambda k: k.name)
def test_every_kernel_computes_what_decoding_gives(kernel: Kernel) -> None:
    """Over every format, shape, dtype and token count that it takes; the oracle multiplies in float64."""
    taken = 0
    for name in FORMATS:
        for shape in SHAPES:
            q = quantized(name, shape)
            exact = q.decode().double()
            for dtype in DTYPES:
                dense = q.decode(dtype)
                for leading in TOKENS:
                    x = activations(leading, shape[1], dtype)
                    if not kernel.takes(q.spec(), x):
                        continue
                    taken += 1
                    y = run(kernel, x, q)
                    assert (y.shape, y.dtype) == ((*leading, shape[0]), dtype)
                    same_dtype = linear(x, dense)
                    error = float((y - same_dtype).abs().max() / same_dtype.abs().max())
                    assert error <= kernel.tolerance, (name, shape, dtype, leading)
                    oracle = x.double() @ exact.T
                    far = float((y.double() - oracle).abs().max() / oracle.abs().max())
                    assert far <= kernel.tolerance + (1e-6 if dtype == torch.float32 else 1e-2)
    if kernel is CODED:
        assert taken == 3 * len(SHAPES) * len(DTYPES) * len(TOKENS)
        return
    everything = len(FORMATS) * len(SHAPES) * len(DTYPES) * len(TOKENS)
    assert taken == everything if kernel in (REFERENCE, DENSE) else (0 < taken < everything) or not works()


BF16, FP32 = torch.bfloat16, torch.float32


@needs_vectors
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "tokens", "expected"),
    [
        ("int4-g64", (32, 256), BF16, 1, INT4),
        ("int4-g32-sym", (32, 256), BF16, FEW_TOKENS, INT4),
        ("int4-g256", (64, 256), BF16, 1, INT4),
        ("int8-row-sym", (33, 208), BF16, 1, INT8),
        ("int8-row-sym", (33, 100), BF16, 1, PACKED),  # torch's kernel would read past the end
        ("int4-g64", (32, 256), BF16, FEW_TOKENS + 1, PACKED),  # many tokens
        ("int4-g64", (32, 256), FP32, 1, PACKED),
        ("int4-g64", (33, 256), BF16, 1, PACKED),  # rows
        ("int4-g64", (32, 224), BF16, 1, PACKED),  # a ragged last group
        ("int4-g96", (32, 192), BF16, 1, PACKED),
        ("int4-g40", (32, 200), BF16, 1, REFERENCE),  # groups that begin within 16 columns
        ("int4-row", (32, 256), BF16, 1, PACKED),
        ("int3-g64", (32, 256), BF16, 1, PACKED),
        ("int4-g64-half", (32, 256), BF16, 1, INT4),
        ("int8-row", (32, 256), BF16, 1, PACKED),  # zero points
        ("int8-row-half", (32, 256), BF16, 1, PACKED),
        ("int8-g64-sym", (32, 256), BF16, 1, PACKED),
        ("nf4", (32, 256), BF16, 1, PACKED),
        ("nf4", (32, 256), torch.float64, 1, REFERENCE),
        ("ternary", (32, 256), FP32, 1, REFERENCE),
        ("coded", (33, 100), BF16, 1, CODED),
        ("coded", (33, 100), FP32, FEW_TOKENS + 1, CODED),
        ("coded", (33, 100), torch.float64, 1, REFERENCE),
    ],
)
def test_auto_chooses_by_spec_dtype_and_tokens(
    name: str, shape: tuple[int, int], dtype: torch.dtype, tokens: int, expected: Kernel
) -> None:
    spec, x = quantized(name, shape).spec(), activations((tokens,), shape[1], dtype)
    assert choose("auto", spec, x) is expected
    assert choose("reference", spec, x) is REFERENCE
    assert choose("dense", spec, x) is DENSE


def test_no_tokens_at_all_go_to_the_reference() -> None:
    q = quantized("int4-g64", (32, 256))
    x = torch.empty(0, 256, dtype=BF16)
    kernel = choose("auto", q.spec(), x)
    assert kernel is REFERENCE
    assert run(kernel, x, q).shape == (0, 32)


def test_a_tree_that_no_kernel_knows_goes_to_the_reference() -> None:
    inner = quantized("int4-g64", (32, 256))
    outliers = Columns((32, 256), torch.tensor([3, 200]), Raw.of(torch.ones(32, 2)))
    q = Sum((32, 256), (inner, outliers))
    x = activations((1,), 256, BF16)
    assert choose("auto", q.spec(), x) is REFERENCE
    expected = inner.decode()
    expected[:, [3, 200]] += 1
    torch.testing.assert_close(REFERENCE.run(x, q), linear(x, expected.to(BF16)))


@needs_vectors
@pytest.mark.parametrize("name", ["int4-g64", "int8-row-sym"])
def test_a_view_with_strides_is_read_right(name: str) -> None:
    q = quantized(name, (32, 256))
    wide = activations((2, 4), 512, BF16)
    x = wide[:, ::2, :256]
    assert not x.is_contiguous()
    kernel = choose("auto", q.spec(), x)
    assert kernel.prepared
    assert torch.equal(run(kernel, x, q), run(kernel, x.contiguous(), q))


@pytest.mark.parametrize("tokens", [1, 20])
def test_coded_weights_lose_nothing_beside_float32(tokens: int) -> None:
    """Inputs of 16 bits and whole sums are as good as float32 products; bfloat16 outputs are rounded once."""
    q = coded((96, 512), 1.5, plain=False)
    x = activations((tokens,), 512, FP32)
    exact = x.double() @ q.decode().double().T
    y = run(CODED, x, q)
    assert float((y - exact).norm() / exact.norm()) < 1e-4
    assert q.decode().abs().max() > 0.1


def test_a_token_of_a_coded_product_does_not_depend_on_the_others() -> None:
    q = coded((96, 512), 1.5, plain=False)
    x = activations((FEW_TOKENS + 12,), 512, BF16)
    together = run(CODED, x, q)
    for i in range(len(x)):
        assert torch.equal(run(CODED, x[i : i + 1], q)[0], together[i])


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RecipeError, match="fastest"):
        choose("fastest", quantized("nf4", (32, 256)).spec(), torch.zeros(1, 256))


def test_what_is_usable_is_listed_with_its_condition() -> None:
    listed = {name: here for name, here, _ in usable()}
    assert listed["reference"]
    assert listed["dense"]
    assert listed["coded"]
    assert listed["packed"]
    assert listed["torch-int4"] == listed["torch-int8"] == works()
