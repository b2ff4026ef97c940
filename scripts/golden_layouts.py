"""Write tests/golden/gptq.safetensors and awq.safetensors: small matrices, and what files hold of them.

Every bit is placed by the rules of docs/reference/layouts-gptq-awq.md, one by one, without lowbit: what the tests
compare with must not come from what they test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

OUT, IN, GROUP = 32, 64, 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def in_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """The rows of ``codes`` as streams of bits, lowest first, cut into words."""
    words = np.zeros((len(codes), codes.shape[1] * bits // 32), dtype=np.uint32)
    for row, values in enumerate(codes):
        for j, value in enumerate(values):
            for b in range(bits):
                word, at = divmod(j * bits + b, 32)
                words[row, word] |= np.uint32((int(value) >> b & 1) << at)
    return words.view(np.int32)


def gptq(bits: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    codes = rng.integers(0, 1 << bits, (OUT, IN), dtype=np.uint8)
    zeros = rng.integers(1, 1 << bits, (OUT, IN // GROUP), dtype=np.uint8)
    scales = rng.uniform(0.01, 1, zeros.shape).astype(np.float16)
    held = {
        "codes": codes, "zeros": zeros, "qweight": np.ascontiguousarray(in_words(codes, bits).T),
        "qzeros": in_words(zeros.T - 1, bits), "qzeros_v2": in_words(zeros.T, bits),
        "scales": np.ascontiguousarray(scales.T), "g_idx": (np.arange(IN) // GROUP).astype(np.int32),
    }  # fmt: skip
    return {f"{bits}.{name}": value for name, value in held.items()}


def awq(rng: np.random.Generator) -> dict[str, np.ndarray]:
    codes = rng.integers(0, 16, (OUT, IN), dtype=np.uint8)
    zeros = rng.integers(0, 16, (OUT, IN // GROUP), dtype=np.uint8)
    scales = rng.uniform(0.01, 1, zeros.shape).astype(np.float16)
    nibbles = [8 * (i // 8) + AWQ_ORDER[i % 8] for i in range(OUT)]
    return {
        "codes": codes, "zeros": zeros, "qweight": in_words(codes.T[:, nibbles], 4),
        "qzeros": in_words(zeros.T[:, nibbles], 4), "scales": np.ascontiguousarray(scales.T),
    }  # fmt: skip


def main() -> None:
    rng = np.random.default_rng(0)
    folder = Path(__file__).parents[1] / "tests" / "golden"
    tensors: dict[str, np.ndarray] = {}
    for bits in (2, 3, 4, 8):
        tensors |= gptq(bits, rng)
    save_file(tensors, folder / "gptq.safetensors")
    save_file(awq(rng), folder / "awq.safetensors")


if __name__ == "__main__":
    main()
