"""GPTQ by llm-compressor: integer codes, groups of columns with a scale and a zero point, every linear but lm_head.

Its settings are its own defaults except where an argument says otherwise. ``actorder`` "static" is its recommended
mode: columns are visited by descending Hessian diagonal, groups and scales stay where they were (dynamic groups were
removed upstream). Dampening 0.01, blocks of 128 columns; the inputs of a layer saw the preceding layers quantized.
``--observer`` chooses how scales are found: ``memoryless_minmax`` is the default, ``memoryless_mse`` a grid search.

    python llmcompressor_gptq.py --model DIR --text FILE --out DIR --bits 3

Writes the dequantised model in float32 to ``--out``, with ``peer.json`` (settings, cost, versions).
"""

from __future__ import annotations

import hashlib

from peer import Meter, calibration_windows, most_levels, parser, save_dense, write_report

whole = Meter()  # imports are part of what a user waits for

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--observer", default="memoryless_minmax")
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    windows = calibration_windows(tokenizer, args.text, args.samples, args.length)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, local_files_only=True)
    scheme = QuantizationArgs(
        num_bits=args.bits,
        type="int",
        symmetric=False,
        strategy="group",
        group_size=args.group,
        observer=args.observer,
    )
    modifier = GPTQModifier(
        config_groups={"linears": QuantizationScheme(targets=["Linear"], weights=scheme)}, ignore=["lm_head"]
    )
    batches = [{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in windows]
    stage = Meter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        recipe=modifier,
        num_calibration_samples=args.samples,
        max_seq_length=args.length,
    )
    quantize = stage.read()

    done = {
        name: module.weight
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    levels = max(most_levels(weight, args.group) for weight in done.values())
    if levels > 2**args.bits:
        raise ValueError(f"a group of {args.group} holds {levels} values, more than {args.bits} bits can tell apart")
    save_dense(args.model, args.out, {f"{name}.weight": weight for name, weight in done.items()})
    write_report(
        args.out,
        ["llmcompressor", "compressed-tensors", "torch", "transformers"],
        {
            "peer": "llmcompressor",
            "method": "gptq",
            "bits": args.bits,
            "group": args.group,
            "symmetric": False,
            "actorder": modifier.resolved_config.config_groups["linears"].weights.actorder.value,
            "observer": args.observer,
            "dampening": modifier.dampening_frac,
            "linears": len(done),
            "most_levels_in_a_group": levels,
            "calibration": {
                "samples": args.samples,
                "length": args.length,
                "text_sha256": hashlib.sha256(args.text.read_bytes()).hexdigest(),
                "ids_sha256": hashlib.sha256(windows.numpy().astype("<i4").tobytes()).hexdigest(),
            },
            "quantize": quantize._asdict(),
            "whole": whole.read()._asdict(),
        },
    )


if __name__ == "__main__":
    main()
