"""Advice against brute force over its table, on random tables, a store, and the command line."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from lowbit.cli import main
from lowbit.errors import StudyError
from lowbit.evaluation import evidence
from lowbit.evaluation.evidence import Provenance
from lowbit.evaluation.metrics.base import Tokens
from lowbit.evaluation.statistics import Interval, holm, p_value
from lowbit.models.source import of_directory
from lowbit.study import advise
from lowbit.study.advise import Constraint, Option
from lowbit.study.rows import Member, Usage
from lowbit.study.store import Store


def option(label: str, nbytes: int, loss: float, se: float, rate: float | None = None) -> Option:
    half = 2.0 * se
    interval = Interval(loss, loss - half, loss + half, se, 1000, 60, "t")
    return Option(label, f"rtn:{label}", nbytes, nbytes + 10, interval, rate)


def random_table(seed: int) -> list[Option]:
    rng = np.random.default_rng(seed)
    return [
        option(f"v{i}", int(rng.integers(100, 200)), float(rng.exponential(0.03)), float(rng.uniform(0.001, 0.01)),
               float(rng.uniform(5, 20)))
        for i in range(int(rng.integers(1, 9)))
    ]  # fmt: skip


@pytest.mark.parametrize("prefer", ["quality", "size", "speed"])
def test_advice_is_the_argmin_of_its_table(prefer: advise.Prefer) -> None:
    none = 0
    for seed in range(60):
        table, constraint = random_table(seed), Constraint(170, 0.05, 8.0)
        fits = [o for o in table if o.need <= 170 and o.rate is not None and o.rate >= 8.0]
        p = holm([p_value(o.loss, math.log(1.05), "less") for o in fits])
        good = [o for o, x in zip(fits, p, strict=True) if x < 0.05]
        key = {
            "quality": lambda o: o.loss.high,
            "size": lambda o: (o.need, o.loss.estimate),
            "speed": lambda o: -o.rate,
        }[prefer]
        found = advise.advise(table, constraint, prefer)
        if good:
            assert found.choice is min(good, key=key)
        else:
            none += 1
            assert found.choice is None
            assert "no measured version meets" in found.reason
        assert len(found.ruled_out) == len(table) - (found.choice is not None)
        for o in table:  # the front: nothing is as small and as good, and better in one
            beaten = any(
                q.need <= o.need and q.loss.estimate <= o.loss.estimate
                and (q.need * 1.001 < o.need or q.loss.estimate < o.loss.estimate) for q in table
            )  # fmt: skip
            assert (o in found.front) is not beaten
    assert 0 < none < 60


def test_reasons_name_what_was_in_the_way() -> None:
    table = [option("big", 500, 0.0, 0.001), option("mid", 200, 0.005, 0.001), option("vague", 150, 0.005, 0.02),
             option("bad", 100, 0.3, 0.01)]  # fmt: skip
    found = advise.advise(table, Constraint(max_loss=0.02))
    assert found.choice is not None
    assert found.choice.label == "mid"  # a limit on loss alone asks for the smallest
    why = {r.option.label: r.why for r in found.ruled_out}
    assert "not shown to stay below 2 %" in why["vague"]
    assert "+34.99 %" in why["bad"]
    assert "takes 300 B more" in why["big"]
    tight = advise.advise(table, Constraint(memory=120, max_loss=0.02))
    assert tight.choice is None
    assert "the best that fits is bad" in tight.reason
    assert "smallest shown to lose so little is mid" in tight.reason
    assert advise.advise(table, Constraint(min_rate=1.0)).choice is None
    with pytest.raises(StudyError, match="no speed is known"):
        advise.advise(table, Constraint(), "speed")
    with pytest.raises(StudyError, match="nothing was measured"):
        advise.advise([], Constraint())


def test_a_lucky_version_among_many_is_not_let_through() -> None:
    """Twenty versions that all lose the limit itself: at most 5 % of the tables may recommend any."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        table = [option(f"v{i}", 100 + i, math.log(1.05) + 0.01 * rng.normal(), 0.01) for i in range(20)]
        wrong += bool(advise._within_loss(table, 0.05)[0])
    assert wrong / 200 < 0.08


def tokens(shift: float) -> Tokens:
    rng = np.random.default_rng(0)
    n, zero = 400, np.zeros(400)
    nll = rng.exponential(3, n)
    chunk = np.repeat(np.arange(20), 20)
    columns = dict.fromkeys(("token", "kl", "top1", "top1_ref", "margin_ref", "top1_p", "entropy_ref"), zero)
    noise = 0.05 * rng.normal(size=n)
    return Tokens.of(columns | {"doc": chunk, "chunk": chunk, "pos": np.tile(np.arange(20), 20), "nll_ref": nll,
                                "nll": nll + shift + (noise if shift else 0)})  # fmt: skip


@pytest.fixture
def store(tmp_path: Path, llama: Path) -> Path:
    """A study of three versions of the tiny LLaMA, as a run would leave it."""
    model = of_directory(llama).digest
    provenance = Provenance("c", "r", "w", "windows-20", "text", "t", "float32")
    rows = [
        ("reference llama", "reference", "dense", 16_000_000, 0.0),
        ("score int8", "score", "rtn:int8-row", 8_000_000, 0.002),
        ("score int4", "score", "rtn:int4-g32", 4_000_000, 0.02),
        ("score int2", "score", "rtn:int2-g32", 2_000_000, 0.9),
    ]
    members = []
    with Store(tmp_path / "store") as held:
        for i, (label, stage, recipe, nbytes, shift) in enumerate(rows):
            key = f"{i:064x}"
            held.add_cell(key, stage, label, [members[0].key, f"{9:064x}"] if i else [], {
                "model_digest": model, "model": str(llama)}, "1")  # fmt: skip
            held.claim("me", key=key) if not i else held._change("status = 'claimed', owner = 'me'", key, owner=None)
            with held.evidence(key) as folder:
                evidence.write_tokens(folder, tokens(shift), provenance)
            held.finish(key, "me", {"bytes_total": nbytes, "recipe": recipe, "digest": label}, Usage(1, 1, 1))
            members.append(Member(key, stage))
        held.put_study("grid", {}, members)
    return tmp_path / "store"


def test_the_command_reads_a_store_and_agrees_with_its_table(
    store: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(store) as held:
        table = advise.table(held, "grid", of_directory(llama).digest)
    assert [(o.label, o.nbytes) for o in table] == [
        ("original", 16_000_000), ("int8", 8_000_000), ("int4", 4_000_000), ("int2", 2_000_000)
    ]  # fmt: skip
    assert table[2].loss.estimate == pytest.approx(0.02, abs=0.01)

    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lowbit", "advise", str(llama), "--store", str(store), *args])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().out

    code, out = run("--memory", "9MB", "--max-loss", "5%", "--prefer", "size", "--bandwidth", "1GB/s", "--json")
    found = json.loads(out)
    assert (code, found["choice"]["label"]) == (0, "int4")
    assert found["command"] == f"lowbit quantize {llama} rtn:int4-g32 -o OUT"
    assert found["choice"]["rate"] == pytest.approx(0.5 * 1e9 / 4e6, rel=0.01)
    code, out = run("--memory", "1MB", "--max-loss", "5%", "--context", "1000")
    assert code == 1
    assert "none: no measured version meets the constraint" in out
