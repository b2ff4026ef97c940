"""Cells of what models write: their evidence against models that are run by hand, and files that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lowbit
from lowbit.calibration import text
from lowbit.cli.run import run_grids
from lowbit.cli.tables import show_reports
from lowbit.errors import EvidenceError, StudyError
from lowbit.evaluation import sampler
from lowbit.evaluation import sampler_evidence as evidence
from lowbit.evaluation.sampler import Grid, Setting
from lowbit.models.source import of_directory
from lowbit.study import assemble, grid, sampling, spec, stages
from lowbit.study.analyses.sampling import panels
from lowbit.study.store import Store
from lowbit.study.view import Model, View
from lowbit.study.worker import StageContext

RECIPES = ["rtn:nf4-g32", "rtn:int8-row-sym"]
SETTINGS = [Setting(0.0), Setting(0.9), Setting(0.9, 5)]


@pytest.fixture(scope="module")
def file(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "text.txt").write_text("".join(f"In year {i} the river fell by {i * i % 89} feet.\n" for i in range(40)))
    (folder / "study.toml").write_text(
        f'name = "sampled"\nmodels = [{json.dumps(str(llama))}]\nrecipes = {json.dumps(RECIPES)}\n'
        'analyses = ["sampling"]\n[evaluation]\ntext = "text.txt"\nprotocol = "windows-32"\nwindows = 4\n'
        'dtype = "float32"\n[sampling]\ntemperatures = [0.0, 0.9]\ntop_k = [0, 5]\nseeds = 2\nprompts = 3\nprompt = 4\n'
        "max_new_tokens = 5\nlengths = [3]\n"
    )
    return folder / "study.toml"


@pytest.fixture(scope="module")
def done(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[grid.Grid, Path]:
    """The grid of the study and the store that holds all of it; read only."""
    study = spec.load(file)
    (planned,) = grid.of_study(study)
    folder = tmp_path_factory.mktemp("store")
    assert run_grids(folder, study.name, study.model_dump(), [planned], 1) == 0
    return planned, folder


def folders(done: tuple[grid.Grid, Path]) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """Evidence of the original and of the versions, and the versions' checkpoints."""
    planned, folder = done
    assert planned.texts is not None
    with Store(folder) as store:
        versions = {label: store.evidence_folder(cell.key) for label, cell in planned.texts.versions.items()}
        made = {e.label: store.checkpoint_folder(e.make.key) for e in planned.entries if e.make is not None}
        return store.evidence_folder(planned.texts.reference.key), versions, made


def test_evidence_is_what_the_checkpoints_write_by_hand(done: tuple[grid.Grid, Path], llama: Path, file: Path) -> None:
    original, versions, made = folders(done)
    source = of_directory(llama)
    prompts = text.sample(
        text.read(str(file.parent / "text.txt"), "evaluation"), source.tokenizer, 3, 4, 0
    ).ids.tolist()
    reference = stages.dense_model(llama, "float32")
    low = lowbit.load(made[RECIPES[0]], kernels="dense")
    asked = Grid.of([0.0, 0.9], [None, 5], range(2), 5)
    found, provenance = evidence.read_texts(versions[RECIPES[0]])
    own, base = evidence.read_texts(original)
    provenance.require_comparable(base)
    assert list(found) == list(own) == SETTINGS
    for texts, model in ((found, low), (own, reference)):
        by_hand = sampler.write(model, reference, prompts, asked)
        for setting in SETTINGS:
            for name in ("prompt", "seed", "token", "stopped"):
                assert np.array_equal(getattr(texts[setting], name), getattr(by_hand[setting], name))
            np.testing.assert_allclose(texts[setting].nll_ref, by_hand[setting].nll_ref, atol=1e-5)
            np.testing.assert_allclose(texts[setting].nll, by_hand[setting].nll, atol=1e-5)
    plain = own[Setting(0.9)]  # the nearest to the original's own distribution
    tokens = plain.token[2, : plain.length[2]].tolist()  # prompt 1, first seed
    gaps = sampler.gaps(reference, low, [*prompts[1], *tokens], SETTINGS)
    for setting, gap in evidence.read_gaps(versions[RECIPES[0]]).items():
        assert gap.kl[1] == pytest.approx(gaps[setting].kl[3:-1].mean(), abs=1e-6)
        assert gap.total_variation[1] == pytest.approx(gaps[setting].total_variation[3:-1].mean(), abs=1e-6)


def test_costs_are_of_packed_weights_beside_the_original(done: tuple[grid.Grid, Path], llama: Path) -> None:
    original, versions, made = folders(done)
    base = evidence.read_costs(original)
    assert (base.kernels, base.static_bytes) == ({}, sampler.static_bytes(stages.dense_model(llama, "float32")))
    for label, folder in versions.items():
        costs = evidence.read_costs(folder)
        low = lowbit.load(made[label])
        assert sum(costs.kernels.values()) == 2 * 7  # seven linears in each of two blocks
        assert costs.static_bytes == sampler.static_bytes(low) < base.static_bytes
        assert len(costs.rounds) == 3  # one a prompt
        assert all(r.candidate.prompt_tokens == r.reference.prompt_tokens == 4 for r in costs.rounds)
        assert all(r.candidate.decode_seconds != r.reference.decode_seconds for r in costs.rounds)


def test_shorter_lengths_are_read_off_the_same_cells(file: Path) -> None:
    (first,) = grid.of_study(spec.load(file))
    other = file.with_name("longer.toml")
    other.write_text(file.read_text().replace("lengths = [3]", "lengths = [2, 4]"))
    (second,) = grid.of_study(spec.load(other))
    assert first.texts is not None
    assert second.texts is not None
    assert first.texts.cells == second.texts.cells
    assert {cell.inputs[0] for cell in first.texts.versions.values()} == {first.texts.reference.key}


def test_lengths_beyond_the_texts_are_refused(file: Path) -> None:
    other = file.with_name("beyond.toml")
    other.write_text(file.read_text().replace("lengths = [3]", "lengths = [3, 5]"))
    with pytest.raises(StudyError, match=r"sampling: lengths \[5\] are not below max_new_tokens = 5"):
        spec.load(other)


def test_the_panel_is_shown_and_a_study_without_texts_is_told_what_is_missing(
    done: tuple[grid.Grid, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    planned, folder = done
    show_reports(folder, "sampled", [planned], "plain", analyses=["sampling"])
    shown = capsys.readouterr().out
    assert shown.index("over samplers") < shown.index("\nClaims") < shown.index("What one text at a time takes")
    show_reports(folder, "sampled", [planned], "json", analyses=["sampling"])
    (panel,) = json.loads(capsys.readouterr().out)["panels"]
    assert {f["key"] for f in panel["figures"]} == {
        "surface",
        "total-variation",
        "parting-greedy",
        "parting-drawn",
    }
    with Store(folder) as store:
        bare = Model(store, replace(planned, texts=None), assemble.report(store, "sampled", planned))
        with pytest.raises(StudyError, match=r"nothing is written[^\n]*\nTry: a table \[sampling\]"):
            panels(View("bare", [bare]))


def test_a_text_that_changed_and_prompts_that_do_not_fit_fail(done: tuple[grid.Grid, Path], tmp_path: Path) -> None:
    planned, folder = done
    assert planned.texts is not None
    with Store(folder) as store:
        for change, said in (
            ({"text_digest": "0"}, "changed after"), ({"model_digest": "0"}, "changed after"),
            ({"max_new_tokens": 125}, "at most 128"),
        ):  # fmt: skip
            params = {**planned.texts.reference.params, **change}
            with pytest.raises(StudyError, match=said):
                sampling.write(StageContext("k", "l", params, tmp_path, (), store, lambda _: None))


def _table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        pq.write_table(change(pq.read_table(path)), path)

    return damage


def _set(name: str, value: Callable[[list[Any]], list[Any]]) -> Callable[[Path], None]:
    def change(t: pa.Table) -> pa.Table:
        field = t.schema.field(name)
        at = t.schema.get_field_index(name)
        return t.set_column(at, field, pa.array(value(t[name].to_pylist()), field.type))

    return _table(change)


TEXT_DAMAGE = {
    "no parquet": lambda path: path.write_bytes(b"PAR1"),
    "no provenance": _table(lambda t: t.replace_schema_metadata({})),
    "no column": _table(lambda t: t.drop_columns(["nll_ref"])),
    "a wide column": _table(lambda t: t.set_column(2, "prompt", t["prompt"].cast(pa.int64()))),
    "no rows": _table(lambda t: t.slice(0, 0)),
    "a null": _set("stopped", lambda v: [None, *v[1:]]),
    "a null in a list": _set("token", lambda v: [[None, *v[0][1:]], *v[1:]]),
    "ragged": _set("nll", lambda v: [v[0][1:], *v[1:]]),
    "narrower": _set("nll", lambda v: [x[1:] for x in v]),
    "not finite": _set("nll_ref", lambda v: [[float("nan"), *v[0][1:]], *v[1:]]),
    "no tokens": _set("token", lambda v: [[-1] * len(v[0]), *v[1:]]),
    "other seeds": _set("seed", lambda v: [7, *v[1:]]),
}
GAP_DAMAGE = {
    "negative": _set("kl", lambda v: [-1.0, *v[1:]]),
    "infinite": _set("total_variation", lambda v: [float("inf"), *v[1:]]),
    "out of order": _set("prompt", lambda v: [1, 0, *v[2:]]),
    "fewer rows": _table(lambda t: t.slice(1)),
}


def _json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        held = json.loads(path.read_text())
        change(held)
        path.write_text(json.dumps(held))

    return damage


COST_DAMAGE = {
    "no JSON": lambda path: path.write_text("{"),
    "a field more": _json(lambda c: c.update(more=1)),
    "one round": _json(lambda c: c.update(rounds=c["rounds"][:1])),
    "a word for a number": _json(lambda c: c.update(threads="1")),
    "no time": _json(lambda c: c["rounds"][0]["candidate"].update(decode_seconds=0.0)),
    "no tokens": _json(lambda c: c["rounds"][0]["reference"].update(prompt_tokens=0)),
}
READERS: dict[str, Callable[[Path], Any]] = {
    evidence.TEXTS: evidence.read_texts, evidence.GAPS: evidence.read_gaps, evidence.COSTS: evidence.read_costs,
}  # fmt: skip
DAMAGES = [
    pytest.param(name, damage, id=f"{name}: {what}")
    for name, damages in ((evidence.TEXTS, TEXT_DAMAGE), (evidence.GAPS, GAP_DAMAGE), (evidence.COSTS, COST_DAMAGE))
    for what, damage in damages.items()
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_what_does_not_fit_is_refused(
    done: tuple[grid.Grid, Path], tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    held = folders(done)[1][RECIPES[0]] / name
    (tmp_path / name).write_bytes(held.read_bytes())
    READERS[name](tmp_path)
    damage(tmp_path / name)
    with pytest.raises(EvidenceError):
        READERS[name](tmp_path)


def test_texts_from_other_prompts_or_readers_do_not_compare(done: tuple[grid.Grid, Path]) -> None:
    original, versions, _ = folders(done)
    base, other = evidence.read_texts(original)[1], evidence.read_texts(versions[RECIPES[1]])[1]
    other.require_comparable(base)
    assert other.model != other.reference == base.model
    for field in ("prompts", "reference", "text_digest"):
        with pytest.raises(EvidenceError, match=f"{field} differs"):
            other.require_comparable(replace(base, **{field: "0"}))
