"""Conversions are exact or say what they cost; readers see in the files what was meant, and see it when it is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace as dc_replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_runs import quantize

from lowbit.errors import CheckpointError, ExportError, ModelError, StorageError
from lowbit.formats.pack import Codes
from lowbit.formats.qtensor import Affine, Raw
from lowbit.io.check import Found, Reader, Subject, Verdict, check, divergence, layout_of, reference_of
from lowbit.io.convert import convert
from lowbit.io.engines import RULES, Files, expected, warnings, will_load
from lowbit.io.export import export
from lowbit.io.opening import Group, LowBit, open_low_bit
from lowbit.io.readers import READERS, packed_matrix
from lowbit.io.rounding import to_fit

ENGINES = Path(__file__).parents[2] / "docs" / "reference" / "engines.md"


def test_one_ecosystem_to_another_is_exact(int4: Path, tmp_path: Path) -> None:
    native = open_low_bit(int4)
    convert(native, "compressed-tensors", tmp_path / "ct")
    done = convert(open_low_bit(tmp_path / "ct"), "awq", tmp_path / "awq")
    assert done.layout == "awq"
    for one, other in zip(native.groups(), open_low_bit(tmp_path / "awq").groups(), strict=True):
        assert all(torch.equal(q.decode(), other.codes[site].decode()) for site, q in one.codes.items())
    said = json.loads((tmp_path / "awq" / "lowbit.export.json").read_text())["source"]
    assert (said["origin"], said["path"]) == ("compressed-tensors", "../ct")
    with pytest.raises(ExportError, match="has no types"):
        convert(native, "gptq:q4_0", tmp_path / "x")


def test_rounding_is_asked_for_and_its_cost_is_what_it_changed(int4: Path, tmp_path: Path) -> None:
    native = open_low_bit(int4)
    with pytest.raises(ExportError, match="cannot hold"):
        convert(native, "bnb", tmp_path / "e")
    rounded = to_fit(native, "bnb", "int8-row-sym")
    convert(native, "bnb", tmp_path / "e", rounded=rounded)
    assert [change.site for change in rounded.changes] == [s for g in native.groups() for s in g.codes]
    after = {site: q.decode() for g in open_low_bit(tmp_path / "e").groups() for site, q in g.codes.items()}
    before = {site: q.decode() for g in native.groups() for site, q in g.codes.items()}
    for change in rounded.changes:
        error = (after[change.site] - before[change.site]).numpy().astype(np.float64)
        assert change.largest == pytest.approx(np.abs(error).max())
        assert change.rms == pytest.approx(np.sqrt((error**2).mean()))
        assert change.relative == pytest.approx((error**2).sum() / (before[change.site].numpy() ** 2).sum(), rel=1e-4)
    assert reference_of(tmp_path / "e") is None  # it is not what it was made from
    assert to_fit(native, "awq").sites == frozenset()  # it fits as it is
    with pytest.raises(ExportError, match="bnb cannot hold int4-g64"):
        to_fit(native, "bnb", "int4-g64")


def test_readers_confirm_a_good_export_and_expose_a_bad_one(
    int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e"
    export(open_low_bit(int4), "compressed-tensors", out)
    assert (layout_of(out), reference_of(out)) == ("compressed-tensors", int4.resolve())
    broken = Reader("broken", (), frozenset({"compressed-tensors"}), lambda _: print("loading") or 1 / 0)  # type: ignore[arg-type, func-returns-value]
    absent = Reader("absent", ("no_such_package",), frozenset({"compressed-tensors"}), lambda _: Found())
    found = {v.reader: v for v in check(out, readers=(*READERS, broken, absent), tokens=32)}
    assert "loading" not in capsys.readouterr().out  # which may be JSON
    package, loaded = found["compressed-tensors"], found["transformers (compressed-tensors)"]
    assert (package.equal, package.tensors, loaded.equal, loaded.tensors) == (14, 14, 14, 14)
    assert loaded.kl is not None
    assert loaded.kl < 1e-5
    assert (found["lowbit import"].equal, found["lowbit import"].tensors) == (21, 21)
    assert (found["broken"].status, found["broken"].detail) == ("failed", "ZeroDivisionError: division by zero")
    assert (found["absent"].status, found["absent"].detail) == ("not installed", "pip install no_such_package")
    weights = load_file(out / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight_scale"] *= 1.5
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    ours = next(r for r in READERS if r.name == "lowbit import")
    theirs = next(r for r in READERS if r.name == "compressed-tensors")
    seen = check(out, readers=(ours, theirs))
    assert [(v.equal, v.wrong) for v in seen] == [(20, True), (13, True)]
    assert seen[0].off == pytest.approx(0.5, abs=1e-3)  # scales are float16
    said = json.loads((out / "lowbit.export.json").read_text())
    said["source"]["digest"] = "0"
    (out / "lowbit.export.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="is not what it was"):
        check(out, readers=(ours,))


def test_linears_of_gptqmodel_show_their_matrix_until_they_repack_it() -> None:
    w = torch.randn(3, 8)

    class Packed(torch.nn.Module):
        qweight = scales = torch.zeros(1)

    class Gptq(Packed):
        def dequantize_weight(self) -> torch.Tensor:
            return w.t()

    class Awq(Packed):
        def awq_weight_dequantize(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
            return w.t().to(device, dtype)

    for cls in (Gptq, Awq):
        module = cls()
        found = packed_matrix(module)
        assert found is not None
        assert torch.equal(found, w)
        module._cpu_transformed = True
        assert packed_matrix(module) is None
    assert packed_matrix(torch.nn.Linear(8, 3)) is None


def test_files_that_lowbit_refuses_are_given_to_no_other(int4: Path, tmp_path: Path) -> None:
    def refuse(_: Subject) -> Found:
        raise CheckpointError("hostile")

    asked: list[Subject] = []
    layouts = frozenset({"compressed-tensors", "gguf"})
    ours = Reader("ours", (), layouts, refuse, ours=True)
    other = Reader("other", (), layouts, lambda subject: asked.append(subject) or Found())  # type: ignore[func-returns-value]
    export(open_low_bit(int4), "compressed-tensors", tmp_path / "e")
    seen = check(tmp_path / "e", readers=(ours, other))
    assert [(v.status, v.detail) for v in seen][1] == ("not asked", "lowbit refuses the files")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes([255] * 64))
    with pytest.raises(ModelError, match="is no whole GGUF file"):
        check(tmp_path / "m.gguf", readers=(other,))
    assert not asked
    assert [r.name for r in READERS if r.ours] == ["lowbit import"]
    assert READERS[0].ours


def test_numbers_that_a_layout_cannot_hold_are_rounded_too(int4: Path, tmp_path: Path) -> None:
    model = open_low_bit(int4)
    site = next(iter(model.specs))
    exact = next(q for g in model.groups() for s, q in g.codes.items() if s == site)
    assert isinstance(exact, Affine)
    assert isinstance(exact.zero, Codes)

    def changed(**parts: Any) -> LowBit:
        def groups() -> Iterator[Group]:
            for group in model.groups():
                codes = {s: dc_replace(q, **parts) if s == site else q for s, q in group.codes.items()}
                yield dc_replace(group, codes=codes)

        return dc_replace(model, groups=groups)

    zero = changed(zero=Codes.of(torch.zeros_like(exact.zero.unpack()), 16))
    with pytest.raises(ExportError, match="a zero is 0"):
        convert(zero, "gptq", tmp_path / "v1")
    rounded = to_fit(zero, "gptq")
    convert(zero, "gptq", tmp_path / "v1", rounded=rounded)
    assert site in {change.site for change in rounded.changes}
    assert rounded.format.name == "int4-g32-sym"
    assert not to_fit(zero, "gptq-v2").sites


def test_gguf_rounds_the_linears_that_no_block_type_has(int4: Path, tmp_path: Path) -> None:
    model = open_low_bit(int4)
    site = sorted(model.specs)[3]

    def groups() -> Iterator[Group]:
        for group in model.groups():
            codes = {s: dc_replace(q, scale=Raw.of(q.scale.decode() * 1.0001)) if s == site else q
                     for s, q in group.codes.items() if isinstance(q, Affine)}  # fmt: skip
            yield dc_replace(group, codes=codes)

    odd = dc_replace(model, groups=groups)
    rounded = to_fit(odd, "gguf")
    assert (rounded.sites, rounded.format.name) == ({site}, "q8_0")
    convert(odd, "gguf", tmp_path / "m.gguf", rounded=rounded)
    assert [change.site for change in rounded.changes] == [site]
    for one, other in zip(odd.groups(), open_low_bit(tmp_path / "m.gguf").groups(), strict=True):
        for name, q in one.codes.items():
            assert torch.equal(q.decode(), other.codes[name].decode()) == (name != site)
    assert to_fit(odd, "gguf:q8_0").sites == {site}
    with pytest.raises(ExportError, match="no format of lowbit"):
        to_fit(odd, "gguf:tq1_0")
    with pytest.raises(ExportError, match="nothing is to be rounded"):
        to_fit(odd, "gguf:f16")


def test_divergence_is_that_of_its_definition() -> None:
    p, q = (torch.randn(5, 7, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    one, other = (np.exp(x.numpy().astype(np.float64)) for x in (p, q))
    one, other = one / one.sum(1, keepdims=True), other / other.sum(1, keepdims=True)
    kl, agree = divergence(p, q)
    assert kl == pytest.approx((one * np.log(one / other)).sum(1).mean())
    assert agree == pytest.approx((one.argmax(1) == other.argmax(1)).mean())
    assert [Verdict("r", "opened", kl=divergence(p, logits)[0]).wrong for logits in (q, q * np.nan)] == [False, True]


@pytest.mark.parametrize(
    ("files", "engine", "versions", "answer"),
    [
        (Files("gptq", 4, 128), "vLLM", "since #45051 (2026)", "yes"),
        (Files("gptq", 3, 128), "vLLM", "since #45051 (2026)", "no"),
        (Files("gptq", 4, 128, symmetric=False), "vLLM", "since #45051 (2026)", "no"),
        (Files("gptq", 4, 16), "vLLM", "since #45051 (2026)", "no"),
        (Files("gptq", 3, 128, symmetric=False), "vLLM", "up to 2026-05", "slow"),
        (Files("gptq-v2", 3, 128, symmetric=False), "vLLM", "up to 2026-05", "no"),
        (Files("awq", 4, 48), "vLLM", "any", "slow"),
        (Files("compressed-tensors", 3, 128), "vLLM", "with Humming kernels (#46389)", "yes"),
        (Files("compressed-tensors", 4, architecture="GPT2LMHeadModel"), "transformers", ">=5, with compressed-tensors",
         "no"),
        (Files("gguf", 4, architecture="OPTForCausalLM"), "llama.cpp", "any", "no"),
        (Files("gptq", 4, 64, symmetric=False), "transformers", ">=5, with gptqmodel and optimum", "yes"),
        (Files("gptq", 4, 64, symmetric=False), "GPTQModel", "any", "no"),
        (Files("gptq", 4, 64, experts=True), "transformers", ">=5, with gptqmodel and optimum", "no"),
        (Files("awq", 4, 64, architecture="BloomForCausalLM"), "transformers", ">=5, with gptqmodel", "no"),
    ],
)  # fmt: skip
def test_engines_answer_as_their_code_does(files: Files, engine: str, versions: str, answer: str) -> None:
    found = {(v.engine, v.versions): v.answer for v in will_load(files)}
    assert found[engine, versions] == answer


def test_a_model_is_warned_of_by_its_own_formats(int4: Path) -> None:
    said = warnings(expected(open_low_bit(int4), "gptq"))
    assert any(line.startswith("vLLM (since #45051 (2026)) will not load it: GPTQ must be symmetric") for line in said)
    assert not warnings(expected(open_low_bit(int4), "awq"))


def test_the_page_shows_every_rule() -> None:
    page = ENGINES.read_text(encoding="utf-8")
    for rule in RULES:
        assert (
            f"| {rule.engine} | {rule.versions} | {', '.join(rule.layouts)} | {rule.condition()} | {rule.answer} |"
            in page
        )


def test_gguf_there_and_back(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", None)  # would go to $TMPDIR
    quantize(llama, tmp_path / "q", None, "rtn:q8_0")
    native = open_low_bit(tmp_path / "q")
    others = [tmp_path / "m.gguf.lowbit.export.json", tmp_path / "m.gguf.partial"]
    for other in others:
        other.write_text("{}")
    with pytest.raises(ExportError, match=r"m\.gguf\.lowbit\.export\.json: exists"):
        convert(native, "gguf", tmp_path / "m.gguf")
    others[0].unlink()
    done = convert(native, "gguf", tmp_path / "m.gguf")
    assert others[1].read_text() == "{}"
    assert len(list(tmp_path.glob("m.*"))) == 3
    assert done.nbytes == (tmp_path / "m.gguf").stat().st_size
    for one, other in zip(native.groups(), open_low_bit(tmp_path / "m.gguf").groups(), strict=True):
        assert {s: q.spec() for s, q in one.codes.items()} == {s: q.spec() for s, q in other.codes.items()}
        assert all(torch.equal(q.decode(), other.codes[site].decode()) for site, q in one.codes.items())
    readers = [r for r in READERS if r.name in ("lowbit import", "gguf")]
    assert [(v.equal, v.tensors) for v in check(tmp_path / "m.gguf", readers=readers)] == [(21, 21), (14, 14)]
    (tmp_path / "nowhere.gguf").symlink_to(tmp_path / "nothing")
    for name in ("m.gguf", "nowhere.gguf"):
        with pytest.raises(ExportError, match="exists"):
            convert(native, "gguf", tmp_path / name)
    with pytest.raises(StorageError, match="is a link to nothing"):
        convert(native, "bf16", tmp_path / "nowhere.gguf")
