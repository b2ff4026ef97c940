"""Exports of every family load elsewhere and compute the same; what a layout cannot hold is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import family_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_runs import quantize

from lowbit.errors import ExportError, FormatError, StorageError
from lowbit.formats.pack import Codes
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import QTensor, Rotated
from lowbit.io.export import PROVENANCE, export
from lowbit.io.hubnames import HubNames
from lowbit.io.interchange.rows import hollow, stack_rows, take_rows
from lowbit.io.opening import Group, open_low_bit
from lowbit.models.graph import matrix, split_experts
from lowbit.models.source import of_model


def test_plain_exports_of_every_family_load_as_what_they_were(family: Path, tmp_path: Path) -> None:
    quantize(family, tmp_path / "q", None, "rtn:int4-g32-sym")
    model = open_low_bit(tmp_path / "q")
    done = export(model, "fp32", tmp_path / "e", shard_bytes=100_000)
    assert len(list((tmp_path / "e").glob("model-0000*"))) > 2
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "e", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    split_experts(loaded)
    left = {name for name, _ in loaded.named_parameters()}
    for group in model.groups():
        for site, q in group.codes.items():
            assert torch.equal(matrix(loaded.get_submodule(site)), q.decode()), site
        dense = {name: t for name, t in group.dense.items() if name in left}
        assert all(torch.equal(loaded.get_parameter(name), t.float()) for name, t in dense.items())
        left -= dense.keys() | {f"{site}.weight" for site in group.codes}
    assert not left
    assert done.nbytes == sum(p.stat().st_size for p in (tmp_path / "e").glob("*.safetensors"))


def test_a_directory_says_what_it_is_and_where_it_comes_from(int4: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    export(open_low_bit(int4), "bf16", out)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert (
        AutoTokenizer.from_pretrained(out)("a bird").input_ids
        == AutoTokenizer.from_pretrained(int4)("a bird").input_ids
    )
    said = json.loads((out / PROVENANCE).read_text())
    assert (out / said["source"]["path"]).resolve() == int4.resolve()
    assert said["source"]["digest"] == open_low_bit(int4).digest
    assert not list(tmp_path.glob(".e.partial*"))


def test_nothing_is_left_of_an_export_that_failed(int4: Path, tmp_path: Path) -> None:
    model = open_low_bit(int4)

    def cut() -> Iterator[Group]:
        yield next(iter(model.groups()))
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="disk is full\nwhat was begun is removed"):
        export(replace(model, groups=cut), "bf16", tmp_path / "e")
    assert not list(tmp_path.iterdir())
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine").touch()
    with pytest.raises(StorageError, match="is not empty"):
        export(model, "bf16", tmp_path / "e")


def test_a_refusal_names_linears_the_reason_and_a_layout_that_can(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as refused:
        export(open_low_bit(int4), "bnb", tmp_path / "e")
    text = str(refused.value)
    assert "cannot hold 14 of 14 linears: model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, " in text
    assert "--to gptq" in text
    with pytest.raises(ExportError, match="did you mean 'gptq'"):
        export(open_low_bit(int4), "gptqq", tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_rotations_of_inputs_are_folded_into_plain_matrices(int4: Path, tmp_path: Path) -> None:
    model = open_low_bit(int4)
    signs = Codes.of(torch.arange(64).remainder(3).eq(0).to(torch.uint8)[None], 2)
    held = {s: Rotated(q.shape, signs, q, 64) for g in model.groups() for s, q in g.codes.items() if q.shape[1] == 64}
    specs = {**model.specs, **{site: q.spec() for site, q in held.items()}}

    def groups() -> Iterator[Group]:
        for group in model.groups():
            yield replace(group, codes={site: held.get(site, q) for site, q in group.codes.items()})

    rotated = replace(model, specs=specs, groups=groups)
    export(rotated, "fp32", tmp_path / "e")
    loaded = load_file(tmp_path / "e" / "model.safetensors")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for site, q in held.items():
        assert torch.allclose(x @ loaded[f"{site}.weight"].T, q.enter(x) @ q.inner.decode().T, atol=1e-5)
    with pytest.raises(
        ExportError, match=r"cannot hold 12 of 14 linears: model\.layers\.0\.mlp\.gate_proj, (.|\n)*Try: --to bf16$"
    ):
        export(rotated, "gptq", tmp_path / "g")


def test_biases_that_a_transform_added_are_loaded(int4: Path, tmp_path: Path) -> None:
    model = open_low_bit(int4)
    name, bias = "model.layers.1.self_attn.q_proj.bias", torch.linspace(-1, 1, 64)

    def groups() -> Iterator[Group]:
        for group in model.groups():
            here = group.name == "model.layers.1"
            yield replace(group, dense={**group.dense, name: bias}) if here else group

    export(replace(model, groups=groups, added=frozenset({name})), "fp32", tmp_path / "e")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "e", dtype=torch.float32)
    biases = {n: p for n, p in loaded.named_parameters() if n.endswith("bias")}
    assert torch.equal(biases.pop(name), bias)
    assert len(biases) == 7
    assert not any(p.any() for p in biases.values())
    with pytest.raises(ExportError, match="builds without"):
        export(replace(model, added=frozenset({"model.layers.0.nothing.bias"})), "fp32", tmp_path / "f")


def test_experts_have_the_names_that_files_of_the_family_have() -> None:
    model = family_model("mixtral")
    source = of_model(model)
    names = HubNames(source)
    fused = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2]
    tensors = names.tensors({"model.layers.1.mlp.experts.2.gate_up_proj.weight": fused})
    gate, up = fused.chunk(2)
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(tensors[f"{prefix}.w1.weight"], gate)
    assert torch.equal(tensors[f"{prefix}.w3.weight"], up)
    parts = names.parts("model.layers.1.mlp.experts.2.gate_up_proj")
    assert [part.site for part in parts] == [f"{prefix}.w1", f"{prefix}.w3"]


@pytest.mark.parametrize(
    "name", ["int4-g32", "int3-g32-sym", "int8-row", "int4-tensor", "nf4", "nvfp4", "mxfp4", "int4-g32-z16"]
)
def test_rows_can_be_taken_and_stacked(name: str) -> None:
    w = torch.randn(12, 96, generator=torch.Generator().manual_seed(0))
    fmt = preset(name)
    q: QTensor = fmt.encode(w, fmt.fit(w))
    top, rest = take_rows(q, slice(0, 5)), take_rows(q, slice(5, None))
    assert torch.equal(top.decode(), q.decode()[:5])
    assert torch.equal(rest.decode(), q.decode()[5:])
    assert take_rows(hollow(q.spec()), slice(0, 5)).spec() == top.spec()
    if name in ("int4-tensor", "nvfp4"):  # one scale for all rows: those of two matrices differ
        with pytest.raises(FormatError):
            stack_rows([top, fmt.encode(2 * w, fmt.fit(2 * w))])
    again = stack_rows([top, rest])
    assert again.spec() == q.spec()
    assert all(torch.equal(a.data, b.data) for a, b in zip(again.parts(), q.parts(), strict=True))
