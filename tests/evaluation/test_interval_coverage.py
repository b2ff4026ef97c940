"""Every interval covers and every verdict keeps its level: a small run of ``benchmarks/coverage.py``, seeds fixed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "coverage.py"


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("coverage_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bench = _load()
WORLD = {"300 items": bench.World(300, 50, (1.5, 1.2))}
RUNS = 30
WANTED = (
    "Δ answer_nll", "Δ squared calibration error", "Δ calibration slope", "AUC of entropy less margin",
    "share 0.9, n 67", "share 0.7, n 300", "share still alike after 5 tokens, 40", "agreement length, 40",
    "likelihood of texts, 40", "correlation -0.9", "hypotheses", "advice", "scale or precision",
)  # fmt: skip


def cases() -> list[Any]:
    groups = (bench.of_confidence(WORLD, 10_000), bench.of_shares(), bench.of_texts(), bench.of_proxy(),
              bench.of_verdicts())  # fmt: skip
    return [case for group in groups for case in group if case.name.startswith(WANTED)]


def test_the_small_run() -> None:
    """Thirty runs a case: far from proof, but an interval that covers 80 % is seen, and so is a level of 20 %."""
    wrong, seen = {}, 0
    for case in cases():
        found = bench.simulate(case, RUNS)
        seen += 1
        fine = found.high >= 0.93 if case.kind == "covers" else found.low <= 0.05
        if not fine:
            wrong[case.name] = found.estimate
    assert seen == 14
    assert not wrong


def test_what_is_too_short_is_seen() -> None:
    """The same run on an interval of half the width fails."""
    case = next(c for c in bench.of_proxy() if c.name.startswith("correlation -0.9"))

    def narrow(rng: Any) -> bool:
        from lowbit.evaluation import correlation

        x, e = rng.normal(size=(2, 12))
        found = correlation.proxy(x, {"t": -0.9 * x + 0.19**0.5 * e}, level=0.5)[0].pearson
        return bool(found.low <= -0.9 <= found.high)

    assert bench.simulate(case._replace(draw=narrow), RUNS).high < 0.93
