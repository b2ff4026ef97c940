"""lowbit generate: text from a low-bit model, streamed."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import typer

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
    kernels: Annotated[
        Literal["auto", "reference", "dense"],
        typer.Option("--kernels", help="dense decodes all weights once: faster, with the memory of the original."),
    ] = "auto",
    kv: Annotated[
        str | None,
        typer.Option("--kv", metavar="FORMAT", help="Keys and values in few bits (int4-head); default: as OUT says."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Hold no more than this, Python included (512MiB); blocks beyond it are read at every token.",
        ),
    ] = None,
    draft: Annotated[
        int,
        typer.Option(
            "--draft",
            min=0,
            max=7,
            help="Guess so many tokens a pass from the text itself; greedy text stays the same.",
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Generate text; a chat template is applied when the model has one."""
    quiet()
    import torch
    from transformers import AutoTokenizer, TextStreamer

    from lowbit.errors import ModelError, RecipeError
    from lowbit.formats.heads import CacheFormat
    from lowbit.io import native
    from lowbit.models.resolve import locate
    from lowbit.pipeline.allocate import size as parse_size
    from lowbit.runtime.facade import cache_format, load
    from lowbit.runtime.kvcache import KVCache
    from lowbit.study.stages import dense_model, torch_dtype

    asked = None if kv is None else CacheFormat.parse(kv)
    limit = None if memory is None else parse_size(memory)
    path = locate(model, say)
    kind = torch_dtype(dtype)
    if limit is not None and not native.is_native(path):
        raise RecipeError("--memory is of low-bit checkpoints", where=model, fix="lowbit quantize it first")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer cannot be read: {error}", where=str(path)) from error
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )  # fmt: skip
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    given = inputs["input_ids"].shape[1]
    loaded: Any
    if native.is_native(path):
        loaded = load(path, dtype=kind, kernels=kernels, memory=limit, tokens=given + tokens)
    else:
        loaded = dense_model(path, dtype)
    longest = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if given == 0 or (longest is not None and given + tokens > longest):
        raise RecipeError(
            "the prompt is empty" if given == 0
            else f"{given} tokens of prompt and {tokens} new ones, the model reads at most {longest}", where=model,
            fix="a prompt" if given == 0 else f"a shorter prompt, or -n {max(longest - given, 1)}",
        )  # fmt: skip
    rounding = asked or cache_format(loaded)
    if draft and (temperature > 0 or rounding is not None):
        raise RecipeError(
            "--draft goes with greedy text and a cache in full", where=model,
            why="guesses that were wrong are taken out of the cache again", fix="--draft alone",
        )  # fmt: skip
    cache = None if rounding is None else KVCache(loaded.config, rounding)
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
        say(f"{made} tokens in {seconds:.1f} s ({rate}, {str(kind).removeprefix('torch.')}{held})")
