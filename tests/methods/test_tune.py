"""Learned rounding: where it starts, how it moves, what its correction is, and that each part makes blocks better."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, VOCAB, family_model
from torch import nn

from lowbit.calibration.stats import Gram, Stats
from lowbit.errors import CalibrationError, FormatError, RecipeError
from lowbit.formats.blocks import Block
from lowbit.formats.format import Format, Stored
from lowbit.formats.grids import IntGrid
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import QTensor
from lowbit.methods.base import Weight, method
from lowbit.methods.gptq import Gptq
from lowbit.methods.training.residual import lack, order_and_writers, relative
from lowbit.methods.training.rounding import Rounding
from lowbit.methods.tune import Tune
from lowbit.models.graph import is_linear, matrix, set_matrix

FORMATS = ["int3-g16", "int4-g20", "int2-g16-sym", "int3-row", "int4-tensor", "nf4", "fp4", "fp8-e4m3", "mxfp4",
           "nvfp4", "ternary", "nf4-dq"]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- rounding --------------------------------------------------------------------------------------------------------


def rounding(name: str, seed: int = 0) -> tuple[Rounding, QTensor, torch.Tensor]:
    """Codes that are mostly the nearest, a fifth of them others; the tensor that they stand for; the weight."""
    fmt, w = preset(name), normal(12, 48, seed=seed)
    params = fmt.fit(w)
    elsewhere = w + 0.3 * w.std() * normal(12, 48, seed=1) * (normal(12, 48, seed=2) > 0.8)
    zero = None if params.zero is None else fmt.block.spread(params.zero, (12, 48))
    codes = fmt.snap(elsewhere, fmt.block.spread(params.step, (12, 48)), zero).codes
    return Rounding(w, codes, params, fmt), fmt.assemble(codes, params), w


@pytest.mark.parametrize("name", FORMATS)
def test_it_starts_exactly_at_the_given_codes(name: str) -> None:
    learned, given, w = rounding(name)
    assert not torch.equal(given.decode(), preset(name).encode(w, preset(name).fit(w)).decode())
    for start in (learned.weight(), learned.encode().decode()):
        torch.testing.assert_close(start, given.decode(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_distance_down_the_gradient_moves_to_a_lower_value_unless_it_is_the_lowest(name: str) -> None:
    learned, given, _ = rounding(name)
    sign = torch.where(normal(12, 48, seed=3) > 0, 1.0, -1.0)
    before = given.decode()
    for _ in range(40):  # 40 mean distances of a grid of at most 256 codes, or its end
        learned.move(sign, 1.0, 0.0)
    after, end = learned.encode().decode(), learned.weight()
    torch.testing.assert_close(after, end, rtol=1e-6, atol=0)
    assert bool(((after - before) * sign <= 0).all())
    assert bool((after != before).float().mean() > 0.5)
    learned.move(sign, 1.0, 0.0)
    assert torch.equal(learned.weight(), end) or "fp8" in name  # at the end of the grid it stays,
    learned.move(-sign, 1.01, 0.0)
    assert bool((learned.weight() != end).all()) or "int" not in name  # and comes back at once


def test_a_weight_flips_when_it_has_moved_by_its_own_distance_to_the_boundary() -> None:
    fmt = preset("int4-tensor-sym")
    w = torch.tensor([[7.0, 2.2, -3.4, 0.1]])  # step 1
    learned = Rounding(w, fmt.snap(w, torch.ones(1, 1), None).codes, fmt.fit(w), fmt)
    up = -torch.ones(1, 4)
    seen = [learned.weight().tolist()[0]]
    for _ in range(4):
        learned.move(up, 0.1, 0.0)
        seen.append(learned.weight().tolist()[0])
    rows = np.array(seen)
    assert rows[:, 1].tolist() == [2, 2, 2, 2, 3]  # 2.2 -> 2.6 passes 2.5 in the fourth step (2.5 itself ties to even)
    assert rows[:, 2].tolist() == [-3, -3, -3, -3, -3]
    assert rows[:, 3].tolist() == [0, 0, 0, 0, 0] or rows[4, 3] == 0.0


def test_scales_follow_their_gradient_and_are_stored_as_they_were_used() -> None:
    learned, given, _ = rounding("int3-g16")
    target = 1.1 * given.decode()  # best reached with larger steps alone
    for _ in range(60):
        learned.move(learned.weight() - target, 0.0, 0.002)
    error = (learned.encode().decode() - target).norm() / target.norm()
    assert float((given.decode() - target).norm() / target.norm()) > 0.09
    assert float(error) < 0.005
    torch.testing.assert_close(learned.encode().decode(), learned.weight(), rtol=1e-3, atol=0)


def test_coded_scales_stay() -> None:
    learned, given, _ = rounding("mxfp4")
    learned.move(normal(12, 48), 0.0, 0.1)
    assert torch.equal(learned.encode().decode(), given.decode())


# --- correction ------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + down(tanh(up(x))), the least block that has a stream."""

    def __init__(self, d: int = 12, width: int = 20) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, width, bias=False), nn.Linear(width, d, bias=False)
        for p, seed in zip(self.parameters(), (5, 6), strict=True):
            p.data = normal(*p.shape, seed=seed) * 0.3
            p.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(torch.tanh(self.up(x)))
        return out


def plain(block: nn.Module, x: torch.Tensor, i: int) -> torch.Tensor:
    out: torch.Tensor = block(x)
    return out


def test_the_correction_is_the_ridge_regression_of_what_the_output_lacks() -> None:
    block, inputs, targets = Residual(), normal(5, 30, 12), normal(5, 30, 12, seed=9) * normal(5, 30, 1, seed=8)
    got = lack(block, plain, inputs, targets, block.down, 2).correction(0.7, 0.3)
    X = np.tanh(inputs.double().reshape(-1, 12).numpy() @ block.up.weight.double().numpy().T)
    T = targets.double().reshape(-1, 12).numpy()
    E = T - block(inputs).double().reshape(-1, 12).numpy()
    root = 1 / np.linalg.norm(T, axis=1, keepdims=True)
    G = (X * root).T @ (X * root)
    # least squares with extra rows that pull towards zero, by another route than normal equations
    pull = np.sqrt(0.3 * np.diag(G).mean()) * np.eye(20)
    solved = np.linalg.lstsq(np.vstack([X * root, pull]), np.vstack([E * root, np.zeros((20, 12))]), rcond=None)[0]
    np.testing.assert_allclose(got.numpy(), 0.7 * solved.T, rtol=1e-3, atol=1e-5)


def test_the_weight_of_a_token_is_one_over_its_square_and_finite_for_zeros() -> None:
    target = normal(2, 3, 4)
    target[0, 0] = 0
    weight = relative(target)
    np.testing.assert_allclose(weight[1].numpy(), 1 / np.square(target[1].numpy()).sum(-1), rtol=1e-6)
    assert bool(weight.isfinite().all())


WRITERS = {
    "llama": {"o_proj", "down_proj"}, "mistral": {"o_proj", "down_proj"}, "gemma": {"o_proj", "down_proj"},
    "stablelm": {"o_proj", "down_proj"}, "opt": {"out_proj", "fc2"}, "bloom": {"dense", "dense_4h_to_h"},
    "falcon": {"dense", "dense_4h_to_h"}, "gpt_neox": {"dense", "dense_4h_to_h"}, "gpt2": {"c_proj"},
    "mixtral": {"o_proj"},
}  # fmt: skip


class View:
    """One block of a tiny model as a tuner is given it, on inputs of its own and targets of the original's."""

    def __init__(self, model_type: str, noise: float = 0.0, fmt: str = "int3-g16", windows: int = 6) -> None:
        from lowbit.models.source import of_model
        from lowbit.models.stream import Stream

        source = of_model(family_model(model_type))
        stream, name = Stream(source, torch.float32), source.blocks[0]
        tokens = torch.randint(0, VOCAB, (windows, 32), generator=torch.Generator().manual_seed(1))
        hidden = torch.cat([stream.embed(tokens[i : i + 2]) for i in range(0, windows, 2)]).clone()
        stream.embed(tokens[:1])
        self.name, self.block = name, stream.load(0)
        self.run: Callable[..., Any] = lambda block, x, i: stream.run_with_gradients(0, block, x)
        self.modules = {f"{name}.{n}": m for n, m in self.block.named_modules() if is_linear(m)}
        with torch.no_grad():
            self.targets = torch.cat([self.run(self.block, hidden[i : i + 2], i) for i in range(0, windows, 2)])
        error = noise * hidden.std() * torch.tanh(hidden @ normal(hidden.shape[-1], hidden.shape[-1], seed=4))
        self.inputs = hidden + error  # what blocks before it would add: a function of the states
        self.weights = {site: Weight(site, matrix(m).clone()) for site, m in self.modules.items()}
        self.formats = dict.fromkeys(self.modules, preset(fmt))
        self.stats = {site: Stats.of(site, {Gram}, matrix(m).shape[1]) for site, m in self.modules.items()}
        handles = [
            m.register_forward_pre_hook(lambda _, a, s=site: self.stats[s].update(a[0].reshape(-1, a[0].shape[-1])))
            for site, m in self.modules.items()
        ]
        with torch.no_grad():
            for i in range(0, windows, 2):
                self.run(self.block, self.inputs[i : i + 2], i)
        for handle in handles:
            handle.remove()

    def tune(self, **options: Any) -> dict[str, QTensor]:
        return dict(
            Tune(**options)(
                self.block,
                self.run,
                self.inputs,
                self.targets,
                self.weights,
                self.stats,
                self.formats,
                self.modules,
                {},
            )
        )

    def loss(self, codes: dict[str, QTensor]) -> float:
        """The relative error of the block's output with these codes."""
        block = copy.deepcopy(self.block)
        for site, q in codes.items():
            set_matrix(block.get_submodule(site.removeprefix(self.name + ".")), q.decode())
        with torch.no_grad():
            out = torch.cat([self.run(block, self.inputs[i : i + 2], i) for i in range(0, len(self.inputs), 2)])
        return float(((out - self.targets).square().sum(-1) * relative(self.targets)).mean())


@pytest.fixture(scope="module")
def llama() -> View:
    return View("llama", noise=0.3)


@pytest.mark.parametrize("name", FAMILIES)
def test_writers_to_the_stream_are_found_in_every_family(name: str) -> None:
    view = View(name, windows=2)
    order, writers = order_and_writers(view.block, view.run, view.inputs[:1], view.modules)
    assert sorted(order) == sorted(view.modules)
    assert {site.rpartition(".")[2] for site in writers if ".experts." not in site} == WRITERS[name]
    assert not any(".experts." in site for site in writers)


def test_linears_are_taken_in_order_of_execution(llama: View) -> None:
    order, _ = order_and_writers(llama.block, llama.run, llama.inputs[:1], llama.modules)
    leaves = [site.rpartition(".")[2] for site in order]
    assert leaves == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- the tuner -------------------------------------------------------------------------------------------------------


def test_without_its_two_parts_it_is_gptq(llama: View) -> None:
    codes = llama.tune(share=0.0, steps=0, clip=4)
    for site, q in codes.items():
        expected = Gptq(clip=4)(llama.weights[site], llama.stats[site], llama.formats[site])
        assert torch.equal(q.decode(), expected.decode())


def test_each_part_brings_the_loss_of_the_block_down(llama: View) -> None:
    gptq, corrected, descended, both = (
        llama.loss(llama.tune(clip=4, share=share, steps=steps, lr=0.02))
        for share, steps in ((0.0, 0), (0.7, 0), (0.0, 16), (0.7, 16))
    )
    assert corrected < 0.8 * gptq
    assert descended < 0.8 * gptq
    assert both < 0.97 * min(corrected, descended)


def test_it_is_a_pure_function_and_its_seed_decides(llama: View) -> None:
    before = {name: p.clone() for name, p in llama.block.named_parameters()}
    first, again, other = (llama.tune(steps=3, lr=0.05, clip=0, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[site].decode(), again[site].decode()) for site in first)
    assert not all(torch.equal(first[site].decode(), other[site].decode()) for site in first)
    for name, p in llama.block.named_parameters():
        assert torch.equal(p, before[name])
        assert not p.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.block.modules())


def test_learned_scales_from_searched_ranges_need_a_third_of_the_steps() -> None:
    """LLMC's advice, measured: from a clip search 8 steps reach what 24 do not reach from the whole range."""
    view = View("llama", fmt="int2-g32")
    options: dict[str, Any] = {"start": "rtn", "share": 0.0, "lr": 0.0, "scale_lr": 0.01}
    whole = [view.loss(view.tune(**options, clip=0, steps=steps)) for steps in (8, 24)]
    assert view.loss(view.tune(**options, clip=20, steps=8)) < 0.8 * whole[1] < 0.8 * whole[0]


@pytest.mark.parametrize(
    ("name", "fmt"), [("gpt2", "int3-g16"), ("mixtral", "int3-row"), ("opt", "mxfp4"), ("falcon", "int2-g16-sym")]
)
def test_other_blocks_get_better_too(name: str, fmt: str) -> None:
    """Transposed weights, experts (one of them unseen), biases, parallel branches."""
    view = View(name, noise=0.3, fmt=fmt)
    if name == "mixtral":
        site = next(site for site in view.modules if ".experts.3." in site)
        view.stats[site] = Stats.of(site, {Gram}, view.weights[site].matrix.shape[1])
    codes = view.tune(steps=4, lr=0.02, clip=0)
    assert codes.keys() == view.modules.keys()
    assert view.loss(codes) < 0.95 * view.loss(view.tune(share=0.0, steps=0, clip=0))


def test_the_walk_tunes_block_after_block() -> None:
    from lowbit.models.source import of_model
    from lowbit.pipeline.recipe import Calibration, parse
    from lowbit.pipeline.walk import walk

    written: dict[str, QTensor] = {}

    class Sink:
        def has(self, block: str) -> bool:
            return False

        def read(self, block: str) -> Any:
            raise NotImplementedError

        def write(self, block: str, module: nn.Module, done: Any) -> None:
            written.update(done.codes)

    source = of_model(family_model("llama"))
    tokens = torch.randint(0, VOCAB, (6, 32), generator=torch.Generator().manual_seed(1))
    recipe = parse("tune:int4-g32,steps=1,clip=0").model_copy(update={"calibration": Calibration(batch=2)})
    walk(source, recipe, tokens, Sink())
    assert written.keys() == {site.name for block in source.blocks for site in source.sites(block)}


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"start": "awq"}, {"lr": -1.0}, {"ridge": 0.0}, {"batch": 0}, {"steps": -1}, {"share": -0.1}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="tune"):
        method("tune", options)


def test_blocks_across_rows_are_refused(llama: View) -> None:
    flat = Format("int4-flat64", IntGrid(4, False), Block("flat", (64,)), Stored(torch.float16))
    with pytest.raises(FormatError, match="blocks along rows"):
        Tune()(
            llama.block, llama.run, llama.inputs, llama.targets, llama.weights, llama.stats,
            dict.fromkeys(llama.modules, flat), llama.modules, {},
        )  # fmt: skip


def test_a_loss_that_is_not_finite_is_an_error_and_the_block_is_put_back(llama: View) -> None:
    before = {name: p.clone() for name, p in llama.block.named_parameters()}
    targets = llama.targets.clone()
    targets[:] = torch.inf
    with pytest.raises(CalibrationError, match="not finite"):
        Tune(steps=2, share=0.0)(
            llama.block,
            llama.run,
            llama.inputs,
            targets,
            llama.weights,
            llama.stats,
            llama.formats,
            llama.modules,
            {},
        )
    assert all(torch.equal(p, before[name]) for name, p in llama.block.named_parameters())
