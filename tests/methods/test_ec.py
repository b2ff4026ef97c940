"""Rounding for the entropy coder: Babai's loop against its definition, rates that are hit, and what they are worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowbit.calibration.stats import Gram, Moments, Stats
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.ec import Entropy
from lowbit.formats.nodes_coded import Coded
from lowbit.formats.presets import preset
from lowbit.methods.base import Weight, method
from lowbit.methods.columns import feedback, lattice
from lowbit.methods.columns.lattice import nearest, nearest_plane, row_gains
from lowbit.methods.columns.rate import bits_of, panels
from lowbit.methods.gptq import Gptq
from lowbit.methods.rtn import Rtn
from lowbit.pipeline.recipe import parse

NOTHING = Stats("w", {})


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, d: int, seed: int = 0) -> torch.Tensor:
    """Correlated, with a spread of sizes that real layers have."""
    scale = torch.arange(1, d + 1).float() ** -0.5
    basis = torch.linalg.qr(normal(d, d, seed=9))[0]
    return (normal(tokens, d, seed=seed) * scale) @ basis * torch.exp2(normal(d, seed=3) / 2)


def stats_of(x: torch.Tensor) -> Stats:
    gram, moments = Gram(x.shape[1]), Moments(x.shape[1])
    gram.update(x)
    moments.update(x)
    return Stats("w", {Gram: gram, Moments: moments})


def error(x: torch.Tensor, w: torch.Tensor, q: torch.Tensor, rows: torch.Tensor | None = None) -> float:
    each = (x @ (q - w).t()).square().sum(0)
    return float(each.sum() if rows is None else each @ rows)


def test_the_loop_is_babais_nearest_plane() -> None:
    x, w = inputs(200, 20), normal(3, 20, seed=1)
    gram = stats_of(x)[Gram]
    order, L = feedback(gram, 0.01, True, "w")
    step = torch.exp2(normal(20, seed=2) / 4) / 2
    found = nearest_plane(w, L, order, step)
    H = gram.sum().double().numpy()
    H += 0.01 * np.diag(H).mean() * np.eye(20)
    for row in range(3):
        rest, chosen = w[row].double().numpy().copy(), {}
        left = list(range(20))
        for column in order.tolist():  # the rest is re-optimised freely after each column is fixed
            chosen[column] = round(rest[column] / float(step[column]))
            left.remove(column)
            if left:
                gap = rest[column] - chosen[column] * float(step[column])
                rest[left] += np.linalg.solve(H[np.ix_(left, left)], H[np.ix_(left, [column])][:, 0]) * gap
        assert [chosen[j] for j in range(20)] == found[row].tolist()


def test_blocks_change_nothing() -> None:
    x, w = inputs(400, 100), normal(5, 100, seed=1)
    order, L = feedback(stats_of(x)[Gram], 0.01, True, "w")
    step = torch.full((100,), 0.3)
    found = nearest_plane(w, L, order, step)
    D = w.t()[order].double()
    N = torch.empty_like(D)
    for j in range(100):
        aim = w.t()[order][j].double() + L[j, :j].double() @ D[:j]
        N[j] = (aim / 0.3).round()
        D[j] -= 0.3 * N[j]
    assert float((found.t()[order] != N).float().mean()) < 0.005  # float64 against float32


def test_the_compiled_loop_chooses_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = inputs(400, 100), normal(300, 100, seed=1)
    order, L = feedback(stats_of(x)[Gram], 0.01, True, "w")
    step = torch.exp2(normal(100, seed=2) / 4) / 3
    compiled = nearest_plane(w, L, order, step)
    monkeypatch.setattr(lattice, "_native_loop", lattice._loop)
    assert torch.equal(nearest_plane(w, L, order, step), compiled)


@pytest.mark.parametrize("bits", [1.2, 3.0, 7.9])
@pytest.mark.parametrize("line", ["gptq", "rtn"])
def test_every_rate_is_hit_from_below(line: str, bits: float) -> None:
    w, fmt = Weight("w", normal(160, 192) * 0.02), preset(f"ec{bits}")
    q = method(line)(w, stats_of(inputs(500, 192)), fmt)
    assert isinstance(q, Coded)
    assert 0.999 * fmt.nbytes((160, 192)) - 32 <= q.nbytes <= fmt.nbytes((160, 192))


def test_half_of_the_error_of_groups_at_fewer_bits() -> None:
    """A3.3: at 4.0 coded bits at most 0.7 of the output error of rtn:int4-g128 at 4.16."""
    x, w = inputs(3000, 256), Weight("w", normal(256, 256, seed=1))
    stats, fresh = stats_of(x), inputs(1000, 256, seed=7)
    groups = Rtn()(w, NOTHING, preset("int4-g128"))
    plain, weighted, looped = (
        Rtn()(w, NOTHING, preset("ec4")), Rtn(weighted=True)(w, stats, preset("ec4")), Gptq()(w, stats, preset("ec4"))
    )  # fmt: skip
    errors = [error(fresh, w.matrix, q.decode()) for q in (groups, plain, weighted, looped)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.9 * errors[1]
    assert errors[3] < 0.9 * errors[2]
    assert all(q.bits_per_weight <= 4.0 < groups.bits_per_weight for q in (plain, weighted, looped))


def test_a_gaussian_is_within_a_third_of_a_bit_of_the_limit() -> None:
    w = Weight("w", normal(512, 256))
    q = Rtn()(w, NOTHING, preset("ec3"))
    distortion = float((q.decode() - w.matrix).square().mean() / w.matrix.square().mean())
    assert 3.0 - math.log2(1 / distortion) / 2 < 0.33  # 0.254 for the scalar quantizer, and the coder's share


def test_rows_that_matter_more_are_finer() -> None:
    x, w = inputs(2000, 128), normal(256, 128, seed=1)
    fisher = torch.exp2(2 * normal(256, seed=5))
    stats = stats_of(x)
    plain = Gptq()(Weight("w", w), stats, preset("ec3")).decode()
    told = Gptq()(Weight("w", w, fisher=fisher), stats, preset("ec3")).decode()
    assert error(x, w, told, fisher) < 0.75 * error(x, w, plain, fisher)
    without = Gptq(fisher=False)(Weight("w", w, fisher=fisher), stats, preset("ec3")).decode()
    assert torch.equal(without, plain)
    gains = row_gains(Weight("w", w, fisher=fisher))
    assert gains is not None
    torch.testing.assert_close((gains[3] / gains[8]).log2(), 0.3 * (fisher[8] / fisher[3]).log2())
    assert row_gains(Weight("w", w, fisher=torch.zeros(256))) is None


def test_dead_rows_columns_and_weights() -> None:
    x = inputs(300, 64)
    x[:, 5] = 0
    w = normal(96, 64)
    w[3] = 0
    q = Gptq()(Weight("w", w, fisher=torch.zeros(96)), stats_of(x), preset("ec3"))
    assert torch.isfinite(q.decode()).all()
    assert not q.decode()[3].any()
    empty = Gptq()(Weight("w", torch.zeros(96, 64)), stats_of(x), preset("ec3"))
    assert not empty.decode().any()


def test_numbers_of_any_size() -> None:
    w = normal(4, 70)
    w[2, 3] = 1e6
    found = nearest(w, torch.full((70,), 0.01))
    assert int(found[2, 3]) == 32767
    assert found.dtype == torch.int16


def test_too_small_a_matrix_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot be coded in"):
        Rtn()(Weight("tiny", normal(4, 8)), NOTHING, preset("ec1"))


def test_bits_of_panels_are_their_entropy() -> None:
    narrow, wide = (normal(300, 128) * 0.6).round(), (normal(300, 64, seed=1) * 9).round()
    both = torch.cat([narrow, wide], dim=1).to(torch.int16)
    expected = 0.0
    for part in (both[:, :64], both[:, 64:128], both[:, 128:]):
        counts = np.unique(part.numpy(), return_counts=True)[1]
        expected -= float((counts * np.log2(counts / counts.sum())).sum())
    assert bits_of(both) == pytest.approx(expected / both.numel())
    assert panels(both) == [128, 64]
    assert panels(both[:, :100]) == [100]


def test_methods_without_it_say_what_has_it() -> None:
    for line in ("gptq:ec2.5", "rtn:ec4,weighted=true", "tune:ec3,steps=0,ridge=0.1", "rotate+tune:ec3,steps=0"):
        treatment = parse(line).treatment("any")
        assert not isinstance(treatment, str)
        assert isinstance(treatment.format, Entropy)
    with pytest.raises(RecipeError, match=r"hqq cannot use ec3(.|\n)*Try: gptq:ec3 or rtn:ec3, or tune:ec3,steps=0"):
        parse("hqq:ec3")
    with pytest.raises(RecipeError, match="tune cannot use ec3 with these options"):
        parse("tune:ec3")
