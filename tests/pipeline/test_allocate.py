"""Spending bytes: the knapsack against brute force, files against their budget, recipes against what was chosen."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sinks import recipe

from lowbit.errors import CalibrationError, RecipeError
from lowbit.formats.presets import preset
from lowbit.io.native import Writer
from lowbit.models.source import Source, of_directory
from lowbit.pipeline import knapsack
from lowbit.pipeline.allocate import Allocation, allocate, overridden, size
from lowbit.pipeline.coverage import audit
from lowbit.pipeline.knapsack import Choice, optimum
from lowbit.pipeline.recipe import Calibration, Override, Recipe, Step, parse
from lowbit.pipeline.recipe_toml import toml
from lowbit.pipeline.sensitivity import Sensitivity, SiteLoss
from lowbit.pipeline.walk import walk

FORMATS = ("int2-g32", "int3-g32", "int4-g32", "int8-g32")


class Instance(NamedTuple):
    groups: list[list[Choice]]
    budget: int


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Up to seven groups; more bytes mostly lose less, along no curve, and sometimes exactly as much as others."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    top, digits = int(rng.integers(3, 60)), int(rng.integers(0, 4))
    groups = []
    for _ in range(int(rng.integers(1, 8))):
        sizes = rng.integers(0, top, int(rng.integers(1, 5)))
        losses = np.round(rng.uniform(0.5, 1.5, sizes.size) * (top - sizes * float(rng.uniform(-0.2, 1))), digits)
        groups.append([Choice(int(n), float(max(loss, 0))) for n, loss in zip(sizes, losses, strict=True)])
    low, high = (sum(f(c.nbytes for c in g) for g in groups) for f in (min, max))
    return Instance(groups, int(rng.integers(low, high + 1)))


def brute_force(groups: list[list[Choice]], budget: int) -> float:
    """The least loss of all combinations that fit."""
    nbytes, loss = np.zeros(1), np.zeros(1)
    for group in groups:
        nbytes = np.add.outer(nbytes, [c.nbytes for c in group]).ravel()
        loss = np.add.outer(loss, [c.loss for c in group]).ravel()
    return float(loss[nbytes <= budget].min())


@settings(max_examples=300, deadline=None)
@given(instances())
def test_the_optimum_is_that_of_all_combinations(instance: Instance) -> None:
    groups, budget = instance
    found = optimum(groups, budget)
    chosen = [group[k] for group, k in zip(groups, found.chosen, strict=True)]
    assert found.nbytes == sum(c.nbytes for c in chosen) <= budget
    least = brute_force(groups, budget)
    assert found.loss == math.fsum(c.loss for c in chosen) == pytest.approx(least, rel=1e-11, abs=1e-11)
    assert found.gap == 0


@settings(max_examples=200, deadline=None)
@given(instances())
def test_with_too_few_states_the_gap_is_honest(instance: Instance) -> None:
    groups, budget = instance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_STATES", 1)
        found = optimum(groups, budget)
    assert found.nbytes <= budget
    assert found.loss - found.gap - 1e-9 <= brute_force(groups, budget) <= found.loss + 1e-9


def test_a_budget_below_the_smallest_choices_is_refused() -> None:
    groups = [[Choice(3, 1.0), Choice(5, 0.5)], [Choice(4, 2.0), Choice(2, 3.0)]]
    assert optimum(groups, 5).chosen == [0, 1]
    with pytest.raises(RecipeError, match="a budget of 4 bytes cannot be met, the smallest is 5"):
        optimum(groups, 4)


def model_like(n: int, seed: int, ragged: bool) -> list[list[Choice]]:
    """Groups of a large model: a handful of shapes, or all different ones; four times the loss for a bit less."""
    rng = np.random.default_rng(seed)
    shapes = [3 * 4096 * 4096, 4096 * 4096, 2 * 4096 * 11008, 4096 * 11008]
    groups = []
    for i in range(n):
        weights = int(rng.integers(1e5, 1e8)) if ragged else shapes[i % 4]
        scale = math.exp(rng.normal(0, 1.2))
        groups.append([
            Choice(weights * b // 8 + (16 + b) * weights // 512, scale * 4.0**-b * math.exp(rng.normal(0, 0.1)))
            for b in (2, 3, 4, 5, 6, 8)
        ])  # fmt: skip
    return groups


@pytest.mark.parametrize("ragged", [False, True])
def test_a_large_model_is_solved_exactly_and_at_once(ragged: bool) -> None:
    groups = model_like(300, 0, ragged)
    low, high = (sum(f(c.nbytes for c in g) for g in groups) for f in (min, max))
    budget = low + (high - low) * 2 // 5
    started = time.process_time()
    found = optimum(groups, budget)
    assert time.process_time() - started < 2
    assert found.gap == 0
    for price in np.geomspace(1e-12, 1e-8, 60):  # Lagrange: a bound from below at every price
        bound = sum(min(c.loss + price * c.nbytes for c in g) for g in groups) - price * budget
        assert bound <= found.loss
    better = [
        c.nbytes - g[k].nbytes for g, k in zip(groups, found.chosen, strict=True) for c in g if c.loss < g[k].loss
    ]
    assert 0 <= budget - found.nbytes < min(better)  # no single step up would fit


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("90MB", 90_000_000), ("1.5GiB", 3 << 29), ("0.1 kB", 100), ("12345", 12345), ("7b", 7), ("2gb", 2_000_000_000)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "3 bits", "1e9", "3MBB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="is no size"):
        size(text)


def made_up(source: Source, formats: tuple[str, ...] = FORMATS, seed: int = 0) -> Sensitivity:
    """A sensitivity as if measured: losses fall fourfold a bit, from a start that differs from group to group."""
    rng = np.random.default_rng(seed)
    sites = [site for site, _ in audit(source, parse("rtn:int4-g32")).treated.values()]
    fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate+up", "up_proj": "gate+up"}
    rows = []
    for site in sites:
        parts = site.name.split(".")
        parts[-1] = fused.get(parts[-1], parts[-1])
        group = ".".join("*" if before == "experts" else part for before, part in itertools.pairwise(["", *parts]))
        start = math.exp(rng.normal(0, 1.5))
        loss = {f: start * 4.0 ** -int(f[3]) for f in formats}
        rows.append(SiteLoss(name=site.name, shape=site.shape, group=group, tokens=9, loss=loss))
    return Sensitivity(
        model=source.name, model_digest=source.digest, text="made up", text_digest="0" * 64, tokens_digest="0" * 64,
        windows=2, held=1, length=9, dtype="float32", encoder="gptq", options={}, formats=list(formats), sites=rows,
    )  # fmt: skip


def shards(source: Source, chosen: Recipe, out: Path) -> int:
    """Bytes of the files that a recipe makes."""
    with Writer(out, source, chosen, None) as writer:
        walk(source, chosen, None, writer)
        writer.finish({})
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def treated(source: Source, chosen: Recipe) -> dict[str, str]:
    return {name: t.format.name for name, (_, t) in audit(source, chosen).treated.items()}


def spent(source: Source, share: float = 0.4, base: Recipe | None = None) -> tuple[Sensitivity, Allocation]:
    """An allocation at a share of the way from the smallest to the largest checkpoint."""
    known, base = made_up(source), base or parse("rtn:int4-g32")
    with pytest.raises(RecipeError, match="cannot be met") as refused:
        allocate(source, base, known, 0)
    smallest = int(refused.value.what.rpartition(" ")[2].replace(",", ""))
    largest = allocate(source, base, known, 1 << 40).nbytes
    return known, allocate(source, base, known, smallest + int(share * (largest - smallest)))


@pytest.mark.parametrize("name", ["llama", "mixtral", "opt", "gpt2"])
def test_files_stay_within_the_budget_by_less_than_a_step(families: dict[str, Path], name: str, tmp_path: Path) -> None:
    source = of_directory(families[name])
    known, found = spent(source)
    assert found.gap == 0
    assert len(set(found.formats.values())) > 1
    assert treated(source, found.recipe) == found.formats
    groups: dict[str, list[SiteLoss]] = {}
    for row in known.sites:
        groups.setdefault(row.group, []).append(row)
    for rows in groups.values():
        assert len({found.formats[row.name] for row in rows}) == 1
    used = shards(source, found.recipe, tmp_path / "out")
    assert used <= found.nbytes <= found.budget
    assert found.nbytes - used < 350 * len(found.formats)  # what headers are bounded by, beyond what they take
    steps = [
        sum(preset(b).nbytes(row.shape) - preset(a).nbytes(row.shape) for row in rows)
        for rows in groups.values()
        for a, b in itertools.pairwise(FORMATS)
        if found.formats[rows[0].name] == a
    ]
    assert found.budget - found.nbytes <= max(steps)


@pytest.mark.parametrize("fmt", ["nf4-dq", "nvfp4", "int4-row-sym", "mxfp4"])
def test_headers_are_bounded_for_every_kind_of_format(llama: Path, tmp_path: Path, fmt: str) -> None:
    source = of_directory(llama)
    known = made_up(source).model_dump()
    known |= {"formats": [fmt], "sites": [{**row, "loss": {fmt: 1.0}} for row in known["sites"]]}
    found = allocate(source, parse("rtn:int4-g32"), Sensitivity.model_validate(known), 1 << 30)
    assert found.largest
    assert shards(source, found.recipe, tmp_path / "out") <= found.nbytes


def test_the_smallest_and_the_largest(llama: Path) -> None:
    source = of_directory(llama)
    known = made_up(source)
    with pytest.raises(RecipeError, match=r"a budget of 1,000 bytes cannot be met, the smallest is \d+,\d+") as refused:
        allocate(source, parse("rtn:int4-g32"), known, 1000)
    smallest = int(refused.value.what.rpartition(" ")[2].replace(",", ""))
    least = allocate(source, parse("rtn:int4-g32"), known, smallest)
    assert (set(least.formats.values()), least.nbytes, least.largest) == ({"int2-g32"}, smallest, False)
    with pytest.raises(RecipeError, match="cannot be met"):
        allocate(source, parse("rtn:int4-g32"), known, smallest - 1)
    most = allocate(source, parse("rtn:int4-g32"), known, 1 << 40)
    assert (set(most.formats.values()), most.largest) == ({"int8-g32"}, True)
    assert most.recipe.override == []
    assert most.recipe.step[0].format == "int8-g32"


def test_more_bytes_never_lose_more(llama: Path) -> None:
    source = of_directory(llama)
    found = [spent(source, share)[1] for share in (0.1, 0.5, 0.9)]
    assert all(a.loss > b.loss for a, b in itertools.pairwise(found))


def test_what_the_user_has_decided_stays(llama: Path) -> None:
    source = of_directory(llama)
    base = recipe(
        "rtn:int4-g32",
        Override(sites="model.layers.0.mlp.down_proj", keep="fragile"),
        Override(sites="*.v_proj", format="int8-row"),
        Override(sites="*.o_proj", options={"clip": 9}),
        Override(sites="*.up_proj", options={"clip": 7}),
    )
    _, found = spent(source, 0.4, base)
    after = audit(source, found.recipe)
    assert [k.name for k in after.kept if k.why == "fragile"] == ["model.layers.0.mlp.down_proj"]
    for name, (_, treatment) in after.treated.items():
        clip = {"o_proj": 9, "up_proj": 7}.get(name.rpartition(".")[2], 0)
        assert treatment.encoder.clip == clip  # type: ignore[attr-defined]
        if name.endswith("v_proj"):
            assert treatment.format.name == "int8-row"
            assert name not in found.formats
        else:
            assert treatment.format.name == found.formats[name]
    found.recipe.check([*after.treated, *(kept.name for kept in after.kept)])


def test_overrides_are_as_wide_as_they_can_be(families: dict[str, Path]) -> None:
    names = list(audit(of_directory(families["mixtral"]), parse("rtn:int4-g32")).treated)
    formats = dict.fromkeys(names, "int4-g32") | {name: "int2-g32" for name in names if name.endswith("o_proj")}
    down = [name for name in names if "layers.1." in name and name.endswith("down_proj")]
    formats |= dict.fromkeys(down, "int8-g32") | {"model.layers.0.self_attn.q_proj": "int3-g32"}
    found = overridden(parse("rtn:int8-row"), formats, names)
    assert len(down) == 4
    assert {rule.sites: rule.format for rule in found.override} == {
        "model.layers.0.self_attn.q_proj": "int3-g32",
        "*.o_proj": "int2-g32",
        down[0].replace(".experts.0.", ".experts.*."): "int8-g32",
    }
    assert found.line == "rtn:int4-g32+3"
    fixed = recipe("rtn:int8-row", Override(sites=down[2], keep="one expert"))
    apart = overridden(fixed, {name: fmt for name, fmt in formats.items() if name != down[2]}, names)
    assert [apart.treatment(name) == "one expert" for name in down] == [False, False, True, False]


def test_the_recipe_survives_toml(llama: Path, tmp_path: Path) -> None:
    source = of_directory(llama)
    _, found = spent(source, 0.4, recipe("rtn:int4-g32,clip=5", samples=4, text="a 'b' \"c\".txt"))
    path = tmp_path / "mixed.toml"
    path.write_text(toml(found.recipe))
    assert parse(str(path)) == found.recipe
    assert "[[override]]" in path.read_text()


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), st.floats(1e-9, 1e9))
def test_toml_spells_every_value(tmp_path_factory: pytest.TempPathFactory, words: str, damp: float) -> None:
    whole = Recipe(
        step=[Step(method="gptq", format="int4-g64", options={"damp": damp, "act_order": False, "block": 32})],
        override=[Override(sites="*", keep=words)],
        calibration=Calibration(text=words, samples=3),
    )
    path = tmp_path_factory.mktemp("toml") / "r.toml"
    path.write_text(toml(whole), encoding="utf-8")
    assert parse(str(path)) == whole


def test_another_models_sensitivity_is_refused(families: dict[str, Path], llama: Path) -> None:
    with pytest.raises(CalibrationError, match="another model"):
        allocate(of_directory(families["mistral"]), parse("rtn:int4-g32"), made_up(of_directory(llama)), 1 << 30)


def test_what_was_not_measured_needs_a_format(llama: Path) -> None:
    source = of_directory(llama)
    known = made_up(source)
    partly = known.model_copy(update={"sites": known.sites[1:]})
    with pytest.raises(RecipeError, match="q_proj: nothing is known about its sensitivity"):
        allocate(source, parse("rtn:int4-g32"), partly, 1 << 30)
    named = recipe("rtn:int4-g32", Override(sites=known.sites[0].name, format="int8-row"))
    assert known.sites[0].name not in allocate(source, named, partly, 1 << 30).formats
    with pytest.raises(RecipeError, match="no linear is free"):
        allocate(source, recipe("rtn:int4-g32", Override(sites="*", format="int8-row")), known, 1 << 30)


def test_no_weight_is_loaded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = of_directory(llama)
    known = made_up(source)

    def loading(*_: object) -> torch.Tensor:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(Source, "tensor", loading)
    assert allocate(source, parse("rtn:int4-g32"), known, 1 << 30).largest
