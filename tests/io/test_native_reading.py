"""Reading native checkpoints that were cut, altered or made up: each is one CheckpointError that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lowbit
from lowbit import digest
from lowbit.errors import CheckpointError
from lowbit.io.native import is_native, qtensors, settings, verify

BLOCK = "lowbit-block-00001.safetensors"
Q = "model.layers.1.self_attn.q_proj"


def flip(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> None:
    """Another shard in place of one, with a manifest that agrees: what someone who means harm would make."""
    with safe_open(path, framework="pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        held = json.loads(shard.metadata()["lowbit"])
    change(tensors, held)
    save_file(tensors, path, metadata={"format": "pt", "lowbit": json.dumps(held)})
    entry = {"bytes": path.stat().st_size, "sha256": digest.of_file(path)}
    edit(path.parent / "lowbit.json", lambda manifest: manifest["files"].update({path.name: entry}))


def spec_of(held: dict[str, Any]) -> dict[str, Any]:
    return held["specs"][Q]


def in_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda root: edit(root / "lowbit.json", change)


def in_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda root: edit(root / "config.json", lambda c: change(c["quantization_config"]))


def in_shard(
    change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], name: str = BLOCK
) -> Callable[[Path], None]:
    return lambda root: rewrite(root / name, change)


def absurd_size(tensors: dict[str, torch.Tensor], held: dict[str, Any]) -> None:
    spec_of(held)["shape"] = [1 << 30, 1 << 30]


def large_size(tensors: dict[str, torch.Tensor], held: dict[str, Any]) -> None:
    for leaf in spec_of(held)["leaves"]:
        leaf[2] = [1 << 19, 1 << 19]


def other_site(tensors: dict[str, torch.Tensor], held: dict[str, Any]) -> None:
    held["specs"]["model.layers.9.nothing"] = held["specs"].pop(Q)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: flip(root / BLOCK), rf"{BLOCK}: its bytes do not have files\..*\.sha256"),
        (lambda root: (root / BLOCK).write_bytes((root / BLOCK).read_bytes()[:-1]), rf"{BLOCK}: has \d+ bytes, files"),
        (lambda root: (root / BLOCK).write_bytes((root / BLOCK).read_bytes() + b"\0"), rf"{BLOCK}: has \d+ bytes"),
        (lambda root: (root / BLOCK).unlink(), f"the file '{BLOCK}' is missing"),
        (lambda root: (root / "lowbit.json").write_text("{"), r"lowbit\.json: is not JSON"),
        (lambda root: (root / "model.safetensors.index.json").unlink(), r"index\.json: does not exist"),
        (in_manifest(lambda m: m.update(version=3)), r"lowbit\.json: version is 3, this lowbit reads \(1, 2\)"),
        (in_manifest(lambda m: m.pop("version")), "version is None"),
        (in_manifest(lambda m: m.update(files=[])), "files is no table"),
        (in_manifest(lambda m: m["files"].update(x=3)), "files is no table"),
        (in_manifest(lambda m: m["files"].update({"../lowbit.json": {}})), r"the file '\.\./lowbit\.json' is missing"),
        (in_manifest(lambda m: m["files"].pop(BLOCK)), r"index\.json: weight_map is not what the shards hold"),
        (in_config(lambda q: q.update(version=9)), r"config\.json: quantization_config\.version is 9"),
        (in_config(lambda q: q.update(formats=3)), r"config\.json: quantization_config\.formats is malformed"),
        (in_config(lambda q: q["formats"][0].update(spec={})), r"config\.json: quantization_config\.formats is malf"),
        (in_config(lambda q: q["formats"][0]["sites"].pop()), r"config\.json: .*formats is not what the shards hold"),
        (in_shard(lambda t, held: held.update(version=3)), rf"{BLOCK}: metadata\.lowbit\.version is 3"),
        (in_shard(lambda t, held: held.pop("specs")), rf"{BLOCK}: metadata\.lowbit is malformed"),
        (in_shard(absurd_size), rf"{BLOCK}: metadata\.lowbit is malformed.*larger than any tensor"),
        (in_shard(large_size), rf"{BLOCK}: .*q_proj\.weight\.codes is .*, metadata\.lowbit says"),
        (in_shard(other_site), rf"{BLOCK}: the part 'model\.layers\.9\.nothing\.weight\.codes' is missing"),
        (in_shard(lambda t, held: t.pop(f"{Q}.weight.scale.data")), r"the part '.*q_proj\.weight\.scale\.data' is mis"),
        (in_shard(lambda t, held: t.update({f"{Q}.weight.scale.data": t[f"{Q}.weight.scale.data"].float()})),
         r"scale\.data is \('float32', .*, metadata\.lowbit says \('float16'"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(checkpoint: Path, damage: Callable[[Path], None], message: str) -> None:
    verify(checkpoint)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        verify(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        lowbit.load(checkpoint)


def test_headers_of_safetensors_are_not_trusted(checkpoint: Path) -> None:
    path = checkpoint / BLOCK
    size = path.stat().st_size
    path.write_bytes((1 << 62).to_bytes(8, "little") + bytes(size - 8))
    edit(
        checkpoint / "lowbit.json",
        lambda m: m["files"].update({BLOCK: {"bytes": size, "sha256": digest.of_file(path)}}),
    )
    with pytest.raises(CheckpointError, match=f"{BLOCK}: cannot be read"):
        verify(checkpoint)


def test_a_byte_altered_under_an_old_date_is_seen(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_SETTLED_NS", 0)  # remember at once
    path, before = checkpoint / BLOCK, (checkpoint / BLOCK).stat()
    verify(checkpoint)
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    verify(checkpoint, contents=False)  # sizes and headers are as they were
    with pytest.raises(CheckpointError, match="it was altered"):
        verify(checkpoint)


def test_what_is_native(checkpoint: Path, llama: Path) -> None:
    assert is_native(checkpoint)
    assert not is_native(llama)
    with pytest.raises(CheckpointError, match="is no lowbit checkpoint"):
        lowbit.load(llama)
    (checkpoint / "config.json").unlink()  # as while a run is under way
    assert not is_native(checkpoint)


def test_qtensors_are_those_of_the_config(checkpoint: Path) -> None:
    specs = settings(checkpoint).specs
    found = dict(qtensors(checkpoint))
    assert {site: q.spec() for site, q in found.items()} == specs
    assert len(found) == 14
    in_files = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    assert sum(q.nbytes for q in found.values()) < in_files
    manifest = verify(checkpoint)
    assert sum(entry["bytes"] for entry in manifest["files"].values()) == in_files
