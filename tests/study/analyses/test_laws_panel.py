"""Best precisions of a family: paired errors against statistics by token, and the paper's claims in known worlds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic_family import COST, family, tokens

from lowbit.errors import EvidenceError
from lowbit.evaluation.statistics import paired_mean
from lowbit.report.panel import Curves, Heat
from lowbit.study import laws
from lowbit.study.analyses.laws import of_family
from lowbit.study.family import Form
from lowbit.study.losses import Apart, Shared


def test_shared_losses_have_the_paired_error_of_their_tokens() -> None:
    evidence = tokens(np.array([1.0, 1.02, 0.5]))
    shared = Shared.of(evidence)
    found = shared.weighted(np.array([1.0, -1.0, 0.0]))
    oracle = paired_mean((evidence[0].nll - evidence[1].nll).astype(np.float64), evidence[0].cluster)
    assert found[:4] == pytest.approx(oracle[:4], rel=1e-6)
    assert (found.n, found.clusters) == (oracle.n, oracle.clusters)
    mixed = shared.weighted(np.array([0.25, 0.75, 0.0]))
    by_token = (0.25 * evidence[0].nll + 0.75 * evidence[1].nll).astype(np.float64)
    assert mixed[:4] == pytest.approx(paired_mean(by_token, evidence[0].cluster)[:4], rel=1e-6)
    drawn = shared.drawn(3000, 0)
    assert np.std(drawn[:, 0] - drawn[:, 1]) == pytest.approx(found.se, rel=0.1)
    assert np.std(drawn[:, 0]) > 10 * found.se  # what the text shares is not the difference's
    with pytest.raises(EvidenceError, match="differ"):
        Shared.of([evidence[0], tokens(np.array([1.0]), clusters=16)[0]])


def test_independent_errors_add_up() -> None:
    found = Apart(np.array([1.0, 2.0]), np.array([0.3, 0.4])).weighted(np.array([1.0, -1.0]))
    assert (found.estimate, found.se) == pytest.approx((-1.0, 0.5))
    assert found.high == pytest.approx(-1.0 + 1.959964 * 0.5)


def test_equal_bytes_is_the_mean_gap_of_two_interpolated_curves() -> None:
    made = family()
    points = made.points()
    found = laws.equal_bytes(points, "rtn:int4-g64", "rtn:int8-g64", made.losses)
    four, eight = (
        sorted((p.nbytes, p.loss) for p in points if p.precision == name) for name in ("rtn:int4-g64", "rtn:int8-g64")
    )
    sizes = np.linspace(math.log(max(four[0][0], eight[0][0])), math.log(min(four[-1][0], eight[-1][0])), laws.SIZES)
    a, b = (np.interp(sizes, np.log([x for x, _ in c]), [y for _, y in c]) for c in (four, eight))
    assert found is not None
    assert found.estimate == pytest.approx(float(np.mean(a - b)), abs=1e-6)
    assert laws.equal_bytes(points, "rtn:int4-g64", "nothing", made.losses) is None


def test_pairing_decides_what_independent_errors_leave_open() -> None:
    made = family()
    points, at = made.points(), [8_000_000]
    (apart,), (paired,) = laws.envelope(points, at), laws.envelope(points, at, losses=made.losses)
    assert paired.precision == apart.precision == "rtn:int4-g64"
    assert paired.chance > 0.99 > apart.chance
    assert sum(chance for _, chance in paired.chances) == pytest.approx(1)
    assert all(m.verdict == "undecided" for m in laws.scale_or_precision(points) if m.difference.estimate < 0.1)
    told = laws.scale_or_precision(points, made.losses)
    assert {m.verdict for m in told if m.larger.precision == "rtn:int4-g64"} == {"larger"}
    assert {m.verdict for m in told if m.larger.precision == "rtn:int2-g64"} == {"smaller"}


def test_claims_follow_the_world() -> None:
    extra = {
        "rtn:nf4-g64": (Form(4.0, 16.0, 16.0, "nf", "g64", "rtn"), 0.005),
        "rtn:int4-row": (Form(4.0, 16.0, 16.0, "int", "row", "rtn"), 0.30),
        "rtn:fp8-e4m3-g64": (Form(8.0, 16.0, 16.0, "fp", "g64", "rtn"), 0.001),
        "outliers:int3-g64": (Form(3.0, 16.0, 16.0, "int", "g64", "outliers", 2.0), 0.13),
    }
    (panel,) = of_family(family(extra=extra))
    verdicts = {c.claim: c.verdict for c in panel.claims}
    assert len(verdicts) == len(panel.claims) == 5
    assert set(verdicts.values()) == {"supported"}
    (panel,) = of_family(family({**COST, 3: 0.02}, {**extra, "rtn:nf4-g64": (extra["rtn:nf4-g64"][0], 0.1)}))
    verdicts = {c.claim: c.verdict for c in panel.claims}
    assert verdicts["For a total of bits, 4 bits are the best width."] == "contradicted"
    assert verdicts["At 4 bits, nf codes do better than integers."] == "contradicted"
    assert sum(v == "contradicted" for v in verdicts.values()) == 2


def test_the_panel_shows_every_version_and_both_ways_to_count() -> None:
    made = family()
    (panel,) = of_family(made)
    best, linears, everything = panel.tables
    assert len(everything.table.rows) == len(made.versions)
    assert linears.folded
    assert len(best.table.rows) == 10
    lines, regret, heat = panel.figures
    assert isinstance(lines, Curves)
    assert {m.series for m in lines.marks} == {"3 bits", "4 bits", "8 bits", "16 bits"}
    assert len(lines.marks) == 4 * len(made.models)
    assert "Lines of 2 bits are left out" in panel.notes[-1]
    assert isinstance(regret, Curves)
    assert all(m.value > 0 for m in regret.marks if m.series == "16 bits")
    assert isinstance(heat, Heat)
    assert {(s.x, s.y) for s in heat.squares} == {(b, "int g64") for b in "2348"}
    assert of_family(made.where([i for i, v in enumerate(made.versions) if v.model == "m2000000"])) == []
