"""A synthetic study of any size: plausible numbers, no model."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from lowbit.evaluation.findings import Finding
from lowbit.evaluation.metrics.agreement import Flips
from lowbit.report.model import Band, BlockKL, Candidate, Environment, FlipRow, Report, ScoringProtocol

N, CLUSTERS, BLOCKS, FLOOR = 65_536, 128, 30, 2.4e-4
METHODS = ("rtn", "gptq", "awq", "hqq", "qep")
FORMATS = (
    ("int8-row", 8.1),
    ("int4-g64", 4.25),
    ("nf4", 4.5),
    ("int4-g128", 4.13),
    ("mxfp4", 4.25),
    ("int3-g64", 3.25),
)
FORMATS += (("int2-g64", 2.25), ("int6-g64", 6.25))


def finding(metric: str, value: float, half: float, unit: str, verdict: str, **more: object) -> Finding:
    fields = {"p": 0.003, "p_adjusted": 0.012, "note": "", "rule": "holm, 160 tests", "mde": 1.43 * half, **more}
    return Finding(
        metric=metric,
        value=value,
        low=value - half,
        high=value + half,
        unit=unit,
        n=N,
        clusters=CLUSTERS,
        verdict=verdict,
        **fields,  # type: ignore[arg-type]
    )


def candidate(i: int, method: str, fmt: str, bits: float, rng: np.random.Generator) -> Candidate:
    kl = 1.9 * 2.0 ** (-1.75 * (bits - 1)) * float(rng.uniform(0.75, 1.35)) + FLOOR
    delta = 0.9 * kl * float(rng.normal(1, 0.15))
    half = 0.05 * kl
    verdict = "same" if abs(delta) + half < 0.01 else "worse" if delta > 1.5 * half else "unclear"
    kept = 100 * math.exp(-0.45 * kl**0.5)
    lost = int(N * (100 - kept) / 300)
    findings = (
        finding("delta_log_perplexity", delta, 1.3 * half + 2e-4, "nat", verdict),
        finding("kl", kl, half, "nat", f"{kl / FLOOR:.0f}x floor"),
        finding("top1_kept", kept, 0.2, "%", verdict),
        finding(
            "delta_top1_accuracy", -kl * 4, 0.2, "pp", "unclear", flips=Flips(lost, lost // 2, lost), note="lost more"
        ),
    )
    edges = [0, 16, 32, 64, 128, 192, 256, 384, 512]
    bands = tuple(
        Band(a, b, v := kl * (0.7 + 0.15 * math.log2(1 + b / 64)), v * 0.92, v * 1.08, N // 8)
        for a, b in itertools.pairwise(edges)
    )
    shape = [1.8 if b in (0, BLOCKS - 1) else 0.6 + 0.4 * math.sin(b / 3) ** 2 for b in range(BLOCKS)]
    blocks = tuple(BlockKL(b, v := kl * s / BLOCKS, v * 0.85, v * 1.15) for b, s in enumerate(shape))
    words = [" the", " of", " Paris", " London", "ing", " 1914", ",", " <b>"]
    flips = tuple(
        FlipRow(
            context="The capital of the country that borders it to the south, after the war, was moved to " * 2,
            target=words[k % 8],
            reference_choice=words[k % 8],
            candidate_choice=words[(k + 3) % 8],
            margin_ref=float(0.9 - 0.03 * k),
            kind=("lost", "gained", "other")[k % 3],  # type: ignore[arg-type]
        )
        for k in range(20)
    )
    label = f"{method}-{fmt}"
    return Candidate(
        label=label,
        model_label="SmolLM2-135M-Instruct",
        recipe=f"{method}:{fmt}",
        digest=hashlib.sha256(label.encode()).hexdigest(),
        bytes_total=int(106.3e6 * bits / 8 + 57e6 + 4e4 * i),
        bits_per_weight=bits,
        seconds=float(10 + 60 * METHODS.index(method)),
        peak_bytes=410_000_000,
        findings=findings,
        kl_by_position=bands,
        kl_by_block=blocks,
        flips=flips,
    )


@pytest.fixture(scope="session")
def study() -> Callable[..., Report]:
    """``study(n)`` makes a report with ``n`` candidates; further arguments replace its fields."""
    return make


def make(n: int, **fields: object) -> Report:
    rng = np.random.default_rng(7)
    cells = [(m, f, b) for (f, b), m in itertools.product(FORMATS, METHODS)][:n]
    if n < len(METHODS) * 3:  # a small study: one method a format
        cells = [(METHODS[i % 5], f, b) for i, (f, b) in enumerate(FORMATS)][:n]
    reference = Candidate(
        "fp16", "SmolLM2-135M-Instruct", "none", "9f" * 32, 269_000_000, 16.0, 0.0, 0, is_reference=True
    )
    values: dict[str, object] = {
        "title": "Low-bit versions of SmolLM2-135M-Instruct",
        "created": "2026-01-15T10:00:00Z",
        "command": "lowbit study run smollm2.toml",
        "study_name": "smollm2",
        "reference": reference,
        "candidates": tuple(candidate(i, *cell, rng) for i, cell in enumerate(cells)),
        "noise_floor": FLOOR,
        "protocol": ScoringProtocol("wikitext2 (raw test)", "ab" * 32, CLUSTERS, 512, N, CLUSTERS, "float32"),
        "environment": Environment((("lowbit", "0.1.0"), ("torch", "2.13.0")), "2 cores, 8 GB"),
        "multiplicity_rule": "Holm",
        "configuration": (("seed", "0"), ("calibration text", "pydoc topics")),
        "digests": (("study file", "cd" * 32),),
        **fields,
    }
    return Report(**values)  # type: ignore[arg-type]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'$title ${x} \u202e\x1b[31m"


def hostile(report: Report) -> Report:
    first = report.candidates[0]
    flip = dataclasses.replace(first.flips[0], context=HOSTILE, target=HOSTILE)
    note = dataclasses.replace(first.findings[0], verdict=HOSTILE, note=HOSTILE, unit=HOSTILE)
    bad = dataclasses.replace(
        first,
        label=HOSTILE,
        recipe=HOSTILE,
        digest=HOSTILE,
        model_label=HOSTILE,
        flips=(flip,),
        findings=(note, *first.findings[1:]),
    )
    pairs = ((HOSTILE, HOSTILE),)
    return dataclasses.replace(
        report,
        title=HOSTILE,
        command=HOSTILE,
        study_name=HOSTILE,
        created=HOSTILE,
        multiplicity_rule=HOSTILE,
        protocol=dataclasses.replace(report.protocol, text=HOSTILE, dtype=HOSTILE),
        candidates=(bad, *report.candidates[1:]),
        configuration=pairs,
        digests=pairs,
    )


@pytest.fixture(scope="session")
def hostile_study() -> Report:
    """A report in which every text tries to be markup, script or terminal control."""
    return hostile(make(3))
