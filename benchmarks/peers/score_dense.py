"""Score dense Hugging Face directories on a text with plain transformers: an oracle that shares no code with lowbit.

Protocol (printed with every result): the whole file is tokenised once and unsplit, with whatever special tokens the
tokenizer itself adds (``special_tokens_added`` says how many); the ids are cut into consecutive non-overlapping windows
of ``--window``; the first ``--windows`` of them are scored, each on its own, with its first token as context only. The
forward and the softmax run in float32 whatever the files hold, so a bfloat16 directory shows what its cast weights cost
and nothing else.

Figures, all means over windows x (window - 1) positions: ``ppl`` = exp of the mean negative log-likelihood in nats;
``kl`` = KL(reference || candidate) in nats over the whole vocabulary; ``top1`` = share of positions whose
argmax agrees. ``kl_window`` and ``nll_window`` keep one mean a window, for paired comparisons.

    python score_dense.py --model REFERENCE --text FILE --out DIR CANDIDATE [CANDIDATE ...]

Cost: one forward a model and window; memory: every model in float32 plus 4 logit matrices (window x vocabulary x 4 B).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

Model = torch.nn.Module


def load(path: Path) -> Model:
    """A dense causal model in float32, ready to score."""
    model: Model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval()


def log_probs(model: Model, window: torch.Tensor) -> torch.Tensor:
    """``(window,)`` token ids -> ``(window - 1, vocabulary)`` log-probabilities of every next token."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def digest(directory: Path) -> str:
    """sha256 of the weight files' bytes, in the order of their names."""
    h = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as f:
            while chunk := f.read(1 << 22):
                h.update(chunk)
    return h.hexdigest()


@torch.inference_mode()
def score(reference: Model, candidates: Sequence[Model], windows: torch.Tensor) -> list[dict[str, object]]:
    """The figures of every candidate on ``(n, window)`` ids; the reference runs once a window."""
    nll: list[list[float]] = [[] for _ in candidates]
    kl: list[list[float]] = [[] for _ in candidates]
    same = [0] * len(candidates)
    for window in windows:
        p = log_probs(reference, window)
        for i, candidate in enumerate(candidates):
            q = p if candidate is reference else log_probs(candidate, window)
            nll[i].append(float(-q.gather(1, window[1:, None]).mean(dtype=torch.float64)))
            # summed in float64: the terms of a KL near 0 cancel, and 49k of them in float32 leave dust of 1e-6
            kl[i].append(float((p.exp() * (p - q)).sum(-1, dtype=torch.float64).mean()))
            same[i] += int((p.argmax(-1) == q.argmax(-1)).sum())
    positions = windows.shape[0] * (windows.shape[1] - 1)
    return [
        {
            "ppl": math.exp(sum(nll[i]) / len(windows)),
            "kl": sum(kl[i]) / len(windows),
            "top1": same[i] / positions,
            "nll_window": nll[i],
            "kl_window": kl[i],
        }
        for i in range(len(candidates))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", type=Path, nargs="*", help="dense directories to compare with the reference")
    parser.add_argument("--model", type=Path, required=True, help="reference directory; also gives the tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score")
    parser.add_argument("--out", type=Path, required=True, help="folder for one NAME.score.json a candidate")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    text = args.text.read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False)["input_ids"]
    bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < args.windows * args.window:
        parser.error(
            f"{args.text.name} has {len(ids)} tokens; {args.windows} windows need {args.windows * args.window}"
        )
    windows = torch.tensor(ids[: args.windows * args.window]).view(args.windows, args.window)
    protocol = {
        "text_sha256": hashlib.sha256(args.text.read_bytes()).hexdigest(),
        "text_tokens": len(ids),
        "special_tokens_added": len(ids) - len(bare),
        "ids_sha256": hashlib.sha256(windows.numpy().astype("<i4").tobytes()).hexdigest(),
        "windows": args.windows,
        "window": args.window,
        "positions": args.windows * (args.window - 1),
        "first_token_scored": False,
        "forward": "float32, eager loop, one window a batch",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    paths = [args.model, *args.candidates]
    models = [load(path) for path in paths]
    args.out.mkdir(parents=True, exist_ok=True)
    for path, result in zip(paths, score(models[0], models, windows), strict=True):
        named = {"candidate": path.name, "weights_sha256": digest(path), "reference": args.model.name}
        report = named | result | protocol
        (args.out / f"{path.name}.score.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({k: v for k, v in report.items() if not k.endswith("_window")}), flush=True)


if __name__ == "__main__":
    main()
