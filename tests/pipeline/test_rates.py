"""Rates: a budget shared among linears is met by the files, from below; what the walk finds out for rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sinks import Kept, recipe
from tiny import family_model, save_model

from lowbit.calibration.cards import Card
from lowbit.cli.sensitivity import spend, told
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.ec import Entropy
from lowbit.formats.nodes_coded import Coded
from lowbit.formats.presets import preset
from lowbit.io.native import Writer
from lowbit.models.source import Source, of_directory
from lowbit.pipeline.coverage import audit
from lowbit.pipeline.fisher import output_fisher
from lowbit.pipeline.rate import known_fisher
from lowbit.pipeline.rates import FORMATS, measurable, share, waits_for_budget
from lowbit.pipeline.recipe import Override, Recipe, parse
from lowbit.pipeline.sensitivity import Sensitivity, SiteLoss
from lowbit.pipeline.walk import prepared, walk


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Source:
    """A model whose linears are large enough for a rate to be met to 0.1 %."""
    model = family_model("llama", hidden_size=192, intermediate_size=256, num_hidden_layers=2)
    return of_directory(save_model(model, tokenizer, tmp_path_factory.mktemp("wide")))


def made_up(source: Source, formats: tuple[str, ...] = FORMATS) -> Sensitivity:
    """As if measured: losses fall fourfold a bit from a start of their own (threefold below 3 bits)."""
    rng, rows = np.random.default_rng(0), []
    for name, (site, _) in audit(source, parse("rtn:ec4")).treated.items():
        start = math.exp(rng.normal(0, 1.5))
        loss = {f: start * 4.0**-b * (0.75 if b < 3 else 1) for f in formats for b in [float(f[2])]}
        rows.append(SiteLoss(name=name, shape=site.shape, group=name, tokens=9, loss=loss))
    return Sensitivity(
        model=source.name, model_digest=source.digest, text="made up", text_digest="0" * 64, tokens_digest="0" * 64,
        windows=1, held=1, length=9, dtype="float32", encoder="rtn", options={}, formats=list(formats), sites=rows,
    )  # fmt: skip


def budget_of(source: Source, chosen: Recipe, bits: float) -> int:
    """About the files at so many bits a weight."""
    coverage = audit(source, measurable(chosen))
    return int(bits * coverage.quantized / 8) + 2 * (coverage.parameters - coverage.quantized) + 15000


def shards(source: Source, chosen: Recipe, out: Path) -> int:
    with Writer(out, source, chosen, "0" * 64) as writer:
        walk(prepared(source, chosen), chosen, windows(), writer)
        writer.finish({})
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


@pytest.mark.parametrize("bits", [2.7])
def test_files_meet_the_budget_from_below(source: Source, bits: float, tmp_path: Path) -> None:
    asked = with_text(parse("gptq:ec"))
    budget = budget_of(source, asked, bits)
    found = share(source, asked, made_up(source), budget)
    used = shards(source, found.recipe, tmp_path / "out")
    assert used <= found.nbytes <= budget
    bounded = 110 * 14 + 60 * len(list(source.skeleton.parameters()))  # headers, which are known about so well
    assert used > 0.999 * budget - bounded
    assert len(set(found.formats.values())) > 4


def test_the_signs_of_a_rotation_are_counted(source: Source, tmp_path: Path) -> None:
    asked = with_text(parse("rotate+rtn:ec"))
    found = share(source, asked, made_up(source), budget_of(source, asked, 3))
    used = shards(source, found.recipe, tmp_path / "out")
    assert 0.99 * found.budget < used <= found.budget


def with_text(chosen: Recipe) -> Recipe:
    return chosen.model_copy(update={"calibration": recipe("rtn:ec3", samples=4, length=16).calibration})


def windows() -> torch.Tensor:
    return torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1))


def test_every_weight_costs_the_same(source: Source) -> None:
    known, asked = made_up(source), parse("rtn:ec")
    found = share(source, asked, known, budget_of(source, asked, 4.2))
    each = []
    for row in known.sites:
        fmt = preset(found.formats[row.name])
        assert isinstance(fmt, Entropy)
        assert fmt.bits is not None
        if 3 < fmt.bits < 8:
            each.append(row.loss["ec4"] * 4.0 ** (4 - fmt.bits) / math.prod(row.shape))
    assert len(each) > 4
    assert max(each) / min(each) < 1.001
    expected = sum(
        row.loss["ec4"] * 4.0 ** (4 - preset(found.formats[row.name]).bits)  # type: ignore[attr-defined]
        for row in known.sites
    )
    assert found.loss == pytest.approx(expected, rel=0.15)  # below 3 bits losses were given another slope


def test_limits_and_refusals(source: Source) -> None:
    known, asked = made_up(source), parse("gptq:ec")
    most = share(source, asked, known, 1 << 40)
    assert set(most.formats.values()) == {"ec8"}
    assert most.largest
    assert most.recipe.line == "gptq:ec8"
    with pytest.raises(RecipeError, match=r"a budget of 1,000 bytes cannot be met, the smallest is (\d+),") as refused:
        share(source, asked, known, 1000)
    smallest = int(refused.value.what.rpartition(" ")[2].replace(",", ""))
    least = share(source, asked, known, smallest + 30)
    assert max(preset(name).bits for name in least.formats.values()) < 1.05  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="fewer than two rates"):
        share(source, asked, made_up(source, ("ec3",)), 1 << 40)
    with pytest.raises(FormatError, match="ec has no rate of its own"):
        audit(source, asked)
    assert [waits_for_budget(r) for r in (asked, parse("gptq:ec3"))] == [True, False]


def test_what_the_user_has_decided_stays(source: Source) -> None:
    asked = recipe(
        "rtn:ec",
        Override(sites="model.layers.0.mlp.down_proj", keep="fragile"),
        Override(sites="*.v_proj", format="int8-row"),
        Override(sites="*.o_proj", options={"weighted": True}),
    )
    budget = budget_of(source, asked, 3.5)
    found = share(source, asked, made_up(source), budget)
    after = audit(source, found.recipe)
    assert [kept.name for kept in after.kept if kept.why == "fragile"] == ["model.layers.0.mlp.down_proj"]
    for name, (_, treatment) in after.treated.items():
        assert treatment.encoder.weighted == name.endswith("o_proj")  # type: ignore[attr-defined]
        assert treatment.format.name == ("int8-row" if name.endswith("v_proj") else found.formats[name])
    assert budget - 2000 < found.nbytes <= budget


def test_the_command_spends_by_rates(source: Source, tmp_path: Path) -> None:
    asked, file = parse("rtn:ec"), tmp_path / "s.json"
    file.write_text(made_up(source).model_dump_json())
    budget = budget_of(source, asked, 3)
    spent = spend(source, asked, budget, None, file, torch.float32)
    assert spent == share(source, asked, made_up(source), budget)
    rates = [preset(name).bits for name in spent.formats.values()]  # type: ignore[attr-defined]
    assert f"14 linears at {min(rates):.2f} to {max(rates):.2f} bits a weight" in told(spent)[0]
    with pytest.raises(RecipeError, match="ec takes any rate"):
        spend(source, asked, budget, "int4-g64", None, torch.float32)


# --- what the walk finds out -----------------------------------------------------------------------------------------


def test_rows_are_weighed_by_the_fisher_information_of_the_text(source: Source) -> None:
    chosen = recipe("gptq:ec3", Override(sites="*.v_proj", format="int4-g32"))
    coverage, tokens = audit(source, chosen), windows()
    found = known_fisher(source, coverage, tokens, torch.float32)
    assert found.keys() == {name for name in coverage.treated if not name.endswith("v_proj")}
    expected = output_fisher(source, tokens, set(found), torch.float32, 1)
    assert all(torch.equal(found[name], expected[name].outputs) for name in found)
    for line in ("gptq:ec3,fisher=false", "rtn:ec3", "gptq:int4-g32"):
        assert known_fisher(source, audit(source, parse(line)), tokens, torch.float32) == {}


def test_correct_then_round_at_a_rate(source: Source) -> None:
    found = Kept()
    walk(source, with_text(parse("tune:ec2.5,steps=0,ridge=0.1")), windows(), found)
    for site, q in found.codes.items():
        assert isinstance(q, Coded)
        assert q.gains is not None  # the Fisher information reached it
        assert 0.994 * 2.5 <= q.bits_per_weight <= 2.5, site


def test_a_card_has_no_gradients(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, card = parse("gptq:ec3"), object.__new__(Card)
    monkeypatch.setattr(Card, "check", lambda *_: None)
    with pytest.raises(RecipeError, match=r"a card holds no Fisher information(.|\n)*fisher=false"):
        walk(source, chosen, None, Kept(), card=card)
