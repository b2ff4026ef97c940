"""The column loop: its factor against its definition, and the GPU's kernel against the loop in torch.

Without a GPU the kernel is tested in Triton's interpreter: with Triton, a numpy before 2.4 and TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from lowbit.calibration.stats import Gram
from lowbit.formats.format import Format, Stored
from lowbit.formats.presets import preset
from lowbit.methods import columns
from lowbit.methods.columns import feedback, round_columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ["int4-g16", "int3-row", "int4-g20", "int2-g16-sym", "int4-tensor", "nf4", "fp4", "fp8-e4m3", "mxfp4",
           "ternary", "nvfp4", "int8-row"]  # fmt: skip


def gram_of(d: int, tokens: int = 400) -> Gram:
    """Correlated inputs, some of them large, one never seen."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d, generator=generator) @ torch.randn(d, d, generator=generator)
    x[:, 3] *= 30
    x[:, 5] = 0
    gram = Gram(d, DEVICE)
    gram.update(x.to(DEVICE))
    return gram


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``round_columns`` use the kernel, whatever the device."""
    pytest.importorskip("triton")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    monkeypatch.setattr(columns, "_has_kernel", lambda *_: True)


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_makes_h_diagonal(act_order: bool) -> None:
    gram = gram_of(40)
    order, L = feedback(gram, 0.01, act_order, "layer")
    H = gram.sum().double()
    H[5, 5] = 1.0  # the input that was never seen
    H.diagonal().add_(0.01 * H.diagonal().mean())
    H = H[order][:, order]
    assert not L.triu(1).any()
    stored = L.diagonal().double()
    L.diagonal().fill_(1.0)
    inverse = torch.linalg.inv(L.double())
    D = inverse.t() @ H @ inverse
    off = D - torch.diag(D.diagonal())
    assert float(off.abs().max()) < 1e-5 * float(D.diagonal().max())
    assert bool((stored > 0).all())
    torch.testing.assert_close(stored, D.diagonal(), rtol=1e-4, atol=0)


def test_columns_go_by_falling_diagonal_and_a_dead_one_counts_as_one() -> None:
    gram = gram_of(40)
    diagonal = gram.sum().diagonal().clone()
    diagonal[5] = 1.0
    order, _ = feedback(gram, 0.01, True, "layer")
    assert torch.equal(diagonal[order], diagonal.sort(descending=True).values)
    natural, _ = feedback(gram, 0.01, False, "layer")
    assert natural.tolist() == list(range(40))


def test_errors_are_those_of_the_codes() -> None:
    fmt, gram = preset("int3-g16"), gram_of(48)
    W = torch.randn(12, 48, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    order, L = feedback(gram, 0.01, True, "layer")
    params = fmt.fit(W)
    codes, D = round_columns(W, L, order, fmt, params, 8)
    torch.testing.assert_close(D.t(), (W - fmt.assemble(codes, params).decode())[:, order], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [40, 1])
@pytest.mark.parametrize("fmt", [
    *map(preset, FORMATS), dataclasses.replace(preset("int4-g16"), name="fractions", zero=Stored(torch.float16)),
], ids=lambda f: f.name)  # fmt: skip
def test_the_kernel_gives_the_codes_of_the_loop(fmt: Format, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    d, block = 72, 32  # ragged rows, ragged columns
    W = torch.randn(rows, d, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    gram = gram_of(d)
    order, L = feedback(gram, 0.01, True, "layer")
    params = fmt.fit(W, gram.mean_square(), 8)
    fast, errors = round_columns(W, L, order, fmt, params, block)
    monkeypatch.setattr(columns, "_has_kernel", lambda *_: False)
    exact, expected = round_columns(W, L, order, fmt, params, block)
    assert float((fast != exact).float().mean()) < 1e-3  # ties of floats added up in another order
    H = gram.sum()[order][:, order].double()
    lost, least = (float(((D.t().double() @ H) * D.t().double()).sum()) for D in (errors, expected))
    assert lost == pytest.approx(least, rel=1e-3)
    assert not torch.equal(exact, fmt.encode(W, params).codes.unpack())  # type: ignore[attr-defined]
