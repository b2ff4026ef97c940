"""GPTQ against its textbook form, its published gains, and its own promises."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibration.stats import Gram, Moments, Stats
from lowbit.errors import CalibrationError, FormatError, GramError, LowbitError, RecipeError
from lowbit.formats.format import Format, Params
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Affine, Lookup, QTensor
from lowbit.methods.base import Weight
from lowbit.methods.gptq import Gptq
from lowbit.methods.rtn import Rtn

FORMATS = ["int4-g16", "int3-row", "nf4", "fp8-e4m3", "mxfp4", "ternary"]


def gram_of(x: torch.Tensor) -> Stats:
    gram = Gram(x.shape[1])
    gram.update(x)
    return Stats("layer.in", {Gram: gram})


def correlated(
    tokens: int, d: int, seed: int = 0, outliers: int = 0, held_out: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and fresh ones: covariance with eigenvalues 1/i in a random basis, some channels 40 times as large."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1).float() ** -0.5
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    x = (torch.randn(tokens + held_out, d, generator=generator) * scale) @ basis
    x[:, torch.randperm(d, generator=generator)[:outliers]] *= 40
    return x[:tokens], x[tokens:]


def weight(rows: int, d: int, seed: int = 0) -> Weight:
    return Weight("model.layers.3.q_proj", torch.randn(rows, d, generator=torch.Generator().manual_seed(seed + 100)))


def output_error(x: torch.Tensor, w: Weight, q: QTensor) -> float:
    return float((x @ (q.decode() - w.matrix).t()).square().sum())


def codes_of(q: QTensor) -> torch.Tensor:
    assert isinstance(q, Affine | Lookup)
    return q.codes.unpack()


# --- the textbook ----------------------------------------------------------------------------------------------------


def textbook(w: torch.Tensor, H: torch.Tensor, fmt: Format, params: Params | None, order: list[int]) -> torch.Tensor:
    """Optimal brain quantization in a fixed order: after each column the remaining inverse is computed from scratch.

    In float64. Without ``params``, a group's grid is fitted when its first column is reached.
    """
    rest, H = w.double().clone(), H.double()
    codes = torch.empty_like(rest)
    group = fmt.block.size[0] if fmt.block.kind == "group" else w.shape[1]
    for position, j in enumerate(order):
        left = order[position:]
        inverse = torch.linalg.inv(H[left][:, left])
        if params is None and j % group == 0:
            fitted = fmt.fit(rest[:, j : j + group].float())
        now, b = (params, j // group) if params is not None else (fitted, 0)
        zero = None if now.zero is None else now.zero[:, b].double()
        snapped = fmt.snap(rest[:, j], now.step[:, b].double(), zero)
        codes[:, j] = snapped.codes.double()
        error = (rest[:, j] - snapped.values.double()) / inverse[0, 0]
        rest[:, left[1:]] -= error.unsqueeze(1) * inverse[0, 1:]
    return codes.to(torch.uint8)


def damped(x: torch.Tensor, damp: float) -> torch.Tensor:
    H = x.double().t() @ x.double()
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", [*FORMATS, "int2-g16-sym", "int3-g20", "int4-tensor"])
def test_codes_are_the_textbooks(name: str, act_order: bool) -> None:
    fmt, w = preset(name), weight(24, 48)
    x, _ = correlated(300, 48)
    H = damped(x, 0.01)
    order = H.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(48))
    params = fmt.fit(w.matrix)
    expected = textbook(w.matrix, H, fmt, params, order)
    got = codes_of(Gptq(act_order=act_order, clip=0)(w, gram_of(x), fmt))
    assert torch.equal(got, expected)
    assert not torch.equal(got, codes_of(fmt.encode(w.matrix, params)))


@pytest.mark.parametrize("name", ["int4-g16", "int3-g20", "int2-g16-sym"])
def test_dynamic_groups_are_fitted_to_weights_with_all_earlier_errors_applied(name: str) -> None:
    fmt, w = preset(name), weight(24, 48)
    x, _ = correlated(300, 48)
    got = Gptq(act_order=False, static_groups=False, clip=0)(w, gram_of(x), fmt)
    assert torch.equal(codes_of(got), textbook(w.matrix, damped(x, 0.01), fmt, None, list(range(48))))


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"act_order": False, "static_groups": False}], ids=str)
@pytest.mark.parametrize("name", ["int3-g64", "int4-row", "nf4"])
def test_the_block_size_changes_no_code(name: str, options: dict[str, bool]) -> None:
    x, _ = correlated(800, 200)
    stats, w = gram_of(x), weight(32, 200)
    first, *others = (Gptq(block=block, **options)(w, stats, preset(name)) for block in (1, 32, 128))
    for other in others:
        assert torch.equal(codes_of(other), codes_of(first))
        # A dynamic float32 scale is fitted to weights whose errors were added up in another order.
        torch.testing.assert_close(other.decode(), first.decode(), rtol=1e-5, atol=1e-6)


# --- published gains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_output_error_is_half_of_round_to_nearest(bits: int) -> None:
    """The published .46 +- .05 at every width is the error on fresh inputs after 2048 tokens of calibration.

    On the calibration tokens themselves it is lower (.37), and with more of them both come to .43.
    """
    x, fresh = correlated(2048, 512, held_out=2048)
    stats, w, fmt = gram_of(x), weight(96, 512), preset(f"int{bits}-g128")
    gptq, rtn = Gptq(act_order=False, clip=0)(w, stats, fmt), Rtn()(w, stats, fmt)
    assert output_error(fresh, w, gptq) / output_error(fresh, w, rtn) == pytest.approx(0.46, abs=0.05)
    assert output_error(x, w, gptq) < output_error(x, w, rtn) * 0.42
    weight_error = (gptq.decode() - w.matrix).square().sum() / (rtn.decode() - w.matrix).square().sum()
    assert float(weight_error) == pytest.approx(1.4, abs=0.1)  # it pays in weights what it gains in outputs


def test_act_order_helps_where_channels_stand_out() -> None:
    ratios = []
    for seed in range(3):
        x, fresh = correlated(2048, 512, seed, outliers=8, held_out=1024)
        stats, w, fmt = gram_of(x), weight(32, 512), preset("int3-g128")
        ordered, plain = (Gptq(act_order=order, clip=0)(w, stats, fmt) for order in (True, False))
        ratios.append(output_error(fresh, w, ordered) / output_error(fresh, w, plain))
    assert max(ratios) < 1
    assert sum(ratios) / 3 < 0.9


@pytest.mark.parametrize("name", [*FORMATS, "int2-g64", "nf4-dq", "nvfp4"])
def test_never_worse_than_round_to_nearest_on_the_same_grid(name: str) -> None:
    x, _ = correlated(600, 150)
    stats, w, fmt = gram_of(x), weight(32, 150), preset(name)
    gptq, rtn = Gptq(clip=0)(w, stats, fmt), Rtn()(w, stats, fmt)
    assert output_error(x, w, gptq) < 0.8 * output_error(x, w, rtn)
    assert gptq.spec() == rtn.spec()
    assert gptq.nbytes == fmt.nbytes((32, 150))


def test_searched_grids_help() -> None:
    x, fresh = correlated(1024, 256, outliers=4, held_out=1024)
    stats, w, fmt = gram_of(x), weight(64, 256), preset("int3-g64")
    assert output_error(fresh, w, Gptq()(w, stats, fmt)) < output_error(fresh, w, Gptq(clip=0)(w, stats, fmt))


# --- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
def test_a_dead_input_is_rounded_alone_and_touches_no_other(act_order: bool) -> None:
    x, _ = correlated(300, 64)
    x[:, [5, 40]] = 0
    w, fmt = weight(16, 64), preset("int4-g16")
    w.matrix[:, [5, 40]] *= 0.1  # inside its group's range, so that the grid stays
    other = Weight(w.name, w.matrix.clone())
    other.matrix[:, 5] *= -1
    got, again = (codes_of(Gptq(act_order=act_order, clip=0)(v, gram_of(x), fmt)) for v in (w, other))
    live = [j for j in range(64) if j not in (5, 40)]
    rtn = codes_of(Rtn()(w, Stats("x", {}), fmt))
    assert torch.equal(got[:, [5, 40]], rtn[:, [5, 40]])
    assert torch.equal(fmt.fit(w.matrix).step, fmt.fit(other.matrix).step)
    assert torch.equal(got[:, live], again[:, live])


def test_a_gram_without_full_rank_names_the_layer_and_its_remedy_works() -> None:
    x, _ = correlated(20, 64)
    w, fmt, stats = weight(8, 64), preset("int4-g32"), gram_of(x)
    with pytest.raises(GramError, match="not positive definite") as caught:
        Gptq(damp=0.0)(w, stats, fmt)
    assert caught.value.where == w.name
    assert "20 tokens" in caught.value.what
    option, _, value = caught.value.fix.partition(",")[0].partition("=")
    q = Gptq(**{option: float(value)})(w, stats, fmt)
    assert output_error(x, w, q) < output_error(x, w, Rtn()(w, stats, fmt))


def test_inputs_that_are_not_finite_are_named() -> None:
    x, _ = correlated(100, 32)
    x[3, 7] = float("inf")
    with pytest.raises(GramError, match="NaN or infinite") as caught:
        Gptq()(weight(8, 32), gram_of(x), preset("int4-g32"))
    assert caught.value.where == "model.layers.3.q_proj"


def test_linears_that_share_an_input_share_one_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, factor = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda H: calls.append(len(H)) or factor(H))
    x, _ = correlated(300, 64)
    stats = gram_of(x)
    for seed in range(3):
        Gptq()(weight(8, 64, seed), stats, preset("int4-g32"))
    assert calls == [64]
    Gptq(damp=0.1)(weight(8, 64), stats, preset("int4-g32"))
    Gptq(act_order=False)(weight(8, 64), stats, preset("int4-g32"))
    assert calls == [64] * 3
    stats[Gram].update(x)  # other statistics, another factor
    Gptq()(weight(8, 64), stats, preset("int4-g32"))
    assert calls == [64] * 4


def test_arguments_are_left_as_they_were() -> None:
    x, _ = correlated(300, 64)
    stats, w = gram_of(x), weight(8, 64)
    before, gram = w.matrix.clone(), stats[Gram].sum()
    results = [Gptq(**o)(w, stats, preset("int4-g32")) for o in ({}, {"act_order": False, "static_groups": False})]
    assert torch.equal(w.matrix, before)
    assert torch.equal(stats[Gram].sum(), gram)
    assert all(
        torch.equal(q.decode(), Gptq(**o)(w, stats, preset("int4-g32")).decode())
        for q, o in zip(results, ({}, {"act_order": False, "static_groups": False}), strict=True)
    )


def test_one_row_and_one_column() -> None:
    x, _ = correlated(50, 7)
    q = Gptq()(weight(1, 7), gram_of(x), preset("int4-g128"))
    assert q.shape == (1, 7)
    one = Gptq()(
        weight(5, 1), gram_of(torch.randn(9, 1, generator=torch.Generator().manual_seed(0))), preset("int8-row")
    )
    torch.testing.assert_close(one.decode(), weight(5, 1).matrix, rtol=1e-2, atol=0)


def test_act_order_with_dynamic_groups_is_refused() -> None:
    with pytest.raises(RecipeError, match="index of groups") as caught:
        Gptq(act_order=True, static_groups=False)
    assert "static_groups=true" in caught.value.fix


@pytest.mark.parametrize("options", [{"damp": -0.1}, {"block": 0}, {"clip": -1}, {"damp": float("nan")}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        Gptq(**options)


def test_formats_that_it_cannot_take_are_refused() -> None:
    x, _ = correlated(100, 64)
    tiles = Format(
        "tiles", preset("int4-g64").grid, preset("int4-g64").block.parse("tile:4:4"), preset("int4-g64").scale
    )
    with pytest.raises(FormatError, match="blocks along rows"):
        Gptq()(weight(8, 64), gram_of(x), tiles)
    with pytest.raises(FormatError, match="coded"):
        Gptq(act_order=False, static_groups=False)(weight(8, 64), gram_of(x), preset("nvfp4"))


def test_statistics_must_have_been_collected() -> None:
    assert Gptq().needs == {Gram}
    for stats in (Stats("x", {}), Stats("x", {Gram: Gram(64)}), Stats("x", {Moments: Moments(64)})):
        with pytest.raises(CalibrationError):
            Gptq()(weight(8, 64), stats, preset("int4-g32"))
    assert issubclass(CalibrationError, LowbitError)
