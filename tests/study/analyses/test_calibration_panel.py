"""Calibration texts: intervals cover where seeds and tokens are drawn, verdicts follow the losses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lowbit.errors import EvidenceError, StudyError
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.statistics import paired_mean
from lowbit.report.model import Candidate, Environment, Report, ScoringProtocol
from lowbit.report.panel import Curves
from lowbit.study import grid, spec
from lowbit.study.analyses import calibration
from lowbit.study.analyses.calibration import Recipe, kind, panel
from lowbit.study.analyses.replicates import components, contrast
from lowbit.study.store import Store
from lowbit.study.view import Model, View

CLUSTERS, EACH = 16, 4
CLUSTER = np.repeat(np.arange(CLUSTERS), EACH)


def drawn(rng: np.random.Generator, mean: float, seeds: int, between: float = 1.0) -> np.ndarray:
    """Losses of a text: its mean, what each seed adds, what each cluster of tokens adds, and what both do together."""
    seed, place = rng.normal(0, between, (seeds, 1)), rng.normal(0, 1, CLUSTERS)[CLUSTER]
    return mean + seed + place + rng.normal(0, 1, (seeds, len(CLUSTER)))


def test_intervals_cover_where_seeds_and_tokens_are_drawn() -> None:
    rng = np.random.default_rng(0)
    covered = ignored = 0
    for _ in range(200):
        losses = {"a": drawn(rng, 1.0, 3), "b": drawn(rng, 0.5, 4)}
        found = contrast(losses, {"a": 1.0, "b": -1.0}, CLUSTER)
        covered += found.low <= 0.5 <= found.high
        tokens_only = paired_mean(losses["a"].mean(0) - losses["b"].mean(0), CLUSTER)
        ignored += tokens_only.low <= 0.5 <= tokens_only.high
    assert 0.93 <= covered / 200 <= 0.995
    assert ignored / 200 < 0.8  # the reason for counting seeds


def test_without_spread_of_tokens_a_contrast_is_welchs() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, 5), rng.normal(0, 2, 4)
    flat = {name: np.repeat(m[:, None], len(CLUSTER), 1) for name, m in (("a", a), ("b", b))}
    found = contrast(flat, {"a": 1.0, "b": -1.0}, CLUSTER)
    oracle = stats.ttest_ind(a, b, equal_var=False)
    assert found.estimate / found.se == pytest.approx(oracle.statistic)
    assert found.clusters - 1 == int(oracle.df)
    with pytest.raises(EvidenceError, match="one seed"):
        contrast({"a": flat["a"][:1]}, {"a": 1.0}, CLUSTER)


def test_components_against_scipy_and_the_truth() -> None:
    rng = np.random.default_rng(2)
    groups = [g + rng.normal(0, 1, 3 + i % 3) for i, g in enumerate(rng.normal(0, 2, 400))]
    found = components(groups)
    assert found.p == pytest.approx(stats.f_oneway(*groups).pvalue, abs=1e-12)
    assert [found.between, found.within] == pytest.approx([2, 1], rel=0.1)
    assert found.low < found.within < found.high
    few = components(groups[:4])
    assert few.p == pytest.approx(stats.f_oneway(*groups[:4]).pvalue)
    assert components([np.array([1.0, 3.0]), np.array([2.0, 2.0])]).between == 0.0
    with pytest.raises(EvidenceError):
        components([np.array([1.0]), np.array([2.0])])


def test_matched_by_the_first_word() -> None:
    assert kind("wikitext2_train_1mb.txt", "/data/lm/wikitext2_test.txt") == "matched"
    assert kind("pydoc", "pydoc") == "matched"
    assert kind("gutenberg_valid.txt", "/data/lm/wikitext2_test.txt") == "shifted"
    assert [kind(t, "pydoc") for t in ("self", "random")] == ["self", "random"]


def recipe(name: str, means: dict[str, float], seeds: int) -> Recipe:
    rng = np.random.default_rng(3)
    kl = {t: np.abs(m + 0.02 * drawn(rng, 0.0, seeds, 0.2)) for t, m in means.items()}
    return Recipe(name, {t: tuple(range(seeds)) for t in means}, kl, {t: v - 0.1 for t, v in kl.items()}, CLUSTER)


def test_verdicts_follow_the_losses() -> None:
    gptq = recipe("gptq:int3", {"wiki_train": 1.0, "books": 1.5, "self": 1.05, "random": 2.0}, 4)
    awq = recipe("awq+rtn:int3", {"wiki_train": 1.0, "books": 1.0, "self": 1.6, "random": 1.6}, 4)
    shown = panel("c-0", "Calibration", [gptq, awq], "wiki_test")
    verdicts = {c.claim: c.verdict for c in shown.claims if not c.claim.endswith("log-ppl)")}
    told = {c: v for c, v in verdicts.items() if c.startswith(("gptq:int3: text", "awq+rtn:int3: text"))}
    assert list(told.values()) == ["supported", "undecided"]
    own = [v for c, v in verdicts.items() if "own text loses less" in c]
    assert own == ["supported", "contradicted"]
    random = [v for c, v in verdicts.items() if c.endswith("random tokens lose more than the model's own text (KL)")]
    assert random == ["supported", "undecided"]
    across = [v for c, v in verdicts.items() if "costs gptq:int3 more than awq+rtn:int3" in c]
    assert across == ["supported"]
    assert "KL is least with wiki_train (matched)" in shown.lead[0]
    assert "most with random, " in shown.lead[0]
    by_text = next(t.table for t in shown.tables if t.title == "By calibration text")
    assert [row.cells[2].main for row in by_text.rows] == ["4"] * 8
    assert by_text.rows[1].cells[3].main.startswith("1.5")
    marks = [len(f.marks) for f in shown.figures if isinstance(f, Curves)]
    assert marks == [16, 16]


def test_one_seed_gives_no_verdict() -> None:
    shown = panel("c-0", "Calibration", [recipe("gptq:int3", {"wiki_train": 1.0, "books": 1.5}, 1)], "wiki_test")
    assert not shown.claims
    assert any("two seeds" in note for note in shown.notes)


def test_versions_are_found_by_what_the_study_calls_them(llama: Path, tmp_path: Path) -> None:
    """The labels are those that the grid gives; one version is not scored yet."""
    for name in ("river_test.txt", "river_train.txt"):
        (tmp_path / name).write_text(f"The {name} rose and fell.\n" * 40)
    (tmp_path / "s.toml").write_text(
        f'name = "s"\nmodels = [{json.dumps(str(llama))}]\nrecipes = ["gptq:int3-g32", "rtn:int3-g32"]\n'
        '[evaluation]\ntext = "river_test.txt"\nprotocol = "windows-32"\nwindows = 4\n'
        '[calibrations]\ntexts = ["river_train.txt", "random"]\nseeds = [0, 7]\n'
    )
    (planned,) = grid.of_study(spec.load(tmp_path / "s.toml"))
    scored = [entry for entry in planned.entries if entry.label != "gptq:int3-g32 (random, seed 7)"]
    assert len(scored) == 4
    with Store(tmp_path / "store") as store:
        kept = {entry.score.key: tokens(i) for i, entry in enumerate(scored)}
        model = Model(store, planned, report([entry.label for entry in scored]), kept)
        (shown,) = calibration.panels(View("s", [model]))
    rows = [[(cell.main, cell.sub) for cell in row.cells[:3]] for row in shown.tables[0].table.rows]
    assert rows == [
        [("gptq:int3-g32", ""), ("river_train.txt", "matched"), ("2", "")],
        [("gptq:int3-g32", ""), ("random", ""), ("1", "")],
    ]
    assert shown.tables[0].table.rows[0].cells[4].main.startswith("0.7")  # the SD of 1 and 2 nat
    with pytest.raises(StudyError, match="nothing to compare"):
        calibration.panels(View("t", []))


def tokens(kl: int) -> Tokens:
    """One nat of KL more for each version."""
    n = len(CLUSTER)
    zero = np.zeros(n)
    noisy = kl + 1 + np.random.default_rng(kl).normal(0, 0.01, n)
    return Tokens.of({
        "doc": CLUSTER, "chunk": CLUSTER, "pos": np.arange(n), "token": zero, "nll": noisy, "nll_ref": zero,
        "kl": noisy, "top1": zero, "top1_ref": zero, "margin_ref": zero, "top1_p": zero, "entropy_ref": zero,
    })  # fmt: skip


def report(labels: list[str]) -> Report:
    original, *shown = (
        Candidate(label, "m", label, "d", 1, 3.0, 0.0, 0, is_reference=not i)
        for i, label in enumerate(["original", *labels])
    )
    scored = ScoringProtocol("t", "d", 4, 32, 64, CLUSTERS, "float32")
    return Report("t", "now", "", "s", original, tuple(shown), None, scored, Environment((), ""), "holm")
