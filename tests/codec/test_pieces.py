"""Tensors decoded piece by piece, by several threads, and into memory that is used again: the same bytes as ever."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowbit.codec import coding, stream
from lowbit.codec.coding import Blob
from lowbit.codec.container import Reader
from lowbit.codec.fields import LAYOUTS, Part
from lowbit.errors import CheckpointError
from lowbit.io.compress import compress

SEGMENT = 1 << 17
IN_ORDER = [name for name, layout in LAYOUTS.items() if layout.into is not None]


def gaussian(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", IN_ORDER)
def test_pieces_are_what_fields_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole pieces and a ragged one, of every codec that a field may have."""
    chosen, records = LAYOUTS[name], 2 * SEGMENT + 5000
    words = (gaussian(records * chosen.width) * 9).round().to(torch.int8).view(torch.uint8).numpy()
    words[:: chosen.width] = np.array([3, 90, 200], np.uint8)[words[:: chosen.width] % 3]  # few and far apart
    fields = chosen.split(words)
    blobs = [coding.encode(field, part) for field, part in zip(fields, chosen.parts, strict=True)]
    calls = []
    decode_rows = stream.decode_rows

    def noted(blob: torch.Tensor, first: int, out: torch.Tensor, threads: int) -> None:
        calls.append(first)
        decode_rows(blob, first, out, threads)

    monkeypatch.setattr(stream, "decode_rows", noted)
    monkeypatch.setattr(coding, "PIECE", SEGMENT)
    for threads in (1, 2):
        np.testing.assert_array_equal(coding.decode_tensor(chosen, blobs, threads), words)
    assert set(calls) == {0, 22, 44}  # rows of 4096 where segments begin


def test_every_codec_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 whose four fields are stored in four ways, and one of whose streams has segments beyond a piece."""
    monkeypatch.setattr(coding, "PIECE", SEGMENT)
    chosen, count = LAYOUTS["fp32"], 3 * SEGMENT - 7
    narrow = (gaussian(count) * 3).round().clamp(-20, 20).add(100).to(torch.uint8).numpy()
    far = np.array([1, 130, 250], np.uint8)[np.random.default_rng(0).choice(3, count, p=[0.8, 0.15, 0.05])]
    noise = np.random.default_rng(1).integers(0, 256, count).astype(np.uint8)
    fields = [narrow, far, np.full(count, 77, np.uint8), noise]
    blobs = [coding.encode(field, part) for field, part in zip(fields, chosen.parts, strict=True)]
    assert [blob.codec for blob in blobs] == ["tans", "ranked", "constant", "raw"]
    expected = chosen.join(fields)
    np.testing.assert_array_equal(coding.decode_tensor(chosen, blobs), expected)

    rows, columns = coding.geometry(count)
    padded = np.pad(narrow, (0, rows * columns - count)).astype(np.int16).reshape(rows, columns)
    long = stream.encode(torch.from_numpy(padded), segment=2 * SEGMENT)
    assert (stream.segment_rows(torch.from_numpy(blobs[0].data)), stream.segment_rows(long)) == (24, 48)
    again = [Blob("tans", long.numpy(), count), *blobs[1:]]
    np.testing.assert_array_equal(coding.decode_tensor(chosen, again), expected)


def test_codes_that_tables_allow_but_bytes_do_not_hold_are_looked_at() -> None:
    """A stream of codes from 0 to 255 whose low bits are kept raw: its table reaches beyond."""
    codes = (gaussian(5000).abs() * 80).clamp(0, 255).to(torch.uint8)
    codes[0] = 255
    blob = stream.encode(torch.nn.functional.pad(codes, (0, 8192 - 5000)).view(2, 4096).to(torch.int16))
    assert not stream.fits(blob, torch.int8)
    found = coding.decode(Blob("tans", blob.numpy(), 5000), Part("codes", 1, 8))
    np.testing.assert_array_equal(found, codes.numpy())


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Coded tensors of rising and falling sizes, one of noise between them."""
    sizes = [3000, 9000, 200, 6000, 9000, 100, 4000, 9000, 5000]
    tensors = {f"t{i}": gaussian(8 * size, seed=i).bfloat16() for i, size in enumerate(sizes)}
    tensors["t5"] = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 9000).astype(np.uint8))
    save_file(tensors, tmp_path / "plain.safetensors")
    compress(tmp_path / "plain.safetensors", tmp_path / "coded.safetensors")
    return tmp_path / "coded.safetensors", tensors


@pytest.mark.parametrize("workers", [1, 3])
def test_memory_that_is_used_again_holds_nothing_that_was_given(
    file: tuple[Path, dict[str, torch.Tensor]], workers: int
) -> None:
    path, tensors = file
    with Reader(path) as reader:
        found = dict(reader.read_all(workers=workers))  # all of them held
        assert list(found) == reader.keys()
        assert {entry.layout for entry in reader.entries.values()} >= {None, "bf16"}
        for name, data in found.items():
            np.testing.assert_array_equal(data, tensors[name].view(torch.uint8).numpy(), err_msg=name)
        assert len(list(itertools.islice(reader.read_all(workers=workers), 2))) == 2  # who stops early is let go


def test_what_was_altered_is_named_whoever_reads_it(file: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = file
    with Reader(path) as reader:
        entry, begin = reader.entries["t3"], reader.begin
    content = bytearray(path.read_bytes())
    content[begin + entry.end - 3] ^= 1
    path.write_bytes(content)
    with Reader(path) as reader, pytest.raises(CheckpointError, match=r"checksum.*|t3") as caught:
        dict(reader.read_all())
    assert "t3" in str(caught.value)
