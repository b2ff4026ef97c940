"""Learned rounding by auto-round: signed gradient descent on rounding and clipping, block by block; lm_head left out.

Asymmetric integer codes in groups, ``--iters`` steps a block (200 is its default; 50 costs a quarter), everything else
its own default, which includes bfloat16 autocasting of the block forwards.

    python autoround.py --model DIR --text FILE --out DIR --bits 3

Writes the dequantised model in float32 to ``--out``, with ``peer.json`` (settings, cost, versions, and the dtype in
which the peer left its weights: bfloat16 there means that they carry its rounding).
"""

from __future__ import annotations

import hashlib

from peer import Meter, calibration_windows, most_levels, parser, save_dense, write_report

whole = Meter()  # imports are part of what a user waits for

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--iters", type=int, default=50)
    options.add_argument("--device", default="cpu")
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    windows = calibration_windows(tokenizer, args.text, args.samples, args.length)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, local_files_only=True)
    names = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    stage = Meter()
    tuned, _ = AutoRound(
        model,
        tokenizer=tokenizer,
        bits=args.bits,
        group_size=args.group,
        sym=False,
        iters=args.iters,
        dataset=[window[None] for window in windows],
        nsamples=args.samples,
        seqlen=args.length,
        device_map=args.device,
        enable_torch_compile=False,
        seed=0,
    ).quantize()
    quantize = stage.read()

    done = {name: weight.detach() for name, weight in tuned.state_dict().items() if name in names}
    if missing := names - done.keys():
        raise ValueError(f"{len(missing)} linears are gone from the result, first {min(missing)}")
    levels = max(most_levels(weight, args.group) for weight in done.values())
    if levels > 2**args.bits:
        raise ValueError(f"a group of {args.group} holds {levels} values, more than {args.bits} bits can tell apart")
    save_dense(args.model, args.out, done)
    write_report(
        args.out,
        ["auto-round", "torch", "transformers"],
        {
            "peer": "auto-round",
            "method": f"signround, {args.iters} iterations",
            "bits": args.bits,
            "group": args.group,
            "symmetric": False,
            "linears": len(done),
            "most_levels_in_a_group": levels,
            "weight_dtypes": sorted({str(weight.dtype) for weight in done.values()}),
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
