"""lowbit export, check, import and convert, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

from ran import Run


def test_export_check_import_convert(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    assert "--allow-rounding" in run("export", checkpoint, "--to", "bnb", "-o", "e").err
    assert "--format rounds" in run("export", checkpoint, "--to", "bnb", "-o", "e", "--format", "nf4").err
    made = run("export", checkpoint, "--to", "gptq-v2", "-o", "e")
    assert made.code == 0
    assert "14 linears as gptq-v2" in made.out
    assert "Note: vLLM" in made.err
    checked = run("check", "e")
    assert checked.code == 0, checked.out
    assert "21 of 21" in checked.out
    assert "pip install optimum gptqmodel" in checked.out
    imported = run("import", "e", "-o", "i")
    assert imported.code == 0
    assert "imported:gptq-v2" in imported.out
    refused = run("convert", "e", "--to", "bnb", "-o", "b")
    assert refused.code == 1
    assert "--allow-rounding" in refused.err
    rounded = run("convert", "e", "--to", "bnb", "-o", "b", "--allow-rounding", "--format", "int8-row-sym", "--json")
    assert rounded.code == 0, rounded.err
    cost = json.loads(rounded.out)["rounding"]
    assert (cost["linears"], cost["format"]) == (14, "int8-row-sym")
    assert 0 <= cost["kl"]["low"] <= cost["kl"]["mean"] <= cost["kl"]["high"]


def test_a_damaged_export_ends_with_1(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    run("export", checkpoint, "--to", "awq", "-o", "e")
    path = tmp_path / "e" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    checked = run("check", "e", "--json")
    told = json.loads(checked.out)
    assert (checked.code, told["layout"], told["readers"][0]["status"]) == (1, "awq", "failed")
    assert "cannot be read" in run("import", "e", "-o", "i").err
    assert "no checkpoint of lowbit quantize" in run("export", "e", "--to", "awq", "-o", "f").err
