"""lowbit's own result of a recipe in the same form as the peers': the float32 matrices that its codes stand for.

    python lowbit_dense.py --model DIR --text FILE --out DIR gptq:int3-g64

The checkpoint is written, and read back from its files. Norms that a recipe changed (AWQ's scales go into them) are
written as the checkpoint holds them, in 16 bit; all else comes from the original. Recipes that change more (a rotated
stream, say) are refused. Writes ``peer.json`` (recipe, bits, cost, versions).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from peer import Meter, save_dense, write_report

whole = Meter()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import lowbit  # noqa: E402
from lowbit.models.resolve import open_model  # noqa: E402
from lowbit.pipeline.recipe import parse, with_calibration  # noqa: E402
from lowbit.runtime.linear import QLinear  # noqa: E402
from lowbit.study.stages import make  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face directory")
    parser.add_argument("--text", default="pydoc", help="calibration text")
    parser.add_argument("--out", type=Path, required=True, help="directory for the dequantised model")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    source = open_model(str(args.model))
    recipe = with_calibration(parse(args.recipe), text=args.text, samples=args.samples, length=args.length)
    # the first windows of the text, as peers take them
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"seed": None})})
    with tempfile.TemporaryDirectory() as folder:
        stage = Meter()
        made = make(source, recipe, Path(folder) / "out", torch.float32, lambda *_: None)
        quantize = stage.read()
        model = lowbit.load(Path(folder) / "out", dtype=torch.float32)
        done = {f"{n}.weight": m.weight.qtensor().decode() for n, m in model.named_modules() if isinstance(m, QLinear)}
        original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, local_files_only=True)
        own = dict(original.named_parameters())
        # checkpoints keep what is not quantized in 16 bit: what differs by no more than that is the original's
        folded = {
            name: value.detach()
            for name, value in model.named_parameters()
            if name in own and not torch.allclose(value, own[name], rtol=2**-8, atol=1e-30)
        }
        if others := sorted(name for name in folded if "norm" not in name):
            raise ValueError(f"{args.recipe} changes {others[0]} too, so that its linears mean nothing alone")
    save_dense(args.model, args.out, done | folded)
    write_report(
        args.out,
        ["lowbit", "torch", "transformers"],
        {
            "peer": "lowbit",
            "method": args.recipe,
            "bits_per_weight": made["bits_per_weight"],
            "linears": len(done),
            "folded": len(folded),
            "calibration": {"samples": args.samples, "length": args.length, "text": Path(args.text).name},
            "quantize": quantize._asdict(),
            "whole": whole.read()._asdict(),
        },
    )


if __name__ == "__main__":
    main()
