"""What is said of samplers: verdicts that follow the evidence, and numbers against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowbit.evaluation.metrics.generations import END, Texts, distinct
from lowbit.evaluation.sampler import Cost, Gap, Setting
from lowbit.evaluation.sampler_evidence import Costs, Round
from lowbit.report.panel import Curves, Heat
from lowbit.study.analyses.sampling import lead, tables
from lowbit.study.analyses.sampling.claims import claims, speed
from lowbit.study.analyses.sampling.evidence import Version, Wrote
from lowbit.study.analyses.sampling.figures import figures

SETTINGS = [Setting(0.0), Setting(0.6), Setting(0.6, 5), Setting(1.0)]
PROMPTS, SEEDS, STEPS = 16, 2, 12
RNG = np.random.default_rng(5)
TOKENS = RNG.integers(0, 50, (PROMPTS * SEEDS, STEPS)).astype(np.int32)
NLL = RNG.uniform(1, 3, TOKENS.shape)


def texts(shift: float, changed: float, seed: int) -> Texts:
    """Texts whose likelihood moved by about ``shift``, a share of them changed from some token on; one ends early."""
    rng = np.random.default_rng(seed)
    token, n = TOKENS.copy(), len(TOKENS)
    for i in range(n):
        if rng.random() < changed:
            token[i, rng.integers(0, STEPS) :] += 50
    nll = (NLL + shift + rng.normal(0, 0.02, (n, 1)) * bool(shift)).astype(np.float32)
    token[3, 6:], nll[3, 6:] = END, 0
    prompt, seeds = np.divmod(np.arange(n, dtype=np.int32), SEEDS)
    return Texts(prompt, seeds, token, np.arange(n) == 3, nll, nll)


def version(
    label: str, bits: float, pace: float, shift: float = 0.0, *, band: float = 0.0, changed: float = 0.0, seed: int = 1
) -> Version:
    """``pace`` is its speed beside the original's, ``band`` what its distance gains at 0.6; each with some noise."""
    rng = np.random.default_rng(seed)
    load = rng.uniform(1, 4, 8)  # what else the machine does slows both alike
    rounds = tuple(
        Round(*(Cost(6, 0.02 * k * s, 8, 0.1 * k * s, 140, 9000) for s in (rng.uniform(0.97, 1.03) / pace, 1.0)))
        for k in load
    )
    costs = Costs("float32", 1, {"packed": 14} if bits < 16 else {}, 1000 * round(bits), 500, rounds)
    gaps = {
        s: Gap(rng.uniform(0.1, 0.2, PROMPTS), 0.2 + band * (s.temperature == 0.6) + rng.uniform(0, 0.02, PROMPTS))
        for s in SETTINGS
    }
    wrote = {s: texts(shift + band * (s.temperature == 0.6), changed, seed) for s in SETTINGS}
    return Version(label, label, bits, wrote, costs, {} if bits == 16 else gaps)


def wrote(*versions: Version) -> Wrote:
    return Wrote(version("model", 16.0, 1.0), versions, STEPS, (4,))


def verdicts(found: Wrote) -> list[str]:
    return [c.verdict for c in claims(found)]


def test_verdicts_follow_the_evidence() -> None:
    as_claimed = wrote(
        version("llmint8:int8-row-sym", 8.1, 0.2), version("rtn:nf4", 4.5, 0.6, 0.10, band=0.1, seed=2),
        version("rtn:fp4", 4.5, 0.7, 0.11, band=0.1, seed=3),
    )  # fmt: skip
    assert verdicts(as_claimed) == ["supported"] * 5
    otherwise = wrote(
        version("llmint8:int8-row-sym", 8.1, 2.0), version("rtn:nf4", 4.5, 1.5, 0.10, band=-0.1, seed=2),
        version("rtn:fp4", 4.5, 0.7, 0.40, band=-0.1, seed=3),
    )  # fmt: skip
    assert verdicts(otherwise) == ["contradicted"] * 5
    # as fast as its rival, and no claim of formats or bands that are not there
    assert verdicts(wrote(version("rtn:int8-row-sym", 8.0, 0.5), version("gptq:int3-g64", 3.3, 0.5, seed=2))) == [
        "undecided", "supported"
    ]  # fmt: skip


def test_claims_name_the_rival_that_speaks_least_for_them() -> None:
    found = claims(
        wrote(version("llmint8:int8", 8.1, 0.2), version("a", 3.0, 0.25, seed=2), version("b", 3.0, 0.9, seed=3))
    )
    assert "times the speed of a; 8 rounds, 1 thread" in found[0].found
    assert "times the speed of b; 8 rounds, 1 thread" in found[1].found
    assert float(found[0].found.split()[0]) == pytest.approx(0.2 / 0.25, rel=0.05)


def test_speed_is_that_of_turns_whatever_else_the_machine_does() -> None:
    v = version("a", 4.5, 0.25)
    logs = [math.log(r.reference.decode_seconds / r.candidate.decode_seconds) for r in v.costs.rounds]
    interval = speed(v)
    assert interval.estimate == pytest.approx(np.mean(logs))
    assert interval.se == pytest.approx(np.std(logs, ddof=1) / math.sqrt(8))
    assert interval.high - interval.low < 0.1 < np.std([r.candidate.decode_rate for r in v.costs.rounds])


def test_tables_hold_paired_shifts_levels_and_costs() -> None:
    found = wrote(version("rtn:nf4", 4.5, 0.5, 0.3, changed=0.9), version("rtn:same", 4.5, 1.0))
    main = tables.main(found).table
    assert [c.main for c in main.rows[2].cells[1:6]] == ["0"] * 5
    shift = np.mean([
        v.nll_ref.sum(1) / v.length - b.nll_ref.sum(1) / b.length
        for v, b in ((found.versions[0].texts[s], found.original.texts[s]) for s in SETTINGS)
    ])  # fmt: skip
    assert float(main.rows[1].cells[1].main) == pytest.approx(shift, abs=0.006)
    assert main.rows[2].cells[7] == (f"> {STEPS}", f"[> {STEPS}, > {STEPS}]")
    assert 1 < int(main.rows[1].cells[8].main) <= STEPS
    assert float(main.rows[0].cells[6].main) == pytest.approx(100 * distinct(found.original.all), rel=0.01)
    (lengths,) = tables.by_length(found)
    assert [r.cells[0].main for r in lengths.table.rows] == ["4"] * 3 + ["12"] * 3
    assert lengths.table.rows[0].cells[5].main == "100"  # the text of 6 tokens is cut at 4
    assert float(main.rows[0].cells[4].main) == pytest.approx(100 * 31 / 32, abs=0.6)
    assert float(main.rows[0].cells[4].sub.split(", ")[1][:-1]) <= 100
    cost = [[c.main for c in row.cells] for row in tables.costs(found).table.rows]
    assert [row[1] for row in cost] == ["dense, float32", "packed, float32", "packed, float32"]
    assert cost[1][7:] == ["10.0 B", "–"]  # 140 bytes of 14 tokens; the process grew by less than the weights


def test_figures_hold_every_version_and_setting() -> None:
    found = wrote(
        version("rtn:nf4", 4.5, 0.5, 0.3, changed=0.5), version("rtn:fp4", 4.5, 1.0, changed=0.9, seed=2),
        version("rtn:same", 4.5, 1.0),
    )  # fmt: skip
    shown = {f.key: f for f in figures(found)}
    surface, kl, tv = shown["surface"], shown["kl"], shown["total-variation"]
    assert isinstance(surface, Heat) and isinstance(kl, Curves) and isinstance(tv, Curves)  # noqa: PT018
    assert len(surface.squares) == 3 * len(SETTINGS)
    assert {s.x for s in surface.squares} == {"greedy", "0.6", "0.6 · 5", "1"}
    assert sorted({m.x for m in kl.marks}) == [0.6, 1.0]
    assert sorted({m.x for m in tv.marks}) == [0.0, 0.6, 1.0]
    gap = found.versions[0].gaps[Setting(0.6)].kl
    assert kl.marks[0].value == pytest.approx(gap.mean())
    assert all(0 < m.low < m.value < m.high for m in kl.marks)
    parting = shown["parting-greedy"]
    assert isinstance(parting, Curves)
    assert parting.steps
    for v in found.versions:
        marks = [m for m in parting.marks if m.series == v.label]
        assert (marks[0].x, marks[0].value, marks[-1].x) == (0, 1.0, STEPS)
        same = (v.texts[Setting(0.0)].token == found.original.texts[Setting(0.0)].token).all(1).mean()
        # the text that ended at 6 was followed no further: it weighs less than a whole text
        assert marks[-1].value == pytest.approx(same, abs=1 / len(TOKENS))


def test_sentences_say_what_is_shown_and_what_could_have_been() -> None:
    lines = lead(wrote(version("rtn:nf4", 4.5, 0.5, 0.3, changed=0.9), version("rtn:same", 4.5, 1.0)))
    assert lines[0].startswith("The original finds less likely than its own what these write (nats a token; 16 prompts")
    assert "rtn:nf4 +0.3" in lines[0]
    assert "rtn:same" not in lines[0]
    assert lines[1].startswith("No shift of likelihood is shown for rtn:same 0")
    assert "80 % power" in lines[1]
