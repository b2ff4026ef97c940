"""A plan: its sizes are those of the files that are then written, its memory follows the work, no weight is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, family_model

from lowbit.errors import CoverageError, RecipeError
from lowbit.io.native import Writer
from lowbit.models.source import of_directory, of_model
from lowbit.models.store import Files
from lowbit.pipeline.plan import Plan, Rates, plan
from lowbit.pipeline.recipe import Recipe, parse, with_calibration
from lowbit.pipeline.walk import walk

RATES = Rates(flops=1e11, elementwise=1e10, resident=400_000_000)
WIDTHS = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96)  # inputs and outputs of the linears of a block of ``llama``
LINES = ["rtn:int4-g32", "rtn:int3-g64-sym", "rtn:int8-row", "rtn:nf4-dq", "rtn:mxfp4", "rtn:nvfp4", "rtn:ternary"]


def of(root: Path, recipe: str | Recipe, rates: Rates = RATES, dtype: torch.dtype = torch.float32) -> Plan:
    return plan(of_directory(root), parse(recipe) if isinstance(recipe, str) else recipe, rates, dtype)


def stored(out: Path) -> int:
    """Bytes of tensors in a checkpoint's shards, their headers left out."""
    total = 0
    for path in out.glob("*.safetensors"):
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        total += path.stat().st_size - 8 - size
        assert total >= 0, header
    return total


@pytest.mark.parametrize("line", LINES)
def test_sizes_are_those_of_the_files(llama: Path, tmp_path: Path, line: str) -> None:
    check_sizes(llama, parse(line), tmp_path)


@pytest.mark.parametrize("name", ["opt", "gpt2", "falcon", "mistral", "mixtral", "bloom"])
def test_sizes_are_those_of_the_files_of_every_kind_of_model(
    families: dict[str, Path], name: str, tmp_path: Path
) -> None:
    check_sizes(families[name], parse("rtn:int4-g32"), tmp_path)


def check_sizes(root: Path, recipe: Recipe, out: Path) -> None:
    source = of_directory(root)
    planned = plan(source, recipe, RATES)
    with Writer(out / "out", source, recipe, None) as writer:
        walk(source, recipe, None, writer)
        writer.finish({})
    sites = json.loads((out / "out" / "lowbit.json").read_text())["sites"]
    assert planned.bytes_quantized == sum(site["nbytes"] for site in sites)
    assert planned.sites == len(sites)
    assert planned.bytes_total == stored(out / "out")
    assert planned.bits_per_weight == pytest.approx(8 * planned.bytes_quantized / planned.quantized)


def test_an_override_changes_what_it_names(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        '[[step]]\nmethod = "rtn"\nformat = "int4-g32"\n'
        '[[override]]\nsites = "*.down_proj"\nformat = "int8-row"\n'
        '[[override]]\nsites = "model.layers.0.*"\nkeep = "the first block is fragile"\n'
    )
    whole, mixed = of(llama, "rtn:int4-g32"), of(llama, str(tmp_path / "r.toml"))
    assert mixed.sites == whole.sites - 6  # the first block's down_proj is taken by the first override
    assert sum(kept.why == "the first block is fragile" for kept in mixed.kept) == 6
    check_sizes(llama, parse(str(tmp_path / "r.toml")), tmp_path)


def test_no_weight_is_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(*_: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Files, "get", reading)
    assert of(llama, "gptq:int4-g32").sites == 14


def test_memory_grows_by_the_activations_of_the_tokens(llama: Path) -> None:
    """By hand: hidden states, and in a lockstep pass the inputs and outputs of every linear of one block."""
    recipe = with_calibration(parse("gptq:int4-g32"), samples=8, length=64)
    more = with_calibration(recipe, samples=24)
    grown = of(llama, more).peak - of(llama, recipe).peak
    assert grown == 16 * 64 * (64 + WIDTHS) * 4
    assert of(llama, more, dtype=torch.bfloat16).peak < of(llama, more).peak
    assert of(llama, "rtn:int4-g32").peak < of(llama, recipe).peak


def test_memory_is_beside_the_process_that_plans(llama: Path) -> None:
    larger = replace(RATES, resident=RATES.resident + 1000)
    assert of(llama, "gptq:int4-g32", larger).peak == of(llama, "gptq:int4-g32").peak + 1000


def test_gradients_take_the_logits_of_a_window(llama: Path) -> None:
    """By hand: four tensors over the vocabulary, and what one block computes for a window, twice."""

    def fisher(line: str, length: int) -> list[int]:
        recipe = with_calibration(parse(line), samples=8, length=length)
        return [stage.memory for stage in of(llama, recipe).stages if stage.name == "Fisher information"]

    assert fisher("gptq:int3-g32", 64) == fisher("gptq:ec3,fisher=false", 64) == []
    (short,), (long,) = fisher("gptq:ec3", 32), fisher("gptq:ec3", 64)
    assert long - short == 32 * 4 * (4 * VOCAB + 2 * WIDTHS + 8 * 64)


def test_a_block_is_transformed_with_all_its_gram_matrices(llama: Path, families: dict[str, Path]) -> None:
    def grams(root: Path, line: str) -> tuple[int, int]:
        memory = {stage.name: stage.memory for stage in of(root, line).stages}
        return memory["statistics"] - memory["forward passes"], memory["factorisation"] - memory["statistics"]

    wide, narrow = 4 * 96 * 96, 4 * 64 * 64
    work = 4 * wide + 6 * 4 * 64 * 96  # beside a lockstep pass also what coding a weight takes
    assert grams(llama, "gptq:int4-g32") == (wide, work)
    assert grams(llama, "awq+gptq:int4-g32") == (wide + 3 * narrow, work)
    assert grams(llama, "awq+rtn:int4-g32") == (wide + 3 * narrow, 0)  # qkv, o, gate and up, down
    assert grams(llama, "tune:int4-g32") == (wide + 3 * narrow, 4 * wide)
    assert grams(families["mixtral"], "gptq:int4-g32")[0] == 4 * wide  # of four experts


def test_mapped_files_count_and_a_model_in_memory_maps_none(llama: Path) -> None:
    source, recipe = of_directory(llama), parse("rtn:int4-g32")
    planned = plan(source, recipe, RATES)
    assert planned.mapped == sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    held = plan(of_model(family_model("llama")), recipe, RATES)
    assert held.mapped == 0
    assert [a.memory - b.memory for a, b in zip(planned.stages, held.stages, strict=True)] == 3 * [planned.mapped]


def test_without_true_sequential_only_a_batch_is_inside_a_block(llama: Path) -> None:
    calm = with_calibration(parse("gptq:int4-g32,true_sequential=false"), samples=64, length=64, batch=4)
    step = with_calibration(parse("gptq:int4-g32"), samples=64, length=64, batch=4)
    assert of(llama, calm).peak < of(llama, step).peak


def test_times_follow_the_work_and_the_machine(llama: Path) -> None:
    recipe = with_calibration(parse("gptq:int4-g32"), samples=8, length=64)
    seconds = {stage.name: stage.seconds for stage in of(llama, recipe).stages}
    twice = {stage.name: stage.seconds for stage in of(llama, with_calibration(recipe, samples=16)).stages}
    for name in ("forward passes", "statistics"):
        assert twice[name] == pytest.approx(2 * seconds[name])
    for name in ("factorisation", "rounding", "clip search"):
        assert twice[name] == seconds[name] > 0
    fast = Rates(2 * RATES.flops, 2 * RATES.elementwise, RATES.resident)
    assert of(llama, "rtn:int4-g32", fast).seconds < of(llama, "rtn:int4-g32").seconds
    assert of(llama, "rtn:int4-g32,clip=40").seconds > of(llama, "rtn:int4-g32").seconds
    assert {stage.name for stage in of(llama, "rtn:int4-g32").stages} == {"read and write", "clip search", "rounding"}


def test_this_machine_has_rates() -> None:
    rates = Rates.measure()
    assert 1e8 < rates.flops < 1e15
    assert 1e8 < rates.elementwise < 1e13
    assert rates.resident > 50_000_000


def test_what_cannot_be_walked_cannot_be_planned(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        '[[step]]\nmethod = "rtn"\nformat = "nf4"\n[[override]]\nsites = "*.fc1"\nformat = "int8-row"\n'
    )
    with pytest.raises(RecipeError, match="matches no site"):
        of(llama, str(tmp_path / "r.toml"))
    (tmp_path / "k.toml").write_text(
        '[[step]]\nmethod = "rtn"\nformat = "nf4"\n[[override]]\nsites = "*"\nkeep = "a test"\n'
    )
    with pytest.raises(CoverageError, match="quantizes nothing"):
        of(llama, str(tmp_path / "k.toml"))
