"""Lossless coding of weights, side by side: ours, zipnn and zstandard; sizes, speeds, and cold loads.

    python benchmarks/lossless.py --model DIR [--model DIR ...] [--gguf FILE] [--peers SITE_PACKAGES] [--mb 32]
    python benchmarks/lossless.py --load FILE --workers 1 2 4       # cold loads of one file only
    python benchmarks/lossless.py --make FILE --mb 2000             # such a file: Gaussian bfloat16 of a model's scales

Subjects: the model's own tensors, and made of them: float8_e4m3fn with a scale a row, int4-g128, nf4, int8 with one
scale a tensor and one a row. Every coder gets the same bytes; tensors one by one. Speeds are bytes of the original a
second of this process's processor time (one thread), the best of ``--repeats`` interleaved runs; a machine under load
makes them smaller. ``--peers`` is a folder with zipnn and zstandard, which are no dependencies of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lowbit.codec import coding
from lowbit.codec.checksum import crc32c
from lowbit.codec.container import Reader
from lowbit.formats.presets import preset
from lowbit.io.compress import compress
from lowbit.io.plain import open_plain


class Piece(NamedTuple):
    dtype: str
    data: np.ndarray


class Result(NamedTuple):
    subject: str
    coder: str
    ratio: float
    bits: float
    encode: float
    decode: float


def own(path: Path, most: int) -> list[Piece]:
    """Tensors of a file, as many as fit into ``most`` bytes."""
    pieces, total = [], 0
    with open_plain(path) as plain:
        for name, placed in plain.tensors.items():
            if total + placed.nbytes <= most or not pieces:
                pieces.append(Piece(placed.dtype, plain.read(name)))
                total += placed.nbytes
    return pieces


def matrices(root: Path, most: int) -> Iterator[torch.Tensor]:
    from safetensors import safe_open

    total = 0
    with safe_open(root / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if len(file.get_slice(name).get_shape()) == 2 and "proj" in name and total < most:
                tensor = file.get_tensor(name).float()
                total += tensor.numel()
                yield tensor


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().reshape(-1)


def fp8(w: torch.Tensor) -> list[Piece]:
    scale = w.abs().amax(1, keepdim=True) / 448
    return [Piece("F8_E4M3", as_bytes((w / scale).to(torch.float8_e4m3fn))), Piece("F32", as_bytes(scale))]


def int8(w: torch.Tensor, rows: bool) -> list[Piece]:
    scale = (w.abs().amax(1, keepdim=True) if rows else w.abs().max()) / 127
    return [Piece("I8", as_bytes((w / scale).round().to(torch.int8)))]


def low_bit(name: str) -> Callable[[torch.Tensor], list[Piece]]:
    fmt = preset(name)
    names = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8"}

    def pieces(w: torch.Tensor) -> list[Piece]:
        q = fmt.encode(w, fmt.fit(w))
        return [Piece(names[part.data.dtype], as_bytes(part.data)) for part in q.parts()]

    return pieces


class Coder(NamedTuple):
    name: str
    encode: Callable[[Piece], Any]
    decode: Callable[[Any], Any]
    size: Callable[[Any], int]
    takes: Callable[[Piece], bool]


def ours() -> Coder:
    def size(coded: Any) -> int:
        return coded.size if isinstance(coded, np.ndarray) else 160 + sum(blob.data.size for blob in coded[1])

    def decode(coded: Any) -> Any:
        return coded if isinstance(coded, np.ndarray) else coding.decode_tensor(*coded)

    def encode(piece: Piece) -> Any:
        coded = coding.encode_tensor(piece.data, piece.dtype)
        return piece.data if coded is None else coded

    return Coder("lowbit", encode, decode, size, lambda piece: True)


def peers(folder: str | None) -> list[Coder]:
    if folder is None:
        return []
    sys.path.append(folder)
    import zstandard
    from zipnn import ZipNN

    found = []
    for level in (1, 3):
        c, d = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        found.append(
            Coder(f"zstd -{level}", lambda p, c=c: c.compress(p.data.data), d.decompress, len, lambda piece: True)
        )
    for dtype, name in (("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")):
        z = ZipNN(input_format="byte", bytearray_dtype=name, threads=1)
        found.append(
            Coder(
                "zipnn", lambda p, z=z: z.compress(p.data.tobytes()), z.decompress, len, lambda p, d=dtype: p.dtype == d
            )
        )
    return found


def measure(subject: str, pieces: list[Piece], coders: list[Coder], weights: int, repeats: int) -> Iterator[Result]:
    dtypes = {p.dtype for p in pieces}
    total = sum(p.data.size for p in pieces)
    usable = [c for c in coders if all(c.takes(p) for p in pieces) or (c.name == "zipnn" and all(map(c.takes, pieces)))]
    coded: dict[str, list[Any]] = {}
    spent: dict[str, list[float]] = {}
    for coder in usable:
        started = time.process_time()
        coded[coder.name] = [coder.encode(piece) for piece in pieces]
        spent[coder.name] = [time.process_time() - started]
    best = {coder.name: float("inf") for coder in usable}
    for _ in range(repeats):  # interleaved: what slows one down slows the others too
        for coder in usable:
            started = time.process_time()
            decoded = [coder.decode(c) for c in coded[coder.name]]
            best[coder.name] = min(best[coder.name], time.process_time() - started)
    for coder in usable:
        for piece, back in zip(pieces, [coder.decode(c) for c in coded[coder.name]], strict=True):
            assert bytes(memoryview(back)) == piece.data.tobytes(), (coder.name, subject, dtypes)
        size = sum(coder.size(c) for c in coded[coder.name])
        yield Result(
            subject, coder.name, total / size, 8 * size / weights, total / spent[coder.name][0] / 1e9,
            total / best[coder.name] / 1e9,
        )  # fmt: skip
    del decoded


class Throttled:
    """A reader that never gives more than ``rate`` bytes a second, as a slow disk or network does."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def read(self, path: Path, nbytes: int) -> None:
        started = time.perf_counter()
        done = 0
        with path.open("rb", buffering=0) as file:
            while done < nbytes and (chunk := file.read(1 << 20)):
                done += len(chunk)
                time.sleep(max(0.0, done / self.rate - (time.perf_counter() - started)))


def break_even(pieces: list[Piece], rate: float, folder: Path) -> dict[str, float]:
    """Seconds to have the bytes of pieces, coded or not, from a throttled reader, without overlap of both."""
    coded = [coding.encode_tensor(p.data, p.dtype) for p in pieces]
    assert all(c is not None for c in coded)
    raw = sum(p.data.size for p in pieces)
    stored = sum(blob.data.size for c in coded if c for blob in c[1])
    (folder / "raw").write_bytes(bytes(raw))
    reader = Throttled(rate)
    started = time.perf_counter()
    reader.read(folder / "raw", raw)
    plain = time.perf_counter() - started
    started = time.perf_counter()
    reader.read(folder / "raw", stored)
    read = time.perf_counter() - started
    for c in coded:
        if c:
            coding.decode_tensor(*c)
    both = time.perf_counter() - started
    r = raw / stored
    return {
        "ratio": r, "plain_s": plain, "coded_s": both, "change_percent": 100 * (both / plain - 1),
        "decode_gb_s": raw / (both - read) / 1e9, "needed_gb_s": rate * r / (r - 1) / 1e9,
    }  # fmt: skip


def cold(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make(path: Path, nbytes: int) -> None:
    """A file of matrices whose rows differ in scale as a trained model's do; its exponents code alike."""
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)
    scale = 0.02 * torch.randn(4096, 1, generator=g).mul(0.3).exp()
    count = max(1, nbytes // (2 * 4096 * 4096))
    save_file({f"layer.{i}": (torch.randn(4096, 4096, generator=g) * scale).bfloat16() for i in range(count)}, path)


def load(path: Path, small: Path, repeats: int, workers: int = 2) -> dict[str, float]:
    """Cold file to tensors in memory: ours against safetensors, and both against the disk's own rate.

    ``small`` is the file compressed, made unless it is there.
    """
    from safetensors.torch import load as load_bytes

    if not small.exists():
        compress(path, small)
    times: dict[str, list[float]] = {"disk": [], "safetensors": [], "lowbit": []}
    for _ in range(repeats):
        cold(path)
        started = time.perf_counter()
        data = path.read_bytes()
        times["disk"].append(time.perf_counter() - started)
        del data
        cold(path)
        started = time.perf_counter()
        tensors = load_bytes(path.read_bytes())
        times["safetensors"].append(time.perf_counter() - started)
        del tensors
        cold(small)
        started = time.perf_counter()
        with Reader(small) as reader:
            found = dict(reader.read_all(workers=workers))
        times["lowbit"].append(time.perf_counter() - started)
        del found
    size = path.stat().st_size
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    ratio = size / small.stat().st_size
    disk = size / seconds["disk"]
    return {
        "workers": workers, "ratio": ratio, "disk_gb_s": disk / 1e9,
        "safetensors_gb_s": size / seconds["safetensors"] / 1e9, "lowbit_gb_s": size / seconds["lowbit"] / 1e9,
        "share_of_disk_times_ratio": size / seconds["lowbit"] / (disk * ratio),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--peers")
    parser.add_argument("--mb", type=int, default=32, help="bytes of each subject, in MB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--workers", type=int, nargs="*", default=[2])
    arguments = parser.parse_args()
    if arguments.make is not None:
        make(arguments.make, arguments.mb * 1_000_000)
    if arguments.load is not None:
        small = arguments.load.with_suffix(".coded.safetensors")
        for workers in arguments.workers:
            print(json.dumps(load(arguments.load, small, arguments.repeats, workers)), flush=True)
    if arguments.make is not None or arguments.load is not None:
        return
    torch.set_num_threads(1)
    most, coders = arguments.mb * 1_000_000, [ours(), *peers(arguments.peers)]
    results: list[Result] = []
    print("subject | coder | ratio | bits a weight | encode GB/s | decode GB/s\n--- | --- | ---: | ---: | ---: | ---:")

    def show(subject: str, pieces: list[Piece], weights: int) -> None:
        for r in measure(subject, pieces, coders, weights, arguments.repeats):
            results.append(r)
            print(
                f"{r.subject} | {r.coder} | {r.ratio:.3f} | {r.bits:.3f} | {r.encode:.3f} | {r.decode:.2f}", flush=True
            )

    tensorwise: list[Piece] = []
    rowwise: list[Piece] = []
    for root in arguments.model:
        pieces = own(root / "model.safetensors", most)
        show(f"{root.name} {pieces[0].dtype}", pieces, sum(p.data.size for p in pieces) // 2)
        weights = list(matrices(root, most // 2))
        n = sum(w.numel() for w in weights)
        tensorwise, rowwise = ([p for w in weights for p in int8(w, rows)] for rows in (False, True))
        show(f"{root.name} fp8 by row", [p for w in weights for p in fp8(w)], n)
        show(f"{root.name} int8 by tensor", tensorwise, n)
        show(f"{root.name} int8 by row", rowwise, n)
        for name in ("int4-g128", "nf4"):
            show(f"{root.name} {name}", [p for w in weights for p in low_bit(name)(w)], n)
    if arguments.gguf is not None:
        pieces = own(arguments.gguf, most)
        show(arguments.gguf.name, pieces, int(sum(p.data.size for p in pieces) / 5 * 8))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for root in arguments.model:
            found = load(root / "model.safetensors", folder / "coded.safetensors", arguments.repeats)
            print(f"load {root.name}: {json.dumps(found)}", flush=True)
            (folder / "coded.safetensors").unlink()
        if tensorwise:
            print(f"A3.4, 200 MB/s, int8 by tensor: {json.dumps(break_even(tensorwise, 200e6, folder))}", flush=True)
            print(f"A3.4, 2 GB/s, int8 by row: {json.dumps(break_even(rowwise, 2e9, folder))}", flush=True)
    probe = np.zeros(1 << 26, np.uint8)
    started = time.process_time()
    crc32c(probe)
    print(f"CRC-32C: {probe.size / (time.process_time() - started) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
