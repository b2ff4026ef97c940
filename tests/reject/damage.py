"""Coded files that someone damaged, or made up: small ones, and ways to make another of them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lowbit.codec.checksum import crc32c
from lowbit.codec.header import CODED, CODED_CRC, REST, signed
from lowbit.io.compress import compress

W, V, SMALL = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def make(folder: Path) -> Path:
    """A coded file of three tensors; the first two are coded, in extents of their own."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(64, 256, generator=generator).bfloat16() for name in (W, V)}
    save_file({**tensors, SMALL: torch.ones(8)}, folder / "plain.safetensors", metadata={"format": "pt"})
    out = folder / "coded.safetensors"
    compress(folder / "plain.safetensors", out)
    return out


class Parts:
    """The parts of a coded file, to be changed and put together again with checksums that agree."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        self.table: dict[str, Any] = json.loads(data[8 : 8 + length])
        self.metadata: dict[str, str] = self.table.pop("__metadata__")
        self.coded: dict[str, Any] = json.loads(self.metadata[CODED])
        self.data = bytearray(data[8 + length :])

    def of(self, name: str) -> dict[str, Any]:
        """What ``lowbit.coded`` says of a tensor."""
        found: dict[str, Any] = self.coded["tensors"][name]
        return found

    def bytes_of(self, name: str) -> slice:
        begin, end = self.table[name]["data_offsets"]
        return slice(begin, end)

    def sign(self, name: str) -> None:
        """Give a tensor the checksum of the bytes that it has now."""
        crc = crc32c(bytes(self.data[self.bytes_of(name)]))
        if name == REST:
            self.coded["rest"][1] = crc
        else:
            self.of(name)["crc"] = crc

    def rest(self) -> bytes:
        return zlib.decompress(bytes(self.data[self.bytes_of(REST)]))

    def write(self, path: Path, coded: str | None = None) -> None:
        text = json.dumps(self.coded) if coded is None else coded
        metadata = {**self.metadata, CODED: text, CODED_CRC: "00000000"}
        header = json.dumps({"__metadata__": metadata, **self.table}, separators=(",", ":")).encode()
        header = signed(header.ljust(-(-(8 + len(header)) // 4096) * 4096 - 8))
        path.write_bytes(len(header).to_bytes(8, "little") + header + self.data)


Change = Callable[[Parts], object]


def noise(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, n).astype(np.uint8)
