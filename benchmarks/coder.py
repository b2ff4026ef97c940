"""The entropy coder beside its peers: size over the order-0 entropy, and decoding speed per processor second.

    python benchmarks/coder.py [--large 268435456]

Codes are rounded Gaussians of several entropies, drawn independently, so that the order-0 entropy is the least size
any coder can reach. All coders run in one process, one after the other for each array, on the same codes as bytes; a
time is the median of repeated runs, in processor seconds of all threads (ours has one). Peers that are not installed
are named and left out: constriction, zstandard, pcodec, zipnn. ``--large`` adds an array beyond every cache, for our
coder alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from lowbit import _native
from lowbit.codec import stream

Codes = NDArray[np.int8]
ENTROPIES = (2.0, 2.5, 3.0, 3.6, 4.3)


def gaussian(entropy: float, shape: tuple[int, int], seed: int = 0) -> Codes:
    """Rounded Gaussians whose step gives this entropy in bits."""
    k = np.arange(-127, 128)
    low, high = 0.05, 30.0
    for _ in range(60):
        sigma = (low * high) ** 0.5
        p = np.diff(norm.cdf(np.append(k - 0.5, k[-1] + 0.5) / sigma))
        low, high = (sigma, high) if -(p[p > 0] * np.log2(p[p > 0])).sum() < entropy else (low, sigma)
    rng = np.random.default_rng(seed)
    rows = (np.round(rng.standard_normal(shape[1], dtype=np.float32) * sigma) for _ in range(shape[0]))
    return np.stack([row.astype(np.int8) for row in rows])


def order0(codes: Codes) -> float:
    """Bits a code of the empirical distribution."""
    p = np.bincount(codes.ravel().view(np.uint8), minlength=256) / codes.size
    return float(-(p[p > 0] * np.log2(p[p > 0])).sum())


def seconds(run: Callable[[], object], least: float = 0.15) -> float:
    """Median processor time of a run, after one that is not counted."""
    run()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < least and len(times) < 500):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def ours(codes: Codes) -> Iterator[tuple[str, int, float]]:
    blob = stream.encode(torch.from_numpy(codes.astype(np.int16)))
    out = np.empty_like(codes)
    for isa in _native.isas():
        os.environ["LOWBIT_ISA"] = isa
        spent = seconds(lambda: _native.decode_int8(blob.numpy(), 0, out, 1))
        if not np.array_equal(out, codes):
            raise SystemExit(f"{isa} decodes something else")
        yield f"lowbit {isa}", blob.numel(), spent
    del os.environ["LOWBIT_ISA"]


def with_constriction(codes: Codes) -> Iterator[tuple[str, int, float]]:
    import constriction

    flat = codes.ravel().astype(np.int32)
    low = int(flat.min())
    counts = np.bincount(flat - low).astype(np.float32)
    model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
    ans = constriction.stream.stack.AnsCoder()
    ans.encode_reverse(flat - low, model)
    words = ans.get_compressed()
    yield (
        "constriction ANS",
        words.nbytes,
        seconds(lambda: constriction.stream.stack.AnsCoder(words).decode(model, flat.size)),
    )


def with_zstandard(codes: Codes) -> Iterator[tuple[str, int, float]]:
    import zstandard

    for level in (1, 3, 19):
        blob = zstandard.ZstdCompressor(level=level).compress(codes.tobytes())
        yield f"zstandard -{level}", len(blob), seconds(partial(zstandard.ZstdDecompressor().decompress, blob))


def with_pcodec(codes: Codes) -> Iterator[tuple[str, int, float]]:
    from pcodec import ChunkConfig, standalone

    blob = standalone.simple_compress(codes.ravel().astype(np.int16), ChunkConfig())
    out = np.empty(codes.size, np.int16)
    yield "pcodec", len(blob), seconds(lambda: standalone.simple_decompress_into(blob, out))


def with_zipnn(codes: Codes) -> Iterator[tuple[str, int, float]]:
    import zipnn

    coder = zipnn.ZipNN(input_format="byte", bytearray_dtype="float8_e4m3fn")  # its way to code single bytes
    blob = coder.compress(bytearray(codes.tobytes()))
    yield "zipnn", len(blob), seconds(lambda: coder.decompress(bytearray(blob)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", type=int, default=0, help="codes of the array beyond caches")
    large = parser.parse_args().large
    torch.set_num_threads(1)
    print("| entropy | codes | coder | bits | over entropy | Gsymbols/s |\n| ---: | ---: | --- | ---: | ---: | ---: |")
    for count in (1_000_000, large):
        for entropy in ENTROPIES if count else ():
            codes = gaussian(entropy, (count // 4096, 4096))
            bound = order0(codes)
            coders = (ours, with_constriction, with_zstandard, with_pcodec, with_zipnn)
            for coder in coders if count == 1_000_000 else (ours,):
                try:
                    for name, size, spent in coder(codes):
                        bits = 8 * size / codes.size
                        rate = codes.size / spent / 1e9
                        over = 100 * (bits / bound - 1)
                        row = f"{bound:.3f} | {codes.size:.1e} | {name} | {bits:.3f} | {over:.2f} % | {rate:.3f}"
                        print(f"| {row} |", flush=True)
                except ImportError as missing:
                    print(f"| | | {missing.name} | not installed | | |")


if __name__ == "__main__":
    main()
