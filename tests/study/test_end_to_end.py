"""A whole study of a tiny model: inline, in processes, and killed in the middle give the same findings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.cli.run import run_grids
from lowbit.cli.tables import show_reports
from lowbit.errors import StudyError
from lowbit.study import assemble, grid, spec
from lowbit.study.query import query
from lowbit.study.store import Store

ROOT = Path(lowbit.__path__[0]).parent
MIXED = """
[[step]]
method = "gptq"
format = "int3-g32"
[[override]]
sites = "*.down_proj"
keep = "a test"
"""


@pytest.fixture(scope="module")
def file(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three recipes on short windows of its own text."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "mixed.toml").write_text(MIXED)
    (folder / "text.txt").write_text(
        "".join(f"In year {i} the river rose by {i * i % 89} feet and fell again.\n" for i in range(60))
    )
    study = {"name": "tiny", "models": [str(llama)], "recipes": ["rtn:int4-g32", "gptq:int4-g32", "mixed.toml"]}
    (folder / "study.toml").write_text(
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in study.items())
        + '[calibration]\ntext = "text.txt"\nsamples = 4\nlength = 32\n'
        + '[evaluation]\ntext = "text.txt"\nprotocol = "windows-32"\nwindows = 12\n'
        + 'attribute = ["mixed.toml"]\nattribution_windows = 2\nattribution_length = 16\n'
    )
    return folder / "study.toml"


def run(file: Path, folder: Path, jobs: int = 1) -> int:
    study = spec.load(file)
    grids = grid.of_study(study)
    failed = run_grids(folder, study.name, study.model_dump(), grids, jobs)
    show_reports(folder, study.name, grids, "none", folder / "report.html")
    return failed


def found(folder: Path) -> dict[tuple[str, str], Any]:
    """Every finding by the label of its cell and its metric."""
    with Store(folder) as store:
        return {(store.cell(row.key).label, row.metric): row.value for row in store.findings()}


@pytest.fixture(scope="module")
def inline(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an undisturbed run in this process; read only."""
    folder = tmp_path_factory.mktemp("inline")
    assert run(file, folder) == 0
    return folder


def test_findings_are_stored_as_the_table_adjusts_them(inline: Path) -> None:
    findings = found(inline)
    assert {label for label, _ in findings} == {"score rtn:int4-g32", "score gptq:int4-g32", "score mixed"}
    assert {metric for _, metric in findings} == {
        "delta_log_perplexity", "kl", "top1_kept", "delta_top1_accuracy",
    }  # fmt: skip
    tested = [f for f in findings.values() if f["p"] is not None]
    assert all(f["rule"] == f"holm, {len(tested)} tests" for f in tested)
    assert all(f["p_adjusted"] >= f["p"] for f in tested)
    assert any(f["p_adjusted"] > f["p"] for f in tested)


def test_the_report(file: Path, inline: Path) -> None:
    assert "<html" in (inline / "report.html").read_text()
    study = spec.load(file)
    (only,) = grid.of_study(study)
    with Store(inline) as store:
        report = assemble.report(store, study.name, only, command="lowbit study run study.toml")
        made = {entry.label: store.cell(entry.score.key) for entry in only.entries}
    assert report.title == "llama: 3 versions beside the original"
    assert report.command == "lowbit study run study.toml"
    assert report.reference.label == "llama (original)"
    assert report.reference.bits_per_weight == 16  # its files hold float32: 16 bit is the baseline
    assert "its files take" in dict(report.configuration)["size of the original"]
    candidates = {c.label: c for c in report.candidates}
    assert set(candidates) == {"rtn:int4-g32", "gptq:int4-g32", "mixed"}
    assert candidates["mixed"].recipe == "gptq:int3-g32+1"
    assert candidates["gptq:int4-g32"].bits_per_weight == pytest.approx(4 + 20 / 32)
    assert dict(report.configuration)["mixed: *.down_proj"] == "kept in 16 bit: a test"
    calibration = dict(report.configuration)["calibration of gptq:int4-g32, mixed"]
    assert calibration == "text.txt, 4 windows of 32 tokens, seed 0, quantized propagated"
    for label, candidate in candidates.items():
        assert candidate.digest == (made[label].output or {})["digest"]
        assert candidate.peak_bytes > 0
        assert candidate.seconds > 0
        assert [band.low_pos for band in candidate.kl_by_position] == [1, 8, 16]
        assert sum(band.n for band in candidate.kl_by_position) == report.protocol.tokens == 12 * 31
        kl = candidate.finding("kl")
        assert kl is not None
        mean = sum(band.n * band.value for band in candidate.kl_by_position) / report.protocol.tokens
        assert mean == pytest.approx(kl.value, rel=1e-6)
    assert [b.block for b in candidates["mixed"].kl_by_block] == [0, 1]
    assert candidates["rtn:int4-g32"].kl_by_block == ()


def test_flips_are_told_in_the_words_of_the_text(file: Path, inline: Path) -> None:
    text = (file.parent / "text.txt").read_text()
    (only,) = grid.of_study(spec.load(file))
    with Store(inline) as store:
        report = assemble.report(store, "tiny", only)
    flips = [flip for candidate in report.candidates for flip in candidate.flips]
    assert flips
    for flip in flips:
        assert flip.context + flip.target in text
        assert flip.reference_choice != flip.candidate_choice
        assert (flip.kind == "lost") == (flip.reference_choice == flip.target)
        assert (flip.kind == "gained") == (flip.candidate_choice == flip.target)


def test_again_computes_nothing(file: Path, inline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = found(inline)
    assert run(file, inline) == 0
    assert "0 cells computed, 9 were there" in capsys.readouterr().err
    assert found(inline) == before


def test_processes_find_the_same(file: Path, inline: Path, tmp_path: Path) -> None:
    assert run(file, tmp_path, jobs=2) == 0
    assert found(tmp_path) == found(inline)


KILLED = """
import os, sys
from lowbit.io.native import Writer
write, count = Writer.write, 0
def dying(self, *args):
    global count
    count += 1
    if count == 4:  # the second block of the second recipe
        os.kill(os.getpid(), 9)
    write(self, *args)
Writer.write = dying
sys.argv = ["lowbit", "study", "run", sys.argv[1], "--store", sys.argv[2]]
from lowbit.cli import main
main()
"""


def test_killed_in_the_middle_it_goes_on(
    file: Path, inline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", KILLED, str(file), str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert found(tmp_path) == {}
    (half,) = tmp_path.glob("checkpoints/*/lowbit-work.json")
    assert [p.name for p in half.parent.glob("lowbit-block-*.safetensors")] == ["lowbit-block-00000.safetensors"]
    assert run(file, tmp_path) == 0
    assert "5 cells computed, 4 were there" in capsys.readouterr().err
    assert found(tmp_path) == found(inline)
    assert not half.exists()
    manifest = json.loads((half.parent / "lowbit.json").read_text())
    assert manifest["resumed"]


def test_a_failure_stops_only_what_needs_it(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "greedy.toml").write_text(MIXED + "[calibration]\nsamples = 100000\n")
    study = spec.load(file).model_copy(update={"recipes": ["rtn:int4-g32", str(tmp_path / "greedy.toml")]})
    study = study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"attribute": []})})
    grids = grid.of_study(study)
    assert run_grids(tmp_path / "store", study.name, study.model_dump(), grids, 1) == 2
    said = capsys.readouterr().err
    assert "make greedy: FAILED: text.txt: has" in said
    assert "score greedy: not run: it needs 'make greedy', which failed\n" in said
    assert "1 failed, 1 not run because of it" in said
    assert "Traceback" not in said
    with Store(tmp_path / "store") as store:
        assert [c.label for c in assemble.report(store, study.name, grids[0]).candidates] == ["rtn:int4-g32"]


def test_without_the_reference_there_is_no_table(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grids = grid.of_study(spec.load(file))
    with Store(tmp_path) as store, pytest.raises(StudyError, match="'reference llama' is not done yet"):
        assemble.report(store, "tiny", grids[0])
    show_reports(tmp_path, "tiny", grids, "plain", tmp_path / "report.html")
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'report.html'}\n"  # a page that says what is missing, and no table
    assert "llama: no table, because 'reference llama' is not done" in shown.err
    assert "reference llama" in (tmp_path / "report.html").read_text()


def test_sql_over_every_token(inline: Path) -> None:
    by_label = "SELECT label, avg(kl) AS kl, count(*) AS n FROM tokens JOIN cells USING (key) GROUP BY label"
    of_kl = "SELECT label, value FROM findings JOIN cells USING (key) WHERE metric = 'kl'"
    with Store(inline) as store:
        tokens = {row["label"]: row for row in query(store, "tiny", by_label).to_pylist()}
        findings = query(store, "tiny", of_kl).to_pylist()
        with pytest.raises(StudyError, match="syntax error"):
            query(store, "tiny", "SELEC 1")
        with pytest.raises(StudyError, match="members"):  # variables of the program are no tables
            query(store, "tiny", "SELECT * FROM members")
    assert {row["n"] for row in tokens.values()} == {12 * 31}
    assert len(findings) == 3
    for row in findings:
        assert row["value"] == pytest.approx(tokens[row["label"]]["kl"], rel=1e-6)


def test_a_model_that_changes_under_a_study_fails_its_cells(
    file: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit.study import stages

    (only,) = grid.of_study(spec.load(file))
    params = {**only.reference.params, "model_digest": "0" * 64}
    with pytest.raises(StudyError, match="changed after this cell was planned"):
        stages._source(params)
    with pytest.raises(StudyError, match="changed after this cell was planned"):
        stages._windows({**only.reference.params, "text_digest": "0" * 64})
