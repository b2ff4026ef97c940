"""docs/reference/checkpoint.md is enough to read a checkpoint: decoding by hand from its words, with numpy alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from lowbit.io.native import qtensors


def unpack(data: np.ndarray, columns: int, levels: int) -> np.ndarray:
    """A little-endian bit stream a row."""
    bits = int(np.ceil(np.log2(levels)))
    stream = np.unpackbits(data, axis=1, bitorder="little")[:, : columns * bits]
    return stream.reshape(len(data), columns, bits) @ (1 << np.arange(bits))


def test_affine_groups_are_what_the_page_says(finished: Path) -> None:
    path = finished / "lowbit-block-00000.safetensors"
    decoded = dict(qtensors(finished))
    with safe_open(path, framework="np") as shard:
        held = json.loads(shard.metadata()["lowbit"])
        assert json.dumps(held, sort_keys=True, separators=(",", ":"), ensure_ascii=False) == shard.metadata()["lowbit"]
        for site, spec in held["specs"].items():
            assert (spec["node"], spec["static"]["block"]) == ("Affine", "group:32")
            leaves = {name: (columns, levels) for name, _, _, columns, levels in spec["leaves"]}
            out, width = spec["shape"]
            codes = unpack(shard.get_tensor(f"{site}.weight.codes"), *leaves["codes"])
            zeros = unpack(shard.get_tensor(f"{site}.weight.zero"), *leaves["zero"]).reshape(out, -1)
            scale = shard.get_tensor(f"{site}.weight.scale.data").astype(np.float32)
            values = (codes - np.repeat(zeros, 32, axis=1)[:, :width]) * np.repeat(scale, 32, axis=1)[:, :width]
            np.testing.assert_array_equal(values.astype(np.float32), decoded[site].decode().numpy())
            assert f"{site}.weight" not in shard.keys()  # noqa: SIM118


def test_every_file_and_field_stands_in_the_page(finished: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "checkpoint.md").read_text(encoding="utf-8")
    manifest = json.loads((finished / "lowbit.json").read_text())
    fields = set(manifest) - {"note"}  # what a caller adds
    assert all(f"`{field}`" in page for field in fields)
    for name in ("config.json", "lowbit.json", "model.safetensors.index.json", "lowbit-rest.safetensors"):
        assert f"`{name}`" in page
