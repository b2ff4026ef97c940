"""Outliers in 16 bit: which are chosen, what they cost, and that they pay."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lowbit.calibration.stats import Gram, Stats
from lowbit.errors import CalibrationError, FormatError, GramError, RecipeError
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Columns, QTensor, Sparse, Sum
from lowbit.methods.base import Weight
from lowbit.methods.gptq import Gptq
from lowbit.methods.outliers import Outliers
from lowbit.methods.rtn import Rtn

NOTHING = Stats("layer.in", {})


def weight(rows: int = 32, columns: int = 128, seed: int = 0) -> Weight:
    return Weight("layer.proj", torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def inputs(d: int, seed: int = 0) -> torch.Tensor:
    """Correlated: covariance with eigenvalues 1/i in a random basis."""
    generator = torch.Generator().manual_seed(seed + 50)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    return (torch.randn(2 * d, d, generator=generator) * torch.arange(1, d + 1).float() ** -0.5) @ basis


def gram_of(x: torch.Tensor) -> Stats:
    stats = Stats.of("layer.in", {Gram}, x.shape[1])
    stats.update(x)
    return stats


def single(q: QTensor) -> Sparse:
    assert isinstance(q, Sum)
    assert isinstance(q.terms[1], Sparse)
    return q.terms[1]


def output_error(q: QTensor, w: Weight, x: torch.Tensor) -> float:
    return float((x @ (q.decode() - w.matrix).t()).square().sum())


# --- which -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seed"), [("int3-g8", 0), ("int3-g8", 1), ("int2-row-sym", 2), ("nf4-g8", 3)])
def test_the_first_is_the_weight_whose_absence_lowers_the_error_most(name: str, seed: int) -> None:
    """Every weight is left out in turn; errors are divided by the diagonal of the damped inverse, taken by numpy."""
    fmt, w, x = preset(name), weight(3, 16, seed), inputs(16, seed)
    H = (x.double().t() @ x.double()).numpy()
    inverse = np.linalg.inv(H + 0.01 * np.mean(np.diag(H)) * np.eye(16))
    cost = torch.from_numpy(1 / np.diag(inverse)).float()

    def error(W: torch.Tensor) -> float:
        return float(((fmt.encode(W, fmt.fit(W)).decode() - W).square() * cost).sum())

    gain = torch.empty(3, 16)
    for i in range(3):
        for j in range(16):
            without = w.matrix.clone()
            without[i, j] = 0
            gain[i, j] = error(w.matrix) - error(without)
    kept = single(Outliers(share=100 / 48, clip=0)(w, gram_of(x), fmt))
    assert kept.decode().nonzero().tolist() == (gain == gain.max()).nonzero().tolist()


def test_magnitude_keeps_the_largest() -> None:
    w = weight()
    kept = single(Outliers(share=2.0, by="magnitude")(w, NOTHING, preset("int3-g64")))
    largest = np.sort(np.abs(w.matrix.numpy()), axis=None)[-round(0.02 * 4096) :]
    assert kept.count == len(largest) == 82
    np.testing.assert_allclose(np.sort(kept.data.abs().numpy()), largest, rtol=1e-3)


def test_proxy_keeps_the_columns_that_vary_most() -> None:
    w, wide = weight(), [5, 40, 99]
    w.matrix[:, wide] *= 8
    w.matrix[:, 60] += 20  # large, but all the same
    q = Outliers(share=100 * 3 / 128, by="proxy")(w, NOTHING, preset("int3-g64"))
    assert isinstance(q, Sum)
    assert isinstance(q.terms[1], Columns)
    assert q.terms[1].index.tolist() == wide
    assert torch.equal(q.decode()[:, wide], w.matrix[:, wide].half().float())


def test_a_channel_that_matters_is_kept_though_its_weights_are_small() -> None:
    """An input 32 times as large behind weights 1/32 of their size: what a norm's gain does in real models."""
    x, w = inputs(128), weight()
    x[:, 17] *= 32
    w.matrix[:, 17] /= 32
    chosen = {}
    for by in ("sensitivity", "magnitude"):
        chosen[by] = single(Outliers(by=by, clip=5)(w, gram_of(x), preset("int3-g64"))).index.tolist().count(17)
    assert chosen["sensitivity"] >= 8  # a third of the column, where chance would take none of 32
    assert chosen["magnitude"] == 0


# --- what it costs, what it gives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["rtn", "gptq"])
@pytest.mark.parametrize("by", ["sensitivity", "magnitude", "proxy"])
@pytest.mark.parametrize("share", [0.0, 0.3, 5.0])
def test_bytes_are_known_beforehand(share: float, by: str, base: str) -> None:
    w, fmt, method = weight(20, 72), preset("int4-g32"), Outliers(share=share, by=by, base=base, clip=2)
    q = method(w, gram_of(inputs(72)), fmt)
    assert q.nbytes == fmt.nbytes((20, 72)) + method.extra_nbytes((20, 72))
    assert isinstance(q, Sum) == (round(share / 100 * (72 if by == "proxy" else 1440)) > 0)


def test_no_budget_is_the_base_alone() -> None:
    x, w, fmt = inputs(128), weight(), preset("int3-g64")
    stats = gram_of(x)
    rtn = fmt.encode(w.matrix, fmt.fit(w.matrix, stats[Gram].mean_square(), 20))
    assert torch.equal(Outliers(share=0.0)(w, stats, fmt).decode(), rtn.decode())
    assert torch.equal(Outliers(share=0.0, base="gptq")(w, stats, fmt).decode(), Gptq()(w, stats, fmt).decode())
    plain = Outliers(share=0.0, by="magnitude", clip=0)
    assert torch.equal(plain(w, NOTHING, fmt).decode(), Rtn()(w, NOTHING, fmt).decode())


def test_what_is_kept_is_exact_and_out_of_the_ranges() -> None:
    w, fmt = weight(), preset("int3-g64")
    where = torch.rand(32, 128, generator=torch.Generator().manual_seed(3)) < 0.01
    plain = w.matrix.masked_fill(where, 0)
    w.matrix[where] = 25.0
    q = Outliers(share=100 * int(where.sum()) / 4096, by="magnitude", clip=0)(w, NOTHING, fmt)
    assert torch.equal(q.decode()[where], w.matrix[where])
    assert torch.equal(q.decode()[~where], fmt.encode(plain, fmt.fit(plain)).decode()[~where])


@pytest.mark.parametrize("name", ["int3-g64", "int2-g64"])
def test_outliers_pay_more_than_smaller_groups_of_the_same_bytes(name: str) -> None:
    """Student-t weights; eight channels 32 times as large, the weights behind them 1/32; 0.8 % against groups of 32."""
    x, w = inputs(512), weight(32, 512)
    tails = torch.randn(6, 32, 512, generator=torch.Generator().manual_seed(9)).square().mean(0).sqrt()
    w = Weight(w.name, w.matrix / tails)
    x[:, 50:450:50] *= 32
    w.matrix[:, 50:450:50] /= 32
    stats, fmt, half = gram_of(x), preset(name), preset(name.replace("64", "32"))
    share = 100 * (half.nbytes((32, 512)) - fmt.nbytes((32, 512)) - 4 * 33) / 4 / w.matrix.numel()
    for base in ("rtn", "gptq"):
        kept, plain = (Outliers(share=share_, base=base, clip=5) for share_ in (share, 0.0))
        few, smaller, wide = kept(w, stats, fmt), plain(w, stats, half), plain(w, stats, fmt)
        assert wide.nbytes < few.nbytes <= smaller.nbytes
        assert output_error(few, w, x) < 0.87 * output_error(smaller, w, x) < output_error(wide, w, x)


def test_gptq_makes_up_for_the_rest() -> None:
    x, w, fmt = inputs(128), weight(), preset("int3-g64")
    errors = {base: output_error(Outliers(base=base, clip=5)(w, gram_of(x), fmt), w, x) for base in ("rtn", "gptq")}
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_arguments_are_left_as_they_were() -> None:
    x, w = inputs(128), weight()
    before = w.matrix.clone()
    for by in ("sensitivity", "magnitude", "proxy"):
        Outliers(by=by, clip=1)(w, gram_of(x), preset("int3-g64"))
    assert torch.equal(w.matrix, before)


def test_given_ranges_are_used_for_the_rest() -> None:
    w, limit = weight(), torch.full((32, 2), 0.35)
    q = Outliers(by="magnitude")(dataclasses.replace(w, ranges=(-limit, limit)), NOTHING, preset("int3-g64-sym"))
    assert isinstance(q, Sum)
    assert float(q.terms[0].decode().abs().max()) < 0.5


# --- refusals --------------------------------------------------------------------------------------------------------


def test_statistics_are_asked_for_where_they_are_used() -> None:
    assert Outliers().needs == Outliers(by="magnitude", base="gptq").needs == {Gram}
    assert Outliers(by="magnitude").needs == Outliers(by="proxy").needs == frozenset()
    with pytest.raises(CalibrationError, match="Gram"):
        Outliers()(weight(), NOTHING, preset("int3-g64"))


def test_an_input_that_never_moved_is_no_obstacle_and_one_that_is_not_finite_is() -> None:
    x, w = inputs(128), weight()
    x[:, 9] = 0
    assert Outliers(clip=0)(w, gram_of(x), preset("int3-g64")).decode().isfinite().all()
    x[:, 9] = torch.inf
    with pytest.raises(GramError, match=r"layer\.proj"):
        Outliers(clip=0)(w, gram_of(x), preset("int3-g64"))
    with pytest.raises(GramError, match="positive definite"):
        Outliers(clip=0, damp=0.0)(w, gram_of(inputs(128)[:20]), preset("int3-g64"))


def test_an_outlier_beyond_float16_is_refused() -> None:
    w = weight()
    w.matrix[3, 4] = 1e6
    with pytest.raises(FormatError, match=r"layer\.proj: a weight of 1e\+06"):
        Outliers(by="magnitude")(w, NOTHING, preset("nf4"))


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"by": "sensitive"}, "sensitivity"), ({"base": "gtpq"}, "gptq"), ({"share": -1.0}, "share"),
     ({"share": 101.0}, "share"), ({"clip": -1}, "clip"), ({"damp": -0.1}, "damp")],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, object], hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        Outliers(**options)
