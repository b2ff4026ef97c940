"""4-bit codes by bitsandbytes on the CPU, as a fixture for a bit-for-bit parity check of nf4 and fp4.

    python bitsandbytes_codes.py --out FILE.safetensors

For every case and quant type the file holds, under ``CASE.TYPE.``:

``codes``              uint8, shape of the weight, one 4-bit code an element (packed bytes hold the high nibble first)
``absmax``             float32, one a block of 64 elements of the flattened weight (rows do not start a block)
``dequantized``        float32, the weight as bitsandbytes decodes it
``nested.absmax``      uint8 codes of ``absmax - offset``, blocks of 256 with the signed dynamic 8-bit map
``nested.scale``       float32, absmax of every nested block
``nested.offset``      float32 scalar, the mean of ``absmax``
``nested.dequantized`` float32, the weight decoded with the nested scales

``CASE.weight`` is the input, ``TYPE.table`` the 16 values and ``nested.table`` the 256 values that bitsandbytes states.
The metadata's ``about`` is JSON with its version, the seeds, and ``table_products_exact``: whether table x absmax, in
float32, is exactly what it decodes to.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import NamedTuple

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

BLOCK = 64


class Case(NamedTuple):
    """A weight ``0.02 * randn(shape)`` from ``torch.Generator().manual_seed(seed)``."""

    name: str
    shape: tuple[int, int]
    seed: int


CASES = (
    Case("plain", (64, 128), 0),
    Case("three_blocks_a_row", (48, 192), 1),
    Case("two_nested_blocks", (80, 320), 2),  # 400 scales: one nested block of 256 and a ragged one of 144
    Case("straddling_and_ragged", (33, 70), 3),  # blocks cross rows; the last holds 6 elements
    Case("hard", (16, 128), 4),  # a block of zeros, an outlier, and every midpoint between neighbouring values
)


def weight_of(case: Case) -> torch.Tensor:
    """The ``(out, in)`` float32 input of a case."""
    w = 0.02 * torch.randn(case.shape, generator=torch.Generator().manual_seed(case.seed))
    if case.name == "hard":
        w[0, :BLOCK] = 0
        w[1, 3] = 25.0
        for row, kind in ((2, "nf4"), (3, "fp4")):
            table = bnb.get_4bit_type(kind, device="cpu").sort().values.unique()
            ties = (table[1:] + table[:-1]) / 2
            w[row, :BLOCK] = 1.0  # absmax 1, so that the ties stay ties after scaling
            w[row, : len(ties)] = ties
    return w


def unpack(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """One code an element from two a byte, high nibble first."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[: shape[0] * shape[1]].reshape(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)

    tensors: dict[str, torch.Tensor] = {}
    exact: dict[str, bool] = {}
    for case in CASES:
        weight = tensors[f"{case.name}.weight"] = weight_of(case)
        for kind in ("nf4", "fp4"):
            packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
            nested_packed, nested = bnb.quantize_4bit(
                weight, blocksize=BLOCK, quant_type=kind, compress_statistics=True
            )
            if not torch.equal(packed, nested_packed):
                raise ValueError(f"{case.name} {kind}: codes depend on compress_statistics; the fixture assumes not")
            codes = unpack(packed, case.shape)
            decoded = bnb.dequantize_4bit(packed, state)
            block_of = torch.arange(weight.numel()) // BLOCK
            product = (state.code[codes.reshape(-1).long()] * state.absmax[block_of]).reshape(case.shape)
            exact[f"{case.name}.{kind}"] = torch.equal(product, decoded)
            tensors |= {f"{kind}.table": state.code, "nested.table": nested.state2.code}
            tensors |= {
                f"{case.name}.{kind}.{part}": value
                for part, value in {
                    "codes": codes,
                    "absmax": state.absmax,
                    "dequantized": decoded,
                    "nested.absmax": nested.absmax,
                    "nested.scale": nested.state2.absmax,
                    "nested.offset": nested.offset,
                    "nested.dequantized": bnb.dequantize_4bit(nested_packed, nested),
                }.items()
            }
    about = {
        "bitsandbytes": importlib.metadata.version("bitsandbytes"),
        "torch": torch.__version__,
        "device": "cpu",
        "blocksize": BLOCK,
        "nested_blocksize": 256,
        "cases": [case._asdict() for case in CASES],
        "table_products_exact": exact,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # one metadata key: safetensors writes several in a random order, and the file should have one digest
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, args.out, metadata={"about": json.dumps(about)})
    print(json.dumps(about))


if __name__ == "__main__":
    main()
