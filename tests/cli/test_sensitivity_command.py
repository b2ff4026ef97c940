"""The sensitivity command, and a budget spent with what it measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowbit.cli import sensitivity as command
from lowbit.errors import RecipeError
from lowbit.models.source import of_directory
from lowbit.pipeline import sensitivity as measuring
from lowbit.pipeline.recipe import parse, with_calibration
from lowbit.pipeline.sensitivity import read
from lowbit.report import page, sensitivity_chart

FORMATS = "int2-g32,int4-g32,int8-g32"


@pytest.fixture(scope="module", autouse=True)
def _no_library() -> Iterator[None]:
    """The chart library takes seconds to bundle; the report's own tests have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "chart_library", lambda: "library")
        yield


@pytest.fixture(scope="module")
def measured(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command's file, with its page beside it."""
    out = tmp_path_factory.mktemp("sensitivity") / "s.json"
    command.sensitivity(
        str(llama), out, recipe="rtn", formats=FORMATS, text=str(text), samples=4, length=32, dtype="float32",
        report=out.with_suffix(".html"),
    )  # fmt: skip
    return out


def test_the_command_writes_what_it_prints(
    measured: Path, llama: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shown: list[str] = []
    for as_json in (True, False):
        command.sensitivity(
            str(llama), tmp_path / "s.json", recipe="rtn", formats=FORMATS, text=str(text), samples=4, length=32,
            dtype="float32", as_json=as_json,
        )  # fmt: skip
        shown.append(capsys.readouterr().out)
    assert json.loads(shown[0]) == json.loads((tmp_path / "s.json").read_text()) == json.loads(measured.read_text())
    lines = shown[1].splitlines()
    assert lines[0].split() == ["kind", *FORMATS.split(",")]
    assert [line.split()[0] for line in lines[1:8]] == [
        f"self_attn.{x}_proj" for x in "qkvo"
    ] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]  # fmt: skip


def test_a_budget_is_spent_with_what_was_measured_once(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch, measured: Path
) -> None:
    def again(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    source = of_directory(llama)
    monkeypatch.setattr(measuring, "measure", again)
    base = with_calibration(parse(command.coded("rtn", "int4-g32")), text=str(text), samples=4, length=32)
    found = command.spend(source, base, 130_000, FORMATS, None, torch.float32)
    assert command.spend(source, base, 130_000, None, measured, torch.float32) == found
    assert 120_000 < found.nbytes <= 130_000
    first, *more = command.told(found)
    assert first.startswith("Budget 130 kB: at most 1")
    assert sum(map(int, re.findall(r"(\d+) linears in", first))) == 14
    assert more == []
    largest = command.told(command.spend(source, base, 2 * 10**9, FORMATS, None, torch.float32))
    assert largest[1].startswith("More bytes would change nothing: 2.00 GB are left over")
    with pytest.raises(RecipeError, match="the formats are those of the sensitivity"):
        command.spend(source, base, 130_000, FORMATS, measured, torch.float32)


@pytest.mark.parametrize(
    ("line", "coded"),
    [
        ("gptq", "gptq:int4-g64"), ("gptq,damp=0.02", "gptq:int4-g64,damp=0.02"), ("gptq:nf4", "gptq:nf4"),
        ("awq+gptq,clip=9", "awq+gptq:int4-g64,clip=9"), ("mixed.toml", "mixed.toml"),
    ],
)  # fmt: skip
def test_an_encoder_gets_a_format(line: str, coded: str) -> None:
    assert command.coded(line, "int4-g64") == coded


def test_the_page_shows_every_block_and_kind(measured: Path) -> None:
    shown = measured.with_suffix(".html").read_text(encoding="utf-8")
    found = read(measured)
    specs = {
        key: json.loads(spec)
        for key, spec in re.findall(r'<script type="application/json" data-chart="([\w-]+)">(.*?)</script>', shown)
    }
    assert list(specs) == ["sensitivity-map", "sensitivity-kinds"]
    cells = specs["sensitivity-map"]["datasets"]["cells"]
    assert {(c["block"], c["kind"]): c["loss"] for c in cells} == pytest.approx(
        {(int(row.name.split(".")[2]), row.name.split(".", 3)[3]): row.loss["int4-g32"] for row in found.sites}
    )
    kinds = {k["kind"]: k["loss"] for k in specs["sensitivity-kinds"]["datasets"]["kinds"]}
    assert sum(kinds.values()) == pytest.approx(sum(row.loss["int4-g32"] for row in found.sites))
    assert shown.count('<td class="text">') == 7
    for name in specs:
        assert f'id="{name}"' in shown


def test_names_from_a_file_cannot_be_markup(measured: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    value = read(measured).model_dump(mode="json")
    value |= {"model": evil, "text": evil, "encoder": evil}
    value["sites"][0]["name"] = f"model.layers.0.{evil}"
    shown = sensitivity_chart.render(value)
    assert "<img" not in shown
    assert shown.count("</script>") == 4  # two charts, the library, the start
