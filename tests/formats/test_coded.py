"""Entropy-coded tensors: their definition, their spelling, what cannot be one, the steps that they are stored with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.codec import stream as coder
from lowbit.errors import FormatError, RecipeError
from lowbit.formats.ec import Entropy, Lattice, Levels, entropy
from lowbit.formats.nodes_coded import Coded
from lowbit.formats.pack import Codes
from lowbit.formats.presets import preset
from lowbit.formats.qtensor import build
from lowbit.formats.spec import Spec

ROWS, COLUMNS = 24, 150


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers() -> torch.Tensor:
    return (2 * normal(ROWS, COLUMNS)).round().to(torch.int16)


def coded(steps: bool = True, gains: bool = True) -> Coded:
    stream = coder.encode(numbers(), [128, 22])
    step = torch.randint(0, 32, (1, COLUMNS), generator=torch.Generator().manual_seed(1))
    gain = torch.randint(0, 16, (1, ROWS), generator=torch.Generator().manual_seed(2))
    return Coded(
        (ROWS, COLUMNS), stream, Codes.of(step, 32) if steps else None, Codes.of(gain, 16) if gains else None,
        -5.25, 0.1 if steps else 0.0, 0.2 if gains else 0.0,
    )  # fmt: skip


KINDS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("steps", "gains"), KINDS)
def test_values_are_those_of_the_definition(steps: bool, gains: bool) -> None:
    q = coded(steps, gains)
    step = np.zeros(COLUMNS) if q.steps is None else q.steps.unpack()[0].double().numpy()
    gain = np.zeros(ROWS) if q.gains is None else q.gains.unpack()[0].double().numpy()
    order = np.argsort(step, kind="stable")
    expected = np.empty((ROWS, COLUMNS))
    for place, column in enumerate(order):
        expected[:, column] = numbers()[:, place].numpy() * 2.0 ** (-5.25 + 0.1 * step[column])
    expected *= 2.0 ** (0.2 * gain)[:, None]
    np.testing.assert_allclose(q.decode().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("steps", "gains"), KINDS)
def test_rows_json_and_parts(steps: bool, gains: bool) -> None:
    q = coded(steps, gains)
    assert torch.equal(q.decode(rows=slice(5, 11)), q.decode()[5:11])
    assert q.decode(rows=slice(0, 0)).shape == (0, COLUMNS)
    spec = Spec.from_json(json.loads(json.dumps(q.spec().to_json())))
    assert spec == q.spec()
    again = build(spec, {part.path: part.data for part in q.parts()})
    assert torch.equal(again.decode(), q.decode())
    assert q.nbytes == q.stream.numel() + (94 if steps else 0) + (12 if gains else 0)  # 5 bits a column, 4 a row


def test_entered_inputs_meet_the_numbers() -> None:
    q, x = coded(), normal(3, COLUMNS, seed=4)
    fused = q.gain * (q.enter(x) @ q.numbers().float().t())
    torch.testing.assert_close(fused, x @ q.decode().t(), rtol=1e-5, atol=1e-5)


def change(field: str, value: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def edit(spec: dict[str, Any], parts: dict[str, torch.Tensor]) -> None:
        spec["static"][field] = value

    return edit


def shape_of(shape: list[int]) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def edit(spec: dict[str, Any], parts: dict[str, torch.Tensor]) -> None:
        spec["shape"] = shape

    return edit


def header(spec: dict[str, Any], parts: dict[str, torch.Tensor]) -> None:
    parts["stream"] = parts["stream"].clone()
    parts["stream"][:8] = 255


def no_gains(spec: dict[str, Any], parts: dict[str, torch.Tensor]) -> None:
    next(leaf for leaf in spec["leaves"] if leaf[0] == "gains")[3] = ROWS - 1


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (change("base", 1000.0), "octaves"),
        (change("step_octaves", float(10)), "octaves"),
        (change("base", "high"), "wrong kind"),
        (change("base", True), "wrong kind"),
        (shape_of([ROWS, COLUMNS - 1]), "a stream of"),
        (shape_of([ROWS + 1, COLUMNS]), "a stream of"),
        (header, "cannot be decoded"),
        (no_gains, "gains: "),
    ],
)
def test_what_is_none(edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], problem: str) -> None:
    q = coded()
    spec, parts = json.loads(json.dumps(q.spec().to_json())), {part.path: part.data for part in q.parts()}
    edit(spec, parts)
    with pytest.raises(FormatError, match=problem):
        build(Spec.from_json(spec), parts)


def test_a_spelling_is_a_rate() -> None:
    fmt = preset("ec2.5")
    assert isinstance(fmt, Entropy)
    assert (fmt.name, fmt.bits, fmt.nbytes((64, 100))) == ("ec2.5", 2.5, 2000)
    assert preset("ec3.00").name == "ec3"
    assert entropy("ec3-g64") is None
    with pytest.raises(RecipeError, match=r"9 bits a weight are not in \[1, 8\]"):
        preset("ec9")
    with pytest.raises(FormatError, match="no rate"):
        preset("ec").check((4, 4))
    for step in (fmt.fit, fmt.snap, fmt.snapper):
        with pytest.raises(FormatError, match="no grid before its numbers are known"):
            step(normal(4, 4))


def test_levels_are_the_nearest_and_reach_both_ends() -> None:
    values = torch.exp2(3 * normal(200).double()).float()
    levels = Levels.of(values, 32)
    assert levels.codes is not None
    exponent = levels.low + levels.octaves * levels.codes.unpack()[0].double()
    assert float((exponent - values.double().log2()).abs().max()) <= levels.octaves / 2 + 32 * 5e-5
    assert (int(levels.codes.unpack().min()), int(levels.codes.unpack().max())) == (0, 31)
    assert Levels.of(torch.full((7,), 0.3), 32).codes is None


def test_a_lattice_is_stored_as_it_is_used() -> None:
    step, gain = torch.exp2(normal(COLUMNS)), torch.exp2(normal(ROWS, seed=1) / 2)
    lattice = Lattice.of(step, gain)
    q = lattice.tree(coder.encode(numbers()), (ROWS, COLUMNS), -7.1)
    assert lattice.nbytes == q.nbytes - q.stream.numel()
    for stored, wanted, levels in ((q.step, step, 32), (q.gain, gain, 16)):
        ratio = (stored / wanted).log2()
        spacing = float(wanted.log2().max() - wanted.log2().min()) / (levels - 1)
        assert float(ratio.max() - ratio.min()) <= 1.01 * spacing + 1e-2
    assert float(q.step.min().log2()) == pytest.approx(-7.1)


def test_a_wide_range_of_steps_and_gains_is_read_back() -> None:
    """Indices reach 31 and 15: four octaves of steps and twelve of gains are no excess."""
    q = dataclasses.replace(coded(), base=-20.0, step_octaves=4 / 31, gain_octaves=12 / 15)
    parts = {part.path: part.data for part in q.parts()}
    assert torch.equal(build(q.spec(), parts).decode(), q.decode())
    assert "octaves" in dataclasses.replace(q, gain_octaves=7.0).problem()
