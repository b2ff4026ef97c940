"""Rotation: linears compute the same in another basis, where outliers cost little (A4.2)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from tiny import family_model
from torch import nn
from views import OneNorm, with_outliers

from lowbit.errors import FormatError
from lowbit.formats.activation import activation
from lowbit.formats.qtensor import Raw, Rotated
from lowbit.methods.base import Edit, Entry, SetEntry, method
from lowbit.methods.rotate import Rotate, Rotation
from lowbit.models.graph import matrix, split_experts
from lowbit.models.source import of_directory
from lowbit.models.stream import Stream
from lowbit.pipeline.coverage import audit
from lowbit.pipeline.observe import discover
from lowbit.pipeline.recipe import parse
from lowbit.pipeline.spill import Hidden
from lowbit.pipeline.view import Edges, View
from lowbit.runtime.linear import QLinear


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [16, 24, 96])
def test_a_rotation_is_signs_then_hadamard_blocks(width: int) -> None:
    rotation = Rotation.random(width, 3)
    size = rotation.size
    H = torch.tensor(scipy.linalg.block_diag(*[scipy.linalg.hadamard(size)] * (width // size))).float() / size**0.5
    signs = rotation.enter(torch.eye(width)) @ H  # H is its own inverse
    assert set(signs.diagonal().round().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(signs, torch.diag(signs.diagonal()), atol=1e-5, rtol=0)
    x, W = normal(5, width), normal(7, width, seed=1)
    torch.testing.assert_close(rotation.enter(x) @ rotation.weight(W).t(), x @ W.t(), atol=1e-5, rtol=1e-5)
    q = rotation.wrap(Raw.of(rotation.weight(W)))
    assert isinstance(q, Rotated)
    assert not q.problem()
    torch.testing.assert_close(q.decode(), W, atol=1e-5, rtol=1e-5)
    assert torch.equal(q.enter(x), rotation.enter(x))
    again = rotation.wrap(q.inner)
    assert isinstance(again, Rotated)
    assert again.signs.data.data_ptr() != q.signs.data.data_ptr()  # linears that share an entry share no tensor
    assert rotation.note == f"inputs rotated in blocks of {size}"


def test_seeds_choose_the_signs() -> None:
    a, b, c = (Rotation.random(256, seed).signs.data for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_outliers_cost_little_after_it() -> None:
    """Four-bit inputs with three channels of 128 sixteen times as large, as norms make them."""
    x, outliers = with_outliers(normal(300, 128), 3, 16.0)
    W = normal(32, 128, seed=1)
    W[:, outliers] /= 16
    a4, rotation = activation("int4-token"), Rotation.random(128, 0)

    def error(x: torch.Tensor, W: torch.Tensor) -> float:
        return float((a4.round(x) @ W.t() - x @ W.t()).square().sum())

    assert error(rotation.enter(x), rotation.weight(W)) < error(x, W) / 5


def entries(edits: list[Edit]) -> dict[str, Entry]:
    assert all(isinstance(edit, SetEntry) for edit in edits)
    return {site: edit.entry for edit in edits if isinstance(edit, SetEntry) for site in edit.sites}


def test_sites_that_read_one_input_are_rotated_together() -> None:
    block = OneNorm({"up": normal(4, 24), "gate": normal(6, 24)}, "int4-row-sym")
    found = entries(list(Rotate(sites="*.up")(block, {})))
    assert found.keys() == {"block.up", "block.gate"}
    assert found["block.up"] is found["block.gate"]
    assert entries(list(Rotate(sites="*.down")(block, {}))) == {}
    assert entries(list(Rotate()(OneNorm({"up": normal(4, 24)}, None), {}))) == {}  # stays in 16 bit
    assert entries(list(Rotate(fused=True)(block, {}))) == {}  # reads a norm, whose input is rotated


def test_an_odd_width_cannot_be_rotated() -> None:
    with pytest.raises(FormatError, match=r"block\.up.*odd number of inputs \(27\)"):
        list(Rotate()(OneNorm({"up": normal(4, 27)}, "int4-row-sym"), {}))


def transformed(root: Path, line: str, tokens: torch.Tensor) -> tuple[Any, dict[str, Entry]]:
    """The model after a recipe's transforms, its edited linears not rounded, and the entries that they got."""
    recipe = parse(line)
    source = of_directory(root)
    for _, transform in recipe.transforms:
        source = transform.prepare(source)  # type: ignore[attr-defined]
    model = copy.deepcopy(source.skeleton)
    split_experts(model)
    for name, p in list(source.skeleton.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(source.tensor(name, tuple(p.shape)).float(), requires_grad=False)
        model.get_submodule(owner)._parameters[leaf] = value
    model.tie_weights()
    stream, coverage = Stream(source, torch.float32), audit(source, recipe)
    hidden = Hidden.embed(stream, tokens, 2)
    found: dict[str, Entry] = {}
    for i, name in enumerate(source.blocks):
        block = stream.load(i)
        stages = discover(stream, i, block, hidden, [site.name for site in source.sites(name)])
        inputs = [shared for stage in stages for shared in stage.inputs]
        treatments = {site: t for site, (_, t) in coverage.in_block(name).items()}
        run = lambda block, i=i: stream.run(i, block, hidden.data[:1])  # noqa: E731
        view = View(source, name, block, treatments, inputs, run, Edges())
        for _, transform in recipe.transforms:
            for edit in transform(view, {}):
                view.apply(edit)
        found |= view.entries
        for site, entry in view.entries.items():
            owner, _, leaf = site.rpartition(".")
            linear = model.get_submodule(site)
            assert matrix(linear).shape == view.original(site).shape
            q = entry.wrap(Raw.of(view.weight(site)))
            setattr(model.get_submodule(owner), leaf, QLinear.of(q, linear.bias))
    return model, found


@pytest.mark.parametrize(
    ("name", "line", "rotated"),
    [("llama", "rotate", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
     ("gpt2", "rotate,sites=*.mlp.*", "c_fc c_proj"),
     ("falcon", "rotate,fused=true", "dense dense_4h_to_h"),
     ("mixtral", "rotate,fused=true", "down_proj o_proj")],
)  # fmt: skip
def test_a_transformed_model_has_the_logits_of_the_original(
    families: dict[str, Path], name: str, line: str, rotated: str, tokens: torch.Tensor
) -> None:
    """A4.2, by the very product that is rounded later: entered inputs and the matrix that meets them."""
    model, found = transformed(families[name], f"{line}+rtn:int4-row-sym", tokens[:2])
    with torch.no_grad():
        expected, got = family_model(name)(tokens[:2]).logits, model(tokens[:2]).logits
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert sorted({site.rpartition(".")[2] for site in found}) == rotated.split()


def test_options_are_those_of_the_class() -> None:
    assert method("rotate", {"fused": True, "seed": 3, "sites": "*.down_proj"}) == Rotate("*.down_proj", 3, True)
    assert Rotate().needs == frozenset()
