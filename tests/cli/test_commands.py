"""What every command prints and writes on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scipy.stats
from ran import Run
from safetensors.torch import load_file

from lowbit.io.native import verify

SCORING = ("--protocol", "windows-32", "--windows", "12")


def test_inspect_gives_the_moments_of_every_weight(run: Run, llama: Path) -> None:
    shown = run("inspect", llama, "--json")
    found = json.loads(shown.out)
    weights = load_file(llama / "model.safetensors")
    assert len(found["sites"]) == 14
    for site in found["sites"]:
        w = weights[f"{site['site']}.weight"].double().flatten().numpy()
        assert site["absmax"] == pytest.approx(abs(w).max())
        assert site["std"] == pytest.approx(w.std(), rel=1e-5)
        assert site["kurtosis"] == pytest.approx(scipy.stats.kurtosis(w, fisher=False), rel=1e-4)
    total = sum(w.numel() for w in weights.values())
    assert found["summary"]["parameters"] == total
    in_sites = sum(site["shape"][0] * site["shape"][1] for site in found["sites"])
    assert sum(site["share"] for site in found["sites"]) == pytest.approx(in_sites / total)


def test_inspect_in_columns(run: Run, llama: Path) -> None:
    lines = run("inspect", llama).out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("site "))
    row = lines[head + 1]
    assert row.startswith("model.layers.0.self_attn.q_proj")
    assert lines[head].index("dtype") == row.index("float32")
    assert len(row) == len(lines[head])  # the last column ends where its title ends


def test_inspect_of_a_checkpoint(run: Run, checkpoint: Path) -> None:
    found = json.loads(run("inspect", checkpoint, "--json").out)
    assert found["summary"]["recipe"] == "rtn:int4-g32"
    assert found["summary"]["bits_per_weight"] == pytest.approx(4 + 20 / 32)
    assert [site["bytes"] for site in found["sites"]] == [s["nbytes"] for s in verify(checkpoint)["sites"]]
    assert "rtn:int4-g32" in run("inspect", checkpoint).out


def test_plan_prints_what_json_holds(run: Run, llama: Path) -> None:
    planned = json.loads(run("plan", llama, "gptq:int4-g32", "--json", "--samples", 4, "--length", 32).out)
    assert planned["bytes_total"] == planned["bytes_quantized"] + planned["bytes_kept"]
    assert planned["peak"] == max(stage["memory"] for stage in planned["stages"])
    shown = run("plan", llama, "gptq:int4-g32", "--samples", 4, "--length", 32)
    assert "4 windows of 32 tokens" in shown.out
    assert f"{planned['sites']} linears" in shown.out
    assert "kept model.embed_tokens.weight" in shown.out
    assert "none needed" in run("plan", llama, "rtn:int4-g32").out


def test_quantize_then_again_then_with_another_recipe(run: Run, llama: Path, text: Path) -> None:
    args = ("quantize", llama, "gptq:int4-g32", "-o", "out", "--text", text, "--samples", 4, "--length", 32)
    first = run(*args, "--json")
    made = json.loads(first.out)
    assert not made["already_done"]
    assert verify(Path("out"))["calibration_text"]["name"] == text.name
    again = run(*args)
    assert again.code == 0
    assert "there already" in again.out
    assert json.loads(run(*args, "--json").out) == {**made, "already_done": True}
    assert run(*args, "--seed", 1).code == 1  # other calibration windows are other work
    other = run("quantize", llama, "rtn:int8-row", "-o", "out")
    assert other.code == 1
    assert "holds another model" in other.err
    assert verify(Path("out"))["recipe"]["step"][0]["format"] == "int4-g32"


def test_compare_with_a_checkpoint_and_the_model_itself(run: Run, llama: Path, checkpoint: Path, text: Path) -> None:
    args = ("compare", llama, checkpoint, llama, "--text", text, *SCORING, "--store", "store")
    shown = run(*args, "--json", "--report", "report.html")
    assert shown.code == 0, shown.err
    (found,) = json.loads(shown.out)["reports"]
    candidates = {c["label"]: c for c in found["candidates"]}
    assert set(candidates) == {"int4", "llama"}
    itself = {f["metric"]: f for f in candidates["llama"]["findings"]}
    assert all(f["identical"] and f["value"] == f["metric"].startswith("top1") * 100 for f in itself.values())
    assert candidates["llama"]["bytes_total"] == found["reference"]["bytes_total"]
    assert {f["metric"]: f["value"] for f in candidates["int4"]["findings"]}["kl"] > 0
    assert found["protocol"]["windows"] == 12
    assert Path("report.html").exists()
    assert "report.html" in shown.err  # beside the JSON, not in it
    again = run(*args, "-o", "md", "--analyses", "where,cascades", "--report", "report.html")
    assert again.out.startswith("| Candidate")
    assert "4 were there" in again.err
    assert again.out.index("### Where the loss is") < again.out.index("### A cascade, token by token")
    assert "llama needs no cascade to agree with the original" in again.out
    assert 'id="panel-cascades-0"' in Path("report.html").read_text()


def test_generate_streams_what_json_holds(run: Run, checkpoint: Path) -> None:
    args = ("generate", checkpoint, "-p", "Bird", "-n", 6, "--temperature", 1.5)
    found = json.loads(run(*args, "--seed", 3, "--json").out)
    assert 1 <= found["tokens"] <= 6
    streamed = run(*args, "--seed", 3)
    assert streamed.out.rstrip("\n") == found["text"].rstrip("\n")
    assert f"{found['tokens']} tokens in" in streamed.err
    assert json.loads(run(*args, "--seed", 4, "--json").out)["text"] != found["text"]


def test_doctor(run: Run) -> None:
    import torch

    found = json.loads(run("doctor", "--json").out)
    assert found["versions"]["torch"] == torch.__version__
    assert any(kernel["usable"] for kernel in found["kernels"])
    shown = run("doctor").out
    assert torch.__version__ in shown
    assert all(note in shown for note in found["notes"])
