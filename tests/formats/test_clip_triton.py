"""Kernels of the clip search and of AWQ's rounding against torch; without a GPU, in Triton's interpreter.

TRITON_INTERPRET=1 asks for the latter.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from lowbit.formats.clip import Importance, search
from lowbit.formats.format import Format, Stored, _cost, _factors
from lowbit.formats.presets import preset

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ["int4-g16", "int3-row", "int4-g20", "int2-g16-sym", "int4-tensor", "nf4", "fp4", "ternary"]
FRACTIONS = dataclasses.replace(preset("int4-g16"), name="fractions", zero=Stored(torch.float16))
needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)


def weights() -> torch.Tensor:
    """An outlier, a row of one sign, a row of zeros."""
    w = torch.randn(40, 72, generator=torch.Generator().manual_seed(0))
    w[0, 0] = 30.0
    w[1] = w[1].abs()
    w[2] = 0.0
    return w


@needs_kernels
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fmt", [*map(preset, FORMATS), FRACTIONS], ids=lambda f: f.name)
def test_ranges_are_those_of_the_search(fmt: Format, weighted: bool) -> None:
    from lowbit.formats import clip_triton

    w = weights()
    importance = torch.rand(72, generator=torch.Generator().manual_seed(1)) if weighted else None
    blocks = fmt.block.split(w).to(DEVICE)
    diagonal = Importance.of(importance, fmt.block, w).diagonal
    low, high = clip_triton.search(
        fmt, blocks, blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0),
        None if diagonal is None else diagonal.to(DEVICE), _factors(fmt, max(20, fmt.least_clip_steps)),
    )  # fmt: skip
    got, expected = fmt.fit(w, ranges=(low.cpu(), high.cpu())), fmt.fit(w, importance, 20)
    assert float((got.step != expected.step).float().mean()) < 0.01  # equal errors, up to rounding
    assert not torch.equal(expected.step, fmt.fit(w, importance).step) or fmt.least_clip_steps


@needs_kernels
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("fmt", [*map(preset, ["int2-g20", "int3-g16-sym", "fp4"]), FRACTIONS], ids=lambda f: f.name)
def test_ranges_by_output_error_are_those_of_the_search(fmt: Format, apart: bool) -> None:
    from lowbit.formats import clip_triton

    w, n = weights(), 10
    x = torch.randn(100, 72, generator=torch.Generator().manual_seed(1)) @ torch.rand(72, 72)
    importance = Importance.of(x.t() @ x, fmt.block, w)
    blocks, factors = fmt.block.split(w), _factors(fmt, n)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)

    cost = _cost(fmt, blocks, importance, None, slice(0, 40))
    expected = search(low, high, factors, lambda _: cost, iter([slice(0, 40)]), apart)
    assert importance.gram is not None
    got = clip_triton.search_by_gram(
        fmt, blocks.to(DEVICE), low.to(DEVICE), high.to(DEVICE), importance.gram.to(DEVICE), factors, apart
    )
    ours, least = (cost(a.cpu(), b.cpu()) for a, b in (got, expected))
    assert float((ours - least).abs().sum()) <= 1e-3 * float(least.sum())
    assert float(least.sum()) < 0.9 * float(cost(low, high).sum())


def test_what_one_direction_holds_is_taken_out() -> None:
    from lowbit.formats import clip_triton

    mean = 3 * torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    x = mean + torch.randn(2, 500, 16, generator=torch.Generator().manual_seed(1))
    gram = torch.cat([x.mT @ x, torch.zeros(1, 16, 16)])
    rest, v = clip_triton._deflated(gram)
    torch.testing.assert_close(rest + v[:, :, None] * v[:, None, :], gram)
    left, whole = torch.linalg.eigvalsh(rest), torch.linalg.eigvalsh(gram)
    assert float(left.min()) > -1e-5 * float(whole.max())
    assert torch.allclose(left[:, -1], whole[:, -2], rtol=1e-3, atol=1e-2)
    assert (whole[:2, -1] > 20 * left[:2, -1]).all()


@needs_kernels
@pytest.mark.parametrize("name", ["int4-g16", "int3-g20-sym", "int2-row", "nf4", "int4-g32-z16"])
def test_what_rounding_costs_scaled_columns(name: str) -> None:
    from lowbit.formats import snap_triton

    fmt, w = preset(name), weights()
    s = torch.rand(72, generator=torch.Generator().manual_seed(2)) + 0.5
    scaled = w * s
    expected = fmt.encode(scaled, fmt.fit(scaled)).decode() / s - w
    got = snap_triton.scaled_error(w.to(DEVICE), s.to(DEVICE), fmt).cpu()
    differs = (got - expected).abs() > 1e-5 * w.abs().amax()
    assert float(differs.float().mean()) < 2e-3  # ties, up to rounding
    assert float(expected.square().mean()) > 1e-5
