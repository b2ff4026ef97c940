"""lowbit generate: text from a low-bit model, streamed."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from lowbit.cli.opened import KV, Kernels, MemoryLimit, described
from lowbit.cli.options import Dtype, Json, Seed, emit, quiet, say


def generate(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A native checkpoint, or any model.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to continue or answer.")],
    tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", min=1, help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    kv: KV = None,
    memory: MemoryLimit = None,
    draft: Annotated[
        int,
        typer.Option(
            "--draft",
            min=0,
            max=7,
            help="Guess so many tokens a pass from the text itself; greedy text stays the same.",
        ),
    ] = 0,
    cascade: Annotated[
        str | None,
        typer.Option(
            "--cascade",
            metavar="REF[,margin=0.2]",
            help="Greedy text; where OUT's first choice leads by less than the margin, the model REF decides.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate text; a chat template is applied when the model has one."""
    quiet()
    import torch
    from transformers import TextStreamer

    from lowbit.errors import RecipeError
    from lowbit.runtime.kvcache import KVCache
    from lowbit.study.stages import torch_dtype

    found = described(model, dtype, kernels, kv, memory)
    tokenizer, longest = found.tokenizer, found.longest
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )  # fmt: skip
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    given = inputs["input_ids"].shape[1]
    if given == 0 or (longest is not None and given + tokens > longest):
        raise RecipeError(
            "the prompt is empty" if given == 0
            else f"{given} tokens of prompt and {tokens} new ones, the model reads at most {longest}", where=model,
            fix="a prompt" if given == 0 else f"a shorter prompt, or -n {max(longest - given, 1)}",
        )  # fmt: skip
    loaded, _, rounding, _ = found.load(given + tokens)
    if draft and (temperature > 0 or rounding is not None):
        raise RecipeError(
            "--draft goes with greedy text and a cache in full", where=model,
            why="guesses that were wrong are taken out of the cache again", fix="--draft alone",
        )  # fmt: skip
    cache = None if rounding is None else KVCache(loaded.config, rounding)
    if cascade is not None:
        _cascade(cascade, loaded, tokenizer, inputs["input_ids"], tokens, dtype, kernels, cache, as_json,
                 plain=temperature == 0 and draft == 0 and memory is None)  # fmt: skip
        return
    torch.manual_seed(seed or 0)
    started = time.perf_counter()
    with torch.inference_mode():
        ids = loaded.generate(
            **inputs, past_key_values=cache, max_new_tokens=tokens,
            do_sample=temperature > 0, temperature=temperature or None, prompt_lookup_num_tokens=draft or None,
            streamer=None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )  # fmt: skip
    seconds = time.perf_counter() - started
    made = ids.shape[1] - given
    if as_json:
        text = tokenizer.decode(ids[0, given:], skip_special_tokens=True)
        emit({
            "text": text, "tokens": made, "seconds": seconds, "tokens_per_second": made / seconds,
            "kv": None if rounding is None else str(rounding), "kv_bytes": None if cache is None else cache.nbytes,
        })  # fmt: skip
    else:
        rate = f"{made / seconds:.1f} tokens/s, reading the prompt included"
        held = "" if cache is None else f", keys and values in {cache.nbytes / 1e6:.2f} MB of {rounding}"
        say(f"{made} tokens in {seconds:.1f} s ({rate}, {str(torch_dtype(dtype)).removeprefix('torch.')}{held})")


def _cascade(
    option: str, low: Any, tokenizer: Any, ids: Any, tokens: int, dtype: str, kernels: str, cache: Any, as_json: bool,
    *, plain: bool,
) -> None:  # fmt: skip
    """Write through the gate and say how much the reference decided."""
    import torch
    from transformers import TextStreamer

    from lowbit.cli.cascading import parse, write
    from lowbit.errors import RecipeError

    gate = parse(option)
    if not plain:
        raise RecipeError(
            "--cascade goes with greedy text, in memory and without a draft", where=option,
            why="the margin gates the most likely token, one at a time", fix="--cascade alone",
        )  # fmt: skip
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if not as_json:
        streamer.put(ids)

    def show(token: int) -> None:
        if not as_json:
            streamer.put(torch.tensor([token]))

    done = write(
        gate, low, ids[0].tolist(), tokens, dtype=dtype, kernels=kernels, cache=cache, say=say, on_token=show
    )  # fmt: skip
    made, about = len(done.tokens), done.to_json(gate)
    if as_json:
        text = tokenizer.decode([t.token for t in done.tokens], skip_special_tokens=True)
        emit({
            "text": text, "tokens": made, "seconds": done.seconds, "tokens_per_second": made / done.seconds,
            "kv": None if cache is None else str(cache.kv), "kv_bytes": None if cache is None else cache.nbytes,
            "cascade": about,
        })  # fmt: skip
        return
    streamer.end()
    own = "the whole text is what it writes alone"
    if about["first_change"] is not None:
        own = f"the first {about['first_change']} tokens are what it writes alone"
    say(
        f"{made} tokens in {done.seconds:.1f} s ({made / done.seconds:.1f} tokens/s); below a margin of {gate.margin:g}"
        f" {gate.reference} decided {about['escalated']:.1%} of them; it agrees with {about['kept']:.1%}, and {own}"
    )
