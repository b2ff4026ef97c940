"""Low-rank correction against the singular values that bound it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit.calibration.stats import Gram, Stats
from lowbit.errors import CalibrationError, FormatError, GramError, RecipeError
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import LowRank, Sum
from lowbit.methods.base import Weight, method
from lowbit.methods.gptq import Gptq
from lowbit.methods.lowrank import LowRankCorrection, correction
from lowbit.methods.rtn import Rtn

NOTHING = Stats("layer.in", {})
INT3 = preset("int3-g32")


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(d: int, tokens: int = 400) -> torch.Tensor:
    """Correlated, with the last two never seen."""
    basis = torch.linalg.qr(gaussian(d, d, seed=9))[0]
    x = (gaussian(tokens, d, seed=1) * torch.arange(1, d + 1).float() ** -0.7) @ basis
    x[:, -2:] = 0
    return x


def gram_of(x: torch.Tensor) -> Stats:
    stats = Stats.of("layer.in", {Gram}, x.shape[1])
    stats.update(x)
    return stats


def encode(w: torch.Tensor, stats: Stats = NOTHING, **options: object) -> Sum:
    q = method("lowrank", options)(Weight("layer", w), stats, INT3)
    assert isinstance(q, Sum)
    return q


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (40, 40)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_correction_reaches_the_bound_of_eckart_and_young(shape: tuple[int, int], weighted: bool) -> None:
    """What is left is the sum of the squared singular values after the first r, of dW xᵀ or of dW."""
    dW, x = gaussian(*shape), inputs(shape[1])
    G = (x.T @ x).double().numpy() if weighted else np.eye(shape[1])
    values = np.linalg.svd(dW.double().numpy() @ (x.double().numpy().T if weighted else G), compute_uv=False)
    for rank in (1, 5, min(shape)):
        a, b = correction(dW, torch.tensor(G) if weighted else None, rank)
        left = (dW - a @ b).double().numpy()
        bound = float((values[rank:] ** 2).sum())
        assert np.trace(left @ G @ left.T) == pytest.approx(bound, rel=1e-4, abs=1e-5 * float((values**2).sum()))
        torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["rtn", "gptq"])
def test_output_error_falls_with_rank_and_the_codes_are_the_bases(base: str) -> None:
    w, x = gaussian(32, 64), inputs(64)
    stats = gram_of(x)
    plain = (Rtn(clip=20) if base == "rtn" else Gptq())(Weight("layer", w), stats, INT3)

    def left(values: torch.Tensor) -> float:
        return float((x @ (values - w).T).square().sum())

    errors = [left(plain.decode())]
    for rank in (1, 4, 16):
        q = encode(w, stats, rank=rank, base=base)
        assert torch.equal(q.terms[0].decode(), plain.decode())
        errors.append(left(q.decode()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]
    unweighted = encode(w, stats, rank=4, base=base, weighted=False)
    assert left(unweighted.decode()) > errors[2]
    assert (unweighted.decode() - w).square().sum() < (encode(w, stats, rank=4, base=base).decode() - w).square().sum()


def test_bytes_are_those_of_the_codes_and_two_16_bit_factors() -> None:
    w = gaussian(32, 64)
    q = encode(w, weighted=False, rank=3)
    factors = q.terms[1]
    assert isinstance(factors, LowRank)
    assert factors.nbytes == 2 * 3 * (32 + 64)
    assert q.nbytes == LowRankCorrection(rank=3).nbytes(INT3, (32, 64))


def test_a_weight_without_error_gets_a_correction_of_zero() -> None:
    q = encode(torch.zeros(8, 32), weighted=False, rank=2)
    assert torch.equal(q.decode(), torch.zeros(8, 32))


def test_small_weights_survive_16_bits() -> None:
    """Factors share the magnitude, so that neither falls below float16's normal numbers."""
    w = gaussian(32, 64)
    gains = []
    for scale in (1.0, 1e-3):
        q = encode(w * scale, weighted=False, rank=8)
        left = [float((t - w * scale).square().sum()) for t in (q.decode(), q.terms[0].decode())]
        gains.append(left[0] / left[1])
    assert gains[1] == pytest.approx(gains[0], rel=0.01)


def test_statistics_are_asked_for_where_they_are_used() -> None:
    assert LowRankCorrection(weighted=False).needs == frozenset()
    assert LowRankCorrection().needs == {Gram}
    assert LowRankCorrection(weighted=False, base="gptq").needs == {Gram}
    with pytest.raises(CalibrationError, match=r"layer\.in"):
        encode(gaussian(32, 64))
    bad = inputs(64)
    bad[3, 3] = torch.inf
    with pytest.raises(GramError, match="NaN or infinite"):
        encode(gaussian(32, 64), gram_of(bad))


def test_options_that_mean_nothing_are_refused() -> None:
    for options in ({"rank": 0}, {"base": "awq"}, {"clip": -1}):
        with pytest.raises(RecipeError):
            method("lowrank", options)
    with pytest.raises(FormatError, match=r"layer: rank 33 of a 32 x 64 weight"):
        encode(gaussian(32, 64), weighted=False, rank=33)
