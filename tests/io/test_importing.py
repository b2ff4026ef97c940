"""Files of other ecosystems become checkpoints of the very same codes; what is not what it says is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_runs import quantize

from lowbit.errors import CheckpointError, LowbitError, ModelError
from lowbit.io.export import export
from lowbit.io.importing import import_low_bit
from lowbit.io.native import verify
from lowbit.io.opening import open_low_bit
from lowbit.study.stages import describe

WAYS = [
    ("mixtral", "awq", "rtn:int4-g32"),
    ("opt", "compressed-tensors", "rtn:int8-row-sym+a:int8-token-sym"),
    ("gpt2", "bnb", "rtn:nf4"),
]


@pytest.mark.parametrize(("family", "layout", "recipe"), WAYS)
def test_there_and_back(families: dict[str, Path], tmp_path: Path, family: str, layout: str, recipe: str) -> None:
    quantize(families[family], tmp_path / "q", None, recipe)
    before = open_low_bit(tmp_path / "q")
    export(before, layout, tmp_path / "e")
    assert not import_low_bit(open_low_bit(tmp_path / "e"), tmp_path / "i")
    after = open_low_bit(tmp_path / "i")
    assert after.specs == before.specs
    assert after.inputs == before.inputs
    for one, other in zip(before.groups(), after.groups(), strict=True):
        for site, q in one.codes.items():
            parts = zip(q.parts(), other.codes[site].parts(), strict=True)
            assert all(a.path == b.path and torch.equal(a.data, b.data) for a, b in parts)
        assert one.dense.keys() == other.dense.keys()
        assert all(torch.equal(t, other.dense[n]) and t.dtype == other.dense[n].dtype for n, t in one.dense.items())
    assert describe(tmp_path / "i")["recipe"] == f"imported:{layout}"
    verify(tmp_path / "i")


@pytest.fixture(scope="module")
def gptq(int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ directory; read only."""
    out = tmp_path_factory.mktemp("gptq") / "e"
    export(open_low_bit(int4), "gptq", out)
    return out


def test_an_import_goes_on_where_it_was_killed(gptq: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        import_low_bit(open_low_bit(gptq), tmp_path / "i", kill)
    first = tmp_path / "i" / "lowbit-block-00000.safetensors"
    written = first.stat().st_mtime_ns
    assert not import_low_bit(open_low_bit(gptq), tmp_path / "i")
    assert first.stat().st_mtime_ns == written
    assert describe(tmp_path / "i")["resumed"]
    assert import_low_bit(open_low_bit(gptq), tmp_path / "i")  # complete: nothing is done


def config(**changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        held = json.loads((root / "config.json").read_text())
        quantization = held["quantization_config"]
        for key, value in changes.items():
            target = quantization if key in quantization else held
            target[key] = value
        (root / "config.json").write_text(json.dumps(held))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        held = load_file(root / "model.safetensors")
        change(held)
        save_file(held, root / "model.safetensors", {"format": "pt"})

    return apply


def cut(root: Path) -> None:
    path = root / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def huge_header(root: Path) -> None:
    (root / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def only_pickled(root: Path) -> None:
    (root / "model.safetensors").unlink()
    (root / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


SITE = "model.layers.0.self_attn.q_proj"
DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (cut, "cannot be read"),
    (huge_header, "cannot be read"),
    (only_pickled, "is a pickle"),
    (config(bits=8), SITE),
    (config(group_size=64), SITE),
    (config(quant_method="gptqq"), "did you mean 'gptq'"),
    (config(model_type="mine", auto_map={"AutoModel": "mine.Model"}), "auto_map asks for it"),
    (config(hidden_size=1 << 40), "no model that transformers knows"),
    (tensors(lambda t: t.pop(f"{SITE}.scales")), SITE),
    (tensors(lambda t: t.update({f"{SITE}.qweight": t[f"{SITE}.qweight"][:-1].clone()})), SITE),
    (tensors(lambda t: t.update({"model.layers.7.mlp.up_proj.qweight": torch.zeros(1)})), "belong to no linear"),
    (tensors(lambda t: t.pop("model.norm.weight")), "'model.norm.weight' is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_one_clear_error(gptq: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    root = Path(shutil.copytree(gptq, tmp_path / "e"))
    damage(root)
    with pytest.raises(LowbitError, match=message):
        open_low_bit(root)


def test_pickles_are_known_by_their_bytes(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.model")
    (tmp_path / "weights.dat").write_bytes(pickle.dumps([1]))
    for name in ("weights.model", "weights.dat"):
        with pytest.raises(ModelError, match="is a pickle") as refused:
            open_low_bit(tmp_path / name)
        assert "save_pretrained" in refused.value.fix


def test_what_is_not_low_bit_or_is_native_is_not_imported(llama: Path, int4: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no low-bit weights"):
        open_low_bit(llama)
    with pytest.raises(CheckpointError, match="native checkpoint already"):
        import_low_bit(open_low_bit(int4), tmp_path / "i")
