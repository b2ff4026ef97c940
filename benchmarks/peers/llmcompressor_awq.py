"""AWQ by llm-compressor: channel scales folded into norms and neighbours, then round to nearest; lm_head left out.

Its settings are its own defaults except where an argument says otherwise: 20 exponents a mapping, scales of activations
and weights (``duo_scaling``), each exponent judged by the output of the whole parent module. It clips nothing.
``--observer`` chooses how the ranges of the rounding are found: ``memoryless_minmax`` (default) or ``memoryless_mse``.

    python llmcompressor_awq.py --model DIR --text FILE --out DIR --bits 4

Writes the model in float32 to ``--out``: dequantised linears, and the norms that scales went into; with ``peer.json``
(settings, cost, versions).
"""

from __future__ import annotations

import hashlib

from peer import Meter, calibration_windows, most_levels, parser, save_dense, write_report

whole = Meter()  # imports are part of what a user waits for

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: E402
from llmcompressor.pipelines.cache import IntermediatesCache  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--observer", default="memoryless_minmax")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if not torch.accelerator.is_available():
        # 0.14.0.1 pins the memory of cached activations even where no device would read it, and fails; no value changes
        IntermediatesCache.pin_memory = lambda *_: None

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    windows = calibration_windows(tokenizer, args.text, args.samples, args.length)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, local_files_only=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scheme = QuantizationArgs(
        num_bits=args.bits,
        type="int",
        symmetric=False,
        strategy="group",
        group_size=args.group,
        observer=args.observer,
    )
    awq = AWQModifier()
    rounding = QuantizationModifier(
        config_groups={"linears": QuantizationScheme(targets=["Linear"], weights=scheme)}, ignore=["lm_head"]
    )
    batches = [{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in windows]
    stage = Meter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        recipe=[awq, rounding],
        num_calibration_samples=args.samples,
        max_seq_length=args.length,
    )
    quantize = stage.read()

    linears = {
        f"{name}.weight": fake_quantize(
            module.weight, module.weight_scale, module.weight_zero_point, module.quantization_scheme.weights
        ).detach()
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    levels = max(most_levels(weight, args.group) for weight in linears.values())
    if levels > 2**args.bits:
        raise ValueError(f"a group of {args.group} holds {levels} values, more than {args.bits} bits can tell apart")
    after = dict(model.named_parameters())
    folded = {n: after[n] for n, value in before.items() if n not in linears and not torch.equal(after[n], value)}
    save_dense(args.model, args.out, linears | folded)
    write_report(
        args.out,
        ["llmcompressor", "compressed-tensors", "torch", "transformers"],
        {
            "peer": "llmcompressor",
            "method": "awq",
            "bits": args.bits,
            "group": args.group,
            "symmetric": False,
            "observer": args.observer,
            "duo_scaling": awq.duo_scaling,
            "n_grid": awq.n_grid,
            "mappings": [f"{mapping.smooth_layer} -> {', '.join(mapping.balance_layers)}" for mapping in awq.mappings],
            "linears": len(linears),
            "folded": len(folded),
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
