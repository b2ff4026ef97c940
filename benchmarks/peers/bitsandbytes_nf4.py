"""nf4 by bitsandbytes: every linear but lm_head, blocks of 64, with or without double quantization of the scales.

    python bitsandbytes_nf4.py --model DIR --out DIR

Scales stay in float32, as bitsandbytes keeps them (4.5 bits a weight; ``--double``: 4.127). Writes the dequantised
model in float32 to ``--out``, with ``peer.json`` (settings, cost, versions).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peer import Meter, save_dense, write_report

whole = Meter()  # imports are part of what a user waits for

import bitsandbytes.functional as bnb  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face directory")
    parser.add_argument("--out", type=Path, required=True, help="directory for the dequantised model")
    parser.add_argument("--double", action="store_true", help="quantize the scales too")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, local_files_only=True)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    done = {}
    stage = Meter()
    for name, module in linears.items():
        codes, state = bnb.quantize_4bit(
            module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=args.double
        )
        done[f"{name}.weight"] = bnb.dequantize_4bit(codes, state)
    quantize = stage.read()
    save_dense(args.model, args.out, done)
    write_report(
        args.out,
        ["bitsandbytes", "torch", "transformers"],
        {
            "peer": "bitsandbytes",
            "method": "nf4, double quantization" if args.double else "nf4",
            "bits": 4,
            "group": 64,
            "linears": len(done),
            "quantize": quantize._asdict(),
            "whole": whole.read()._asdict(),
        },
    )


if __name__ == "__main__":
    main()
