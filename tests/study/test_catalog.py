"""The catalogue: identity by bytes, lineage, and scores that are compared only when they were measured alike."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.errors import EvidenceError, StudyError
from lowbit.models.source import of_directory
from lowbit.pipeline.recipe import parse
from lowbit.study.artefact import artefact
from lowbit.study.catalog import Artefact, Catalog, Score, scores_of
from lowbit.study.stages import make

ROOT = Path(lowbit.__path__[0]).parent


def record(name: str, *parents: Artefact) -> Artefact:
    key = (name.encode().hex() * 32)[:64]
    made = tuple(p.digest for p in parents)
    return Artefact(
        key, name, f"/m/{name}", "lowbit", "rtn:int4-g64", made, 100, 4.25, (("a", "0" * 64),), None, "0", "t"
    )


def report(*keys: str, **protocol: Any) -> dict[str, Any]:
    """What ``lowbit compare --json`` prints of candidates with these digests."""
    said = {"text": "pydoc (windows-128)", "digest": "ab" * 32, "windows": 4, "length": 128, "tokens": 508,
            "clusters": 4, "dtype": "float32", **protocol}  # fmt: skip
    finding = {"metric": "kl", "value": 0.1, "low": 0.05, "high": 0.15, "unit": "nat", "n": 508, "verdict": "unclear"}
    return {"created": "t", "protocol": said, "reference": {"digest": "cd" * 32},
            "candidates": [{"digest": key, "label": key[:4], "findings": [finding]} for key in keys]}  # fmt: skip


def score(of: Artefact, **protocol: Any) -> Score:
    return scores_of(report(of.digest, **protocol), of.digest)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "catalog.jsonl"


def test_what_was_recorded_is_read_again_and_nothing_twice(file: Path) -> None:
    a = record("a")
    held = Catalog(file)
    assert held.add(a, [score(a)])
    assert not held.add(replace(a, added="later"), [score(a)])
    assert Catalog(file).add(a, [score(a, dtype="bfloat16")])
    again = Catalog(file)
    assert again.artefacts == {a.digest: a}
    assert again.scores == {a.digest: [score(a), score(a, dtype="bfloat16")]}
    assert len(file.read_text().splitlines()) == 3
    Catalog(file).add(replace(a, name="renamed"), [])
    assert Catalog(file).find("renamed") == replace(a, name="renamed")


def test_two_processes_write_at_once(file: Path) -> None:
    program = """
import sys
from dataclasses import replace
from pathlib import Path
from lowbit.study.catalog import Artefact, Catalog
one = Artefact("", "x" * 4000, "p", "lowbit", "r", (), 1, 4.0, (), None, "0", "t")
for i in range(40):
    Catalog(Path(sys.argv[1])).add(replace(one, digest=f"{sys.argv[2]}{i:063x}"), [])
"""
    workers = [subprocess.Popen([sys.executable, "-c", program, str(file), n], cwd=ROOT) for n in "ab"]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert len(Catalog(file).artefacts) == 80


@pytest.mark.parametrize(
    "line", ["{", "{}", '{"kind":"artefact","version":1,"record":{}}', '{"kind":"score","version":9,"record":{}}', "7"]
)
def test_a_damaged_line_is_refused_by_its_number(file: Path, line: str) -> None:
    Catalog(file).add(record("a"), [])
    with file.open("a") as lines:
        lines.write(line)
    with pytest.raises(StudyError, match="line 2 is no record"):
        Catalog(file)


def test_scores_are_compared_only_when_they_were_measured_alike(file: Path) -> None:
    a, b = record("a"), record("b")
    held = Catalog(file)
    held.add(a, [score(a)])
    assert held.compare(a, b).scores is None
    held.add(b, [score(b, text="pydoc (windows-512)", length=512, digest="ef" * 32)])
    with pytest.raises(EvidenceError) as refused:
        held.compare(a, b)
    said = str(refused.value)
    assert "text pydoc (windows-128) and pydoc (windows-512)" in said
    assert "digest abababababab and efefefefefef" in said
    assert "length 128 and 512" in said
    assert "dtype" not in said
    held.add(b, [score(b)])
    assert held.compare(a, b).scores == (score(a), score(b))
    other = scores_of({**report(b.digest), "reference": {"digest": "12" * 32}}, b.digest)
    assert score(a).differences(other) == ["reference cdcdcdcdcdcd and 121212121212"]


def test_scores_of_other_files_and_files_without_scores_are_refused() -> None:
    a = record("a")
    with pytest.raises(StudyError, match="has no scores of 6161"):
        scores_of(report("ff" * 32), a.digest)
    broken = report(a.digest)
    del broken["protocol"]["dtype"]
    for value in (broken, {"candidates": 3}, {}):
        with pytest.raises(StudyError, match="no output of lowbit compare --json"):
            scores_of(value, a.digest)


def test_names_digests_and_lineage(file: Path) -> None:
    base = record("base")
    low = record("low", base)
    out = record("out", low)
    twin = replace(out, digest="9" * 64)
    held = Catalog(file)
    for each in (out, low, base, twin):  # a child may come before its parent
        held.add(each, [])
    assert held.find(low.digest[:6]) == low
    assert held.find("base") == base
    with pytest.raises(StudyError, match="'out' is 2 artefacts"):
        held.find("out")
    with pytest.raises(StudyError, match="did you mean 'base'"):
        held.find("bass")
    assert held.ancestors(out) == [low.digest, base.digest]
    assert held.children(low.digest) == [out, twin]
    held.add(replace(base, parents=(out.digest,)), [])  # nobody can make this, but anybody can write it
    assert held.ancestors(out) == [low.digest, base.digest]


def test_files_know_what_they_are_and_what_they_were_made_from(llama: Path, tmp_path: Path) -> None:
    original = artefact(str(llama))
    source = of_directory(llama)
    assert (original.digest, original.kind, original.parents) == (source.digest, "dense", ())
    for line in ("rtn:int4-g32", "rotate,fused=true+rtn:int8-row"):
        recipe = parse(line)
        few = recipe.calibration.model_copy(update={"text": "random", "samples": 1, "length": 16})
        recipe = recipe.model_copy(update={"calibration": few})
        make(source, recipe, tmp_path / line[:3], torch.float32, lambda *_: None)
    low = artefact(str(tmp_path / "rtn"))
    assert low.parents == (original.digest,)
    assert low.recipe == "rtn:int4-g32"
    assert low.bits_per_weight == pytest.approx(4 + 20 / 32)
    manifest = json.loads((tmp_path / "rtn" / "lowbit.json").read_text())
    assert dict(low.files) == {name: entry["sha256"] for name, entry in manifest["files"].items()}
    turned = artefact(str(tmp_path / "rot"), base=str(llama))
    assert turned.parents == (original.digest,)  # by way of a rotation of the whole model
    assert artefact(str(tmp_path / "rot")).parents != turned.parents
    with pytest.raises(StudyError, match="was not made from"):
        artefact(str(tmp_path / "rtn"), base=str(tmp_path / "rot"))
