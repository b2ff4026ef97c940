"""lowbit catalog from the command line: record, list, compare, lineage."""

from __future__ import annotations

import json
from pathlib import Path

from ran import Run


def test_a_model_and_its_version(run: Run, llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    kept = ("--catalog", tmp_path / "c.jsonl")
    assert "lowbit catalog add DIR" in run("catalog", "list", *kept).err
    first = run("catalog", "add", checkpoint, *kept)
    assert first.out.startswith("recorded: int4 (")
    assert "is not recorded" in first.err
    assert run("catalog", "add", checkpoint, *kept).out.startswith("was there: ")
    original = json.loads(run("catalog", "add", llama, "--name", "birds", "--json", *kept).out)
    assert original["new"]
    listed = json.loads(run("catalog", "list", "--json", *kept).out)
    assert [a["name"] for a in listed] == ["int4", "birds"]
    assert listed[0]["parents"] == [original["digest"]]
    assert "made from" in run("catalog", "list", *kept).out
    tree = run("catalog", "lineage", "int4", *kept).out.splitlines()
    assert tree[0].startswith("birds (")
    assert tree[1].startswith("└─ int4 (")
    assert json.loads(run("catalog", "lineage", "birds", "--json", *kept).out)["descendants"] == [listed[0]["digest"]]
    finding = {"metric": "kl", "value": 0.1, "low": 0.05, "high": 0.15, "unit": "nat", "n": 9, "verdict": "unclear"}
    protocol = {"text": "t", "digest": "ab" * 32, "windows": 4, "length": 8, "tokens": 9, "dtype": "float32"}
    report = {"created": "t", "protocol": protocol, "reference": {"digest": original["digest"]},
              "candidates": [{"digest": listed[0]["digest"], "label": "int4", "findings": [finding]}]}  # fmt: skip
    Path("scores.json").write_text(json.dumps([report]))
    run("catalog", "add", checkpoint, "--scores", "scores.json", *kept)
    shown = run("catalog", "show", "int4", *kept).out
    assert "0.1 [0.05, 0.15] nat" in shown
    assert "Beside birds: t, 4 windows of 8" in shown
    assert "No scores of birds" in run("catalog", "compare", "int4", "birds", *kept).out
    wrong = run("catalog", "add", llama, "--scores", "scores.json", *kept)
    assert wrong.code == 1
    assert "has no scores of" in wrong.err
