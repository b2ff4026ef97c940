"""QLLM: split channels are exact, merged ones cost little, thresholds and corrections only ever help (A17.8)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from tiny import family_model
from torch import nn
from views import OneNorm, stats_of, with_outliers

from lowbit.calibration.stats import Gram
from lowbit.errors import RecipeError
from lowbit.formats.activation import activation
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import Gathered, QTensor
from lowbit.methods.base import SetEntry, SetWeight, method
from lowbit.methods.qllm import (
    Columns,
    Linear,
    Qllm,
    attention_out,
    corrected,
    disassembled,
    gathered,
    matched,
    merging_cost,
    step,
    thetas,
)
from lowbit.models.source import of_model
from lowbit.pipeline.recipe import parse
from lowbit.pipeline.walk import Finished, walk

A4 = activation("int4-token")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int) -> torch.Tensor:
    """Inputs with a mean and eigenvalues ~ 1/i, as real ones have."""
    basis = torch.linalg.qr(normal(width, width, seed=7)).Q
    return normal(tokens, width, seed=8) / torch.arange(1, width + 1).sqrt() @ basis.t() * 8 + normal(width, seed=9)


def unchanged(width: int) -> Columns:
    return gathered(torch.ones(width, dtype=torch.int64))


def relative(found: torch.Tensor, target: torch.Tensor) -> float:
    return float((found - target).square().sum() / target.square().sum())


# --- columns ---------------------------------------------------------------------------------------------------------


def test_disassembly_is_exact_and_rounds_well_and_assembly_keeps_most_of_it() -> None:
    """A17.8: error of 4-bit inputs .66 -> .014 with 23 % more columns, .17 with as many as before."""
    d = 512
    x, outliers = with_outliers(normal(1024, d), 10, 16.0)
    W = normal(96, d, seed=1) / d**0.5
    W[:, outliers] /= 16
    absmax = x.abs().amax(0)
    times = disassembled(absmax, float(torch.quantile(absmax, 0.98)))
    split = gathered(times)
    target = x @ W.t()
    exact = split.enter(x.double()) @ split.weight(W.double()).t() - x.double() @ W.double().t()
    assert float(exact.abs().max()) < 1e-13
    assert 1.2 < len(split.index) / d < 1.3
    assert float(split.enter(x).abs().max()) <= float(torch.quantile(absmax, 0.98)) * (1 + 1e-6)

    cost = merging_cost(stats_of(x, "w")["w"][Gram], W)
    pairs = matched(cost, torch.nonzero(times == 1).flatten(), len(split.index) - d)
    assert pairs is not None
    merged = gathered(times, pairs)
    assert len(merged.index) == d
    plain, disassembly, assembly = (
        relative(A4.round(c.enter(x)) @ c.weight(W).t(), target) for c in (unchanged(d), split, merged)
    )
    assert plain > 0.6
    assert disassembly < 0.02
    assert plain - assembly > (plain - disassembly) / 2


def test_columns_are_one_sparse_matrix() -> None:
    """Against the definition: rows of S pick and scale, a weight meets as many columns as its channel has."""
    times = torch.tensor([1, 3, 1, 1, 2, 1])
    columns = gathered(times, torch.tensor([[0, 3], [5, 2]]))
    assert columns.index.tolist() == [[0, 3], [1, 1], [1, 1], [1, 1], [4, 4], [4, 4], [5, 2]]
    S = torch.zeros(7, 6)
    for c, ((i, j), (a, b)) in enumerate(zip(columns.index.tolist(), columns.scale.tolist(), strict=True)):
        S[c, i] += a
        S[c, j] += b
    torch.testing.assert_close(S.sum(1), torch.tensor([1, 1 / 3, 1 / 3, 1 / 3, 0.5, 0.5, 1]))
    x, W = normal(4, 6), normal(3, 6, seed=1)
    torch.testing.assert_close(columns.enter(x), x @ S.t())
    torch.testing.assert_close(columns.weight(W), W @ (S.t() != 0).float())
    q = columns.wrap(preset("int8-row-sym").encode(columns.weight(W), preset("int8-row-sym").fit(columns.weight(W))))
    assert isinstance(q, Gathered)
    assert not q.problem()
    torch.testing.assert_close(q.enter(x), columns.enter(x))
    torch.testing.assert_close(x @ q.decode().t(), columns.enter(x) @ q.inner.decode().t())
    again = columns.wrap(q.inner)
    assert isinstance(again, Gathered)
    assert again.index.data_ptr() != q.index.data_ptr()  # linears that share an entry share no tensor
    assert columns.note == "6 channels in 7 columns: 2 split into 5, 2 pairs merged"


def test_the_cost_of_a_merge_is_the_error_it_makes() -> None:
    x, W, V = correlated(300, 8), normal(5, 8, seed=1), normal(3, 8, seed=2)
    cost = merging_cost(stats_of(x, "w")["w"][Gram], torch.cat([W, V]))
    for i, j in itertools.combinations(range(8), 2):
        columns = gathered(torch.ones(8, dtype=torch.int64), torch.tensor([[i, j]]))
        errors = [columns.enter(x) @ columns.weight(M).t() - x @ M.t() for M in (W, V)]
        made = sum(float(e.square().sum()) for e in errors) / 300
        assert float(cost[i, j]) == pytest.approx(made, rel=1e-3)


@pytest.mark.parametrize("m", [2, 5, 12, 40])
def test_pairs_are_those_of_greedy_matching(m: int) -> None:
    """All of them, when all are wanted; of fewer, the cheapest is the cheapest of all."""
    free = torch.arange(0, 2 * m, 2)
    cost = normal(2 * m, 2 * m).square()
    by_cost = sorted(itertools.product(free[0::2].tolist(), free[1::2].tolist()), key=lambda pair: float(cost[pair]))
    greedy: list[tuple[int, int]] = []
    for pair in by_cost:
        if not {*pair} & {channel for taken in greedy for channel in taken}:
            greedy.append(pair)
    for pairs in (1, m // 2):
        found = matched(cost, free, pairs)
        assert found is not None
        assert [tuple(pair) for pair in found.tolist()] == greedy[:pairs]
    assert matched(cost, free, m // 2 + 1) is None


def test_the_grid_of_thetas_falls_from_the_largest_channel_to_the_median() -> None:
    absmax = torch.tensor([64.0, 1.0, 1.0, 1.0, 2.0])
    grid = thetas(absmax)
    assert len(grid) == 12
    assert all(64 > a > b for a, b in itertools.pairwise(grid))
    assert grid[-1] == pytest.approx(1.0)
    assert disassembled(absmax, 4.0).tolist() == [16, 1, 1, 1, 1]
    assert thetas(torch.zeros(5)) == []


# --- the transform ---------------------------------------------------------------------------------------------------


def block(x: torch.Tensor, outliers: torch.Tensor, rounding: str | None = "int4-token") -> OneNorm:
    weights = {name: normal(24, x.shape[1], seed=i) / 8 for i, name in enumerate(("up", "gate"))}
    for W in weights.values():
        W[:, outliers] /= 16
    return OneNorm(weights, "int4-row-sym", rounding)


def test_outliers_are_split_only_where_they_hurt() -> None:
    x, outliers = with_outliers(normal(400, 128), 3, 16.0)
    view, stats = block(x, outliers), stats_of(x, "block.up", "block.gate")
    edits = list(Qllm(rank=0)(view, stats))
    assert len(edits) == 1
    assert isinstance(edits[0], SetEntry)
    assert edits[0].sites == ("block.up", "block.gate")
    columns = edits[0].entry
    assert isinstance(columns, Columns)
    assert len(columns.index) == 128
    W = view.weight("block.up")
    entered = A4.round(columns.enter(x)) @ columns.weight(W).t()
    assert relative(entered, x @ W.t()) < 0.5 * relative(A4.round(x) @ W.t(), x @ W.t())
    (wider,) = Qllm(rank=0, assemble=False)(view, stats)
    assert isinstance(wider, SetEntry)
    assert isinstance(wider.entry, Columns)
    assert 128 < len(wider.entry.index) <= 256
    assert set(wider.entry.index[:, 0][wider.entry.scale[:, 0] < 1].tolist()) >= set(outliers.tolist())
    assert list(Qllm()(block(x, outliers, None), stats)) == []  # inputs that are not rounded


@pytest.mark.parametrize("rounding", ["int8-token", "int4-tensor-static", "int4-g32"])
def test_a_split_is_made_only_if_it_is_better_on_the_sample(rounding: str) -> None:
    for k in (1.0, 4.0):
        x, outliers = with_outliers(normal(200, 64), 2, k)
        view = block(x, outliers, rounding)
        for edit in Qllm(rank=0)(view, stats_of(x, "block.up", "block.gate")):
            assert isinstance(edit, SetEntry)
            assert isinstance(edit.entry, Columns)
            errors = {"split": 0.0, "plain": 0.0}
            for site in edit.sites:
                linear = Linear(site, view.weight(site), preset("int4-row-sym"), activation(rounding))
                for name, columns in (("split", edit.entry), ("plain", unchanged(64))):
                    errors[name] += linear.error(columns, x, x @ linear.W.t())
            assert errors["split"] < errors["plain"]


@pytest.mark.parametrize("fmt", ["int4-row-sym", "int3-row-sym", "int2-row", "int4-g32"])
def test_a_folded_correction_brings_outputs_closer(fmt: str) -> None:
    x, W = correlated(2000, 192), normal(64, 192, seed=3) / 8
    linear, stats = Linear("w", W, preset(fmt), A4), stats_of(x[:1500], "w")["w"]
    folded = corrected(linear, unchanged(192), stats, 4)
    assert folded is not None
    values = torch.linalg.svdvals(folded - W)
    assert float(values[4]) < 1e-4 * float(values[0])  # at most four directions
    fresh = x[1500:]
    before = linear.error(unchanged(192), fresh, fresh @ W.t())
    after = Linear("w", folded, preset(fmt), A4).error(unchanged(192), fresh, fresh @ W.t())
    assert after < 0.95 * before
    edits = list(Qllm()(OneNorm({"w": W}, fmt, "int4-token"), stats_of(x[:1500], "block.w")))
    assert isinstance(edits[-1], SetWeight)


def test_a_correction_makes_up_for_rounded_inputs_too() -> None:
    """Weights of 8 bits have nothing to correct; against noise in the inputs the best weight is another."""
    x, W = correlated(2000, 96), normal(64, 96, seed=3) / 8
    stats, fresh = stats_of(x[:1500], "w")["w"], x[1500:]
    noisy, clean = (Linear("w", W, preset("int8-row-sym"), activation(f"int{bits}-token")) for bits in (2, 8))
    folded = corrected(noisy, unchanged(96), stats, 8)
    assert folded is not None
    target = fresh @ W.t()
    assert replace(noisy, W=folded).error(unchanged(96), fresh, target) < 0.98 * noisy.error(
        unchanged(96), fresh, target
    )
    slight = corrected(clean, unchanged(96), stats, 8)
    assert slight is None or float((slight - W).norm()) < 0.1 * float((folded - W).norm())


def test_a_correction_sees_split_and_merged_columns_as_what_they_are() -> None:
    x, outliers = with_outliers(correlated(2000, 192), 2, 6.0)
    W = normal(64, 192, seed=3) / 8
    W[:, outliers] /= 6
    times = torch.ones(192, dtype=torch.int64)
    times[outliers] = 5
    columns = gathered(times, torch.nonzero(times == 1).flatten()[:16].view(8, 2))
    linear, stats = Linear("w", W, preset("int3-row-sym"), A4), stats_of(x[:1500], "w")["w"]
    folded = corrected(linear, columns, stats, 4)
    assert folded is not None
    fresh = x[1500:]
    before = linear.error(columns, fresh, fresh @ W.t())
    assert Linear("w", folded, preset("int3-row-sym"), A4).error(columns, fresh, fresh @ W.t()) < 0.8 * before


def test_a_step_goes_down_as_far_as_it_can_in_the_worst_direction() -> None:
    dW, x = normal(20, 12), correlated(100, 12)
    H = x.t() @ x / 100
    E = dW.double().numpy() @ scipy.linalg.sqrtm(H.double().numpy()).real
    u = np.linalg.svd(E)[0][:, 0]
    b = u @ dW.double().numpy() @ H.double().numpy()
    found = step(dW, H).double().numpy()
    assert abs(np.corrcoef(found.ravel(), np.outer(u, b).ravel())[0, 1]) > 0.999

    def loss(length: float) -> float:
        left = dW.double().numpy() - length * found
        return float(np.trace(left @ H.double().numpy() @ left.T))

    assert scipy.optimize.minimize_scalar(loss).x == pytest.approx(1.0, abs=1e-3)
    assert loss(1.0) < loss(0.0)


def test_directions_must_be_folded_one_by_one() -> None:
    """A17.8: folding several corrections at once, each made for the weight as it rounded before any, is worse."""
    x, fmt, ratios = correlated(1600, 192), preset("int2-row"), []
    H, stats, fresh = x[:1200].t() @ x[:1200] / 1200, stats_of(x[:1200], "w")["w"], x[1200:]
    for seed in range(4):
        W = normal(64, 192, seed=seed) / 8
        linear = Linear("w", W, fmt, A4)
        left, at_once = W - linear.weight_values(unchanged(192)), W.clone()
        for _ in range(4):
            at_once += (moved := step(left, H))
            left -= moved
        folded = corrected(linear, unchanged(192), stats, 4)
        assert folded is not None
        errors = [Linear("w", V, fmt, A4).error(unchanged(192), fresh, fresh @ W.t()) for V in (folded, at_once)]
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / 4 < 0.95


def test_attention_out_is_found_by_order_and_place() -> None:
    sites = [("b.attn.q", "b.attn.k", "b.attn.v"), ("b.attn.o",), ("b.mlp.gate", "b.mlp.up"), ("b.mlp.down",)]
    assert attention_out(sites) == ("b.attn.o",)
    parallel = [("b.attn.qkv", "b.mlp.up"), ("b.attn.dense",), ("b.mlp.down",)]
    assert attention_out(parallel) == ("b.attn.dense",)
    low_rank = [("b.attn.q_a", "b.attn.kv_a"), ("b.attn.q_b",), ("b.attn.kv_b",), ("b.attn.o",), ("b.mlp.up",)]
    assert attention_out(low_rank) == ("b.attn.o",)
    assert attention_out([("b.fc1",)]) == ()


class Last:
    """A sink that keeps the codes of the last block."""

    def __init__(self) -> None:
        self.codes: Mapping[str, QTensor] = {}

    def has(self, block: str) -> bool:
        return False

    def read(self, block: str) -> Finished:
        raise AssertionError(block)

    def write(self, block: str, module: nn.Module, done: Finished) -> None:
        self.codes = done.codes


def test_a_walk_keeps_attention_out_and_counts_columns(tokens: torch.Tensor) -> None:
    sink = Last()
    model = family_model("llama", num_hidden_layers=1)
    for norm in (model.model.layers[0].input_layernorm, model.model.layers[0].post_attention_layernorm):
        norm.weight.data[3:6] *= 16
    walk(of_model(model), parse("qllm,rank=0,assemble=false+rtn:int8-row-sym+a:int3-token"), tokens, sink)
    wide = {site.rpartition(".")[2] for site, q in sink.codes.items() if isinstance(q, Gathered)}
    assert {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} <= wide
    assert "o_proj" not in wide
    for q in sink.codes.values():
        assert q.shape == tuple(q.decode().shape)
        assert not isinstance(q, Gathered) or q.inner.shape[1] > q.shape[1]


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(RecipeError, match="rank"):
        method("qllm", {"rank": -1})
