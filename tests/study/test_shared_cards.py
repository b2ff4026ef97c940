"""Statistics that several recipes of a study share: who may, that they are taken once, and that nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.calibration.stats import AbsMax, Gram, Moments
from lowbit.io import native
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import Recipe, parse, with_calibration
from lowbit.pipeline.shared import shareable
from lowbit.study import engine, grid, stages
from lowbit.study.executors import inline
from lowbit.study.spec import Study
from lowbit.study.store import Store

SHARING = ["gptq:int3-g32", "gptq:int2-g32", "llmint8:int8-row-sym"]


def cells_of(llama: Path, recipes: list[str], **calibration: Any) -> grid.Grid:
    value = {
        "name": "s", "models": [str(llama)], "recipes": recipes,
        "calibration": {"samples": 12, "length": 32, "propagate": "original", **calibration},
        "evaluation": {"protocol": "windows-32", "windows": 4, "dtype": "float32"},
    }  # fmt: skip
    (found,) = grid.of_study(Study.model_validate(value))
    return found


@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("gptq:int3-g32", {Gram}),
        ("rtn:int3-g32,weighted=true", {Moments}),
        ("llmint8:int8-row-sym", {AbsMax}),
        ("rtn:int4-g32", set()),  # knows no activation
        ("awq+gptq:int3-g32", set()),  # edits the block that is watched
        ("tune:int3-g32", set()),  # runs blocks
        ("gptq:ec3", set()),  # takes gradients
    ],
)
def test_encoders_alone_can_share_what_the_original_reads(line: str, kinds: set[Any]) -> None:
    assert shareable(with_calibration(parse(line), propagate="original")) == kinds
    assert shareable(parse(line)) == set()  # each has its own low-bit blocks before the next


def test_a_card_is_one_cell_that_no_other_recipe_moves(llama: Path) -> None:
    both = cells_of(llama, [*SHARING, "rtn:nf4", "awq+gptq:int3-g32"])
    makes = {entry.label: entry.make for entry in both.entries}
    gram, light = both.cards
    assert [makes[line].inputs for line in SHARING] == [(gram.key,), (gram.key,), (light.key,)]  # type: ignore[union-attr]
    assert makes["rtn:nf4"].inputs == makes["awq+gptq:int3-g32"].inputs == ()  # type: ignore[union-attr]
    assert cells_of(llama, SHARING[:1]).cards == (gram,)
    assert {cell.key for cell in cells_of(llama, SHARING[:1]).cells} < {cell.key for cell in both.cells}
    assert cells_of(llama, SHARING[:1], seed=1).cards[0].key != gram.key
    assert cells_of(llama, SHARING, propagate="quantized").cards == ()


def test_a_study_observes_once_and_makes_what_each_walk_would(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"In year {i} the river rose by {i * i % 89} feet.\n" for i in range(20)))
    found = cells_of(llama, SHARING[:2], text=str(text))
    first, second = (entry.make for entry in found.entries if entry.make is not None)
    assert first is not None
    assert second is not None

    def computed(store: Store, *cells: engine.Cell) -> list[engine.Cell]:
        told: list[engine.Event] = []
        with inline() as executor:
            assert engine.run(store, cells, executor, told.append).failed == 0
        return [event.cell for event in told if isinstance(event, engine.CellDone)]

    with Store(tmp_path / "store") as store:
        assert computed(store, *found.cards, first) == [*found.cards, first]
        assert computed(store, *found.cards, first, second) == [second]
        shared = dict(native.qtensors(store.checkpoint_folder(second.key)))
    recipe = Recipe.model_validate(second.params["recipe"])
    stages.make(of_directory(llama), recipe, tmp_path / "alone", torch.float32, lambda *_: None)
    alone = dict(native.qtensors(tmp_path / "alone"))
    assert shared.keys() == alone.keys()
    for site, q in alone.items():
        assert float((shared[site].decode() != q.decode()).float().mean()) < 0.01, site
