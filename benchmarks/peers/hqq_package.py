"""HQQ by its own package: codes, scales and zero points of every linear but lm_head; no text is needed.

Every setting is the package's own default for its width (at 4 bits the first zero point is rounded), groups along the
inputs (``--axis 1``: what its kernels want) or along the outputs (``--axis 0``). Scales and zero points are rounded to
float16, as it keeps them.

    python hqq_package.py --model DIR --out DIR --bits 3

Writes the dequantised model in float32 to ``--out``, with ``peer.json`` (settings, cost, versions).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peer import Meter, save_dense, write_report

whole = Meter()  # imports are part of what a user waits for

import torch  # noqa: E402
from hqq.core.quantize import BaseQuantizeConfig, Quantizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def rounded(weight: torch.Tensor, settings: dict[str, object]) -> torch.Tensor:
    """The float32 matrix that the package's codes stand for."""
    codes, meta = Quantizer.quantize(weight, device="cpu", compute_dtype=torch.float32, **settings)
    meta |= {name: meta[name].half().float() for name in ("scale", "zero")}
    return Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face directory")
    parser.add_argument("--out", type=Path, required=True, help="directory for the dequantised model")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--axis", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, local_files_only=True)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    settings = BaseQuantizeConfig(nbits=args.bits, group_size=args.group, axis=args.axis)["weight_quant_params"]
    stage = Meter()
    done = {f"{name}.weight": rounded(module.weight.data, settings) for name, module in linears.items()}
    quantize = stage.read()
    save_dense(args.model, args.out, done)
    write_report(
        args.out,
        ["hqq", "torch", "transformers"],
        {
            "peer": "hqq",
            "method": "hqq",
            "bits": args.bits,
            "group": args.group,
            "settings": settings,
            "linears": len(done),
            "quantize": quantize._asdict(),
            "whole": whole.read()._asdict(),
        },
    )


if __name__ == "__main__":
    main()
