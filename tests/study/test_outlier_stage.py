"""Outlier statistics against scipy and numpy on all values at once, and what an outlier does to them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import family_model
from transformers import AutoModelForCausalLM

from lowbit.cli.run import run_grids
from lowbit.errors import EvidenceError, ModelError, StudyError
from lowbit.models.graph import is_linear
from lowbit.models.source import of_directory, of_model
from lowbit.study import grid, outliers, spec
from lowbit.study.outliers import Spread, Tail, tails
from lowbit.study.store import Store


def expected(x: np.ndarray) -> dict[str, float | None]:
    """The same of all values at once."""
    x = x.astype(np.float64)
    far, largest = np.abs(x - x.mean()) > 6 * x.std(), np.abs(x).max(0)
    top = np.sort(far.sum(0))[::-1][: int(np.ceil(x.shape[1] / 100))]
    return {
        "absmax": np.abs(x).max(), "std": x.std(), "kurtosis": stats.kurtosis(x, axis=None, fisher=False),
        "beyond": far.mean(), "held": top.sum() / far.sum() if far.any() else None,
        "peak": largest.max() / float(torch.from_numpy(largest).median()), "values": x.size, "channels": x.shape[1],
    }  # fmt: skip


def same(tail: Tail, x: np.ndarray) -> None:
    for name, value in expected(x).items():
        assert getattr(tail, name) == (None if value is None else pytest.approx(value, rel=1e-9)), name


def spread_of(x: torch.Tensor, parts: list[int]) -> Tail:
    spread = Spread()
    for see in (spread.take, spread.count):
        for part in x.split(parts):
            see(part)
    return spread.tail("A", 0, "x")


def test_parts_give_what_the_whole_gives() -> None:
    heavy = torch.from_numpy(np.random.default_rng(0).standard_t(6, (4000, 130)))
    heavy[:, 7] *= 40  # a channel that holds the large values
    heavy += 25.0  # far from zero, where sums of powers would lose every digit of float32
    found = spread_of(heavy, [1, 1999, 0, 2000])
    same(found, heavy.numpy())
    assert found.held is not None
    assert found.held > 0.9


def test_known_distributions() -> None:
    drawn = np.random.default_rng(1)
    gaussian = spread_of(torch.from_numpy(drawn.standard_normal((2000, 100))), [2000])
    assert gaussian.kurtosis == pytest.approx(3.0, abs=0.05)
    assert (gaussian.beyond, gaussian.held) == (0.0, None)
    student = spread_of(torch.from_numpy(drawn.standard_t(6, (8000, 100))), [8000])
    assert 5 < student.kurtosis < 8
    constant = spread_of(torch.full((8, 4), 0.5), [8])
    assert (constant.kurtosis, constant.std, constant.peak) == (0.0, 0.0, 1.0)
    with pytest.raises(ModelError, match="NaN or infinite"):
        spread_of(torch.tensor([[1.0, float("inf")]]), [1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mistral", "mixtral"])
def test_every_tensor(family: str, families: dict[str, Path], tokens: torch.Tensor) -> None:
    """Recorded in one pass of the model as transformers loads it (experts there are fused, so not theirs)."""
    windows = tokens[:2]
    found = {(t.what, t.layer, t.kind): t for t in tails(of_directory(families[family]), windows, torch.float32)}
    model = AutoModelForCausalLM.from_pretrained(families[family], dtype=torch.float32)
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            module.register_forward_pre_hook(
                lambda _, x, name=name: seen.setdefault(name, []).append(x[0].flatten(0, -2).numpy())
            )
    with torch.no_grad():
        kept = [model(row[None], use_cache=True).past_key_values for row in windows]
    linears = {(t.layer, t.kind) for t in found.values() if t.what == "W"}
    checked = 0
    for name, inputs in seen.items():
        if match := next((x for x in linears if name.endswith(f".{x[0]}.{x[1]}")), None):
            tail = found["A", *match]
            assert tail.kurtosis == pytest.approx(
                stats.kurtosis(np.concatenate(inputs).astype(np.float64), axis=None, fisher=False), rel=1e-3
            )
            assert tail.absmax == pytest.approx(np.abs(np.concatenate(inputs)).max(), rel=1e-4)
            checked += 1
    assert checked >= 2 * 3
    for layer in range(2):
        for what in ("keys", "values"):
            if "sliding" in type(kept[0].layers[layer]).__name__.lower():
                continue  # transformers forgets what the window passed
            states = [np.asarray(getattr(k.layers[layer], what)[0]) for k in kept]
            x = np.concatenate([s.transpose(1, 0, 2).reshape(s.shape[1], -1) for s in states])
            tail = found["K" if what == "keys" else "V", layer, "cache"]
            assert (tail.values, tail.channels) == (x.size, x.shape[1])
            assert tail.std == pytest.approx(x.astype(np.float64).std(), rel=1e-4)


def test_injected_outliers_are_found(tokens: torch.Tensor) -> None:
    """Four channels of a norm 64 times larger, the weights behind it smaller: A1.4 wants ten times the kurtosis."""
    before, after = family_model("llama"), family_model("llama")
    with torch.no_grad():
        after.model.layers[1].input_layernorm.weight[:4] *= 64
        for name in "qkv":
            getattr(after.model.layers[1].self_attn, f"{name}_proj").weight[:, :4] /= 64
    first, second = (
        {(t.what, t.layer, t.kind): t for t in tails(of_model(m), tokens[:2], torch.float32)} for m in (before, after)
    )
    site: tuple[outliers.What, int, str] = ("A", 1, "self_attn.q_proj")
    assert second[site].kurtosis > 10 * first[site].kurtosis
    assert second[site].peak > 10 * first[site].peak
    untouched: tuple[outliers.What, int, str] = ("A", 1, "mlp.up_proj")
    assert second[untouched].kurtosis == pytest.approx(first[untouched].kurtosis, rel=1e-4)


def test_the_cell(llama: Path, tmp_path: Path) -> None:
    study = spec.Study(
        name="s", models=[str(llama)], recipes=["rtn:int4-g32"], outliers=spec.Outliers(windows=2, length=16),
        evaluation=spec.Evaluation(protocol="windows-32", windows=2, dtype="float32"),
    )  # fmt: skip
    (planned,) = grid.of_study(study)
    assert planned.outliers is not None
    assert run_grids(tmp_path, "s", {}, [planned.outliers], 1) == 0
    with Store(tmp_path) as store:
        folder = store.evidence_folder(planned.outliers.cell.key)
        assert store.cell(planned.outliers.cell.key).output == {"tails": 2 * (7 + 7 + 2), "tokens": 32}
    found = outliers.read(folder)
    assert [t.what for t in found] == ["W"] * 14 + ["A"] * 14 + ["K"] * 2 + ["V"] * 2
    rows: list[dict[str, Any]] = [dataclasses.asdict(t) for t in found]
    for change in ({"what": "X"}, {"kurtosis": float("nan")}, {"layer": 1.5}, {"more": 1}):
        (tmp_path / outliers.FILE).write_text(json.dumps([rows[0] | change]))
        with pytest.raises(EvidenceError):
            outliers.read(tmp_path)
    with pytest.raises(StudyError, match="reads at most 128"):
        tails(of_directory(llama), torch.zeros(1, 129, dtype=torch.int64), torch.float32)
