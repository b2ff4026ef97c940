"""A family from a store: sizes counted both ways, losses of two models paired, and the panels of a tiny study."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import family_model, save_model

from lowbit import digest
from lowbit.cli.run import run_grids
from lowbit.errors import EvidenceError
from lowbit.evaluation.evidence import read_tokens
from lowbit.evaluation.statistics import paired_mean
from lowbit.io import native
from lowbit.pipeline.recipe import parse
from lowbit.study import assemble, grid, spec
from lowbit.study.family import SIXTEEN, Family, form, of_view
from lowbit.study.store import Store
from lowbit.study.view import Model, View

RECIPES = ["rtn:int4-g32", "rtn:int8-g32+a:int8-token", "kv:int4-head"]


@pytest.fixture(scope="module")
def done(llama: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[grid.Grid]]:
    """Two models of one tokenizer, scored; read only."""
    folder = tmp_path_factory.mktemp("family")
    small = save_model(
        family_model("llama", hidden_size=32, num_attention_heads=2, num_hidden_layers=1), tokenizer, folder / "small"
    )
    (folder / "text.txt").write_text("".join(f"In year {i} the river fell by {i * i % 89} feet.\n" for i in range(40)))
    asked = [
        {
            "id": f"c/{i}",
            "context": f"Is {i} odd?",
            "choices": [digest.of_value([i, k])[:6] for k in range(3)],
            "answer": 0,
        }
        for i in range(6)
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(item) + "\n" for item in asked))
    (folder / "study.toml").write_text(
        f'name = "family"\nmodels = {json.dumps([str(llama), str(small)])}\nrecipes = {json.dumps(RECIPES)}\n'
        '[evaluation]\ntext = "text.txt"\nprotocol = "windows-32/chunk-16"\nwindows = 4\ndtype = "float32"\n'
        '[tasks]\nrun = ["own.jsonl"]\nfloor = false\n'
    )
    study = spec.load(folder / "study.toml")
    grids = grid.of_study(study)
    assert run_grids(folder / "store", study.name, study.model_dump(), grids, 1) == 0
    return Store(folder / "store"), grids


@pytest.fixture(scope="module")
def view(done: tuple[Store, list[grid.Grid]]) -> View:
    store, grids = done
    return View("family", [Model(store, g, assemble.report(store, "family", g)) for g in grids])


@pytest.fixture(scope="module")
def family(view: View) -> Family:
    found = of_view(view)
    assert found is not None
    return found


def test_linears_are_counted_as_the_manifest_has_them(done: tuple[Store, list[grid.Grid]], family: Family) -> None:
    store, grids = done
    sizes = {(v.model, v.label): v for v in family.versions}
    assert family.models == ["small", "llama"]
    for g in grids:
        original = sizes[g.model, SIXTEEN]
        for entry in g.entries:
            assert entry.make is not None
            manifest = native.verify(store.checkpoint_folder(entry.make.key), contents=False)
            version = sizes[g.model, entry.label]
            stored = sum(site["nbytes"] for site in manifest["sites"])
            assert version.linears == (stored or original.linears)
            assert version.total > version.linears
        assert original.total == 2 * original.parameters
        assert original.linears < original.total


def test_two_models_pair_token_by_token(done: tuple[Store, list[grid.Grid]], family: Family) -> None:
    store, grids = done
    one, other = (read_tokens(store.evidence_folder(g.reference.key))[0] for g in grids)
    places = [i for g in grids for i, v in enumerate(family.versions) if (v.model, v.label) == (g.model, SIXTEEN)]
    found = family.losses.weighted(family.weights(plus=places[:1], minus=places[1:]))
    oracle = paired_mean((one.nll.astype(np.float64) - other.nll), one.cluster)
    assert found[:4] == pytest.approx(oracle[:4], rel=1e-5)


def test_every_analysis_of_a_family_has_a_panel(done: tuple[Store, list[grid.Grid]]) -> None:
    store, grids = done
    found = assemble.study(store, "family", grids, ["laws", "scale", "budgets", "proxy"])
    assert found is not None
    assert [p.key for p in found.panels] == ["laws", "scale", "budgets", "proxy-0", "proxy-1"]
    budgets = found.panels[2]
    assert {row.cells[0].main for row in budgets.tables[0].table.rows} == {
        "weights", "weights and activations", "keys and values",
    }  # fmt: skip
    assert any("own of llama" in note for note in budgets.notes)  # random models answer at chance
    assert "4 versions" in found.panels[3].lead[0]


def test_models_of_unlike_texts_are_refused(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Model.tokens

    def other(self: Model, cell: Any) -> Any:
        found = read(self, cell)
        if self.name == "small" and found is not None:
            return type(found)(**found.columns() | {"token": found.token + 1})
        return found

    monkeypatch.setattr(Model, "tokens", other)
    with pytest.raises(EvidenceError, match="same tokens"):
        of_view(view)


@pytest.mark.parametrize(
    ("line", "kind", "name", "type_", "block"),
    [
        ("rtn:int4-g64", "W", "W4", "int", "g64"), ("gptq:int3-row", "W", "W3", "int", "row"),
        ("rtn:int8-row-sym+a:int8-token", "WA", "W8A8", "int-sym", "row"),
        ("rtn:nf4", "W", "W4", "nf", "g64"), ("rtn:fp6-e3m2-g32", "W", "W6", "fp", "g32"),
        ("rtn:quantile3-g64", "W", "W3", "quantile", "g64"), ("gptq:ec2.5", "W", "W2.5", "ec", "row"),
        ("kv:int4-head", "KV", "KV4", "", ""), ("kv:int2-head:int4-head", "KV", "KV3", "", ""),
        ("rtn:int4-g64+kv:int4-head", "", "W4A16KV4", "int", "g64"),
    ],
)  # fmt: skip
def test_forms_of_recipes(line: str, kind: str, name: str, type_: str, block: str) -> None:
    found = form(parse(line))
    assert (found.kind, found.name, found.type, found.block) == (kind, name, type_, block)
    assert form(parse("outliers:int3-g64,share=2,by=proxy")).outliers == 2
    assert math.isclose(found.outliers, 0)
