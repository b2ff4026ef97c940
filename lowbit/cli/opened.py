"""A model to run, from what a command was given: where it is, its tokenizer, and how its cache is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from lowbit.cli.options import say

if TYPE_CHECKING:
    from lowbit.formats.heads import CacheFormat

Kernels = Annotated[
    Literal["auto", "reference", "dense"],
    typer.Option("--kernels", help="dense decodes all weights once: faster, with the memory of the original."),
]
KV = Annotated[
    str | None,
    typer.Option("--kv", metavar="FORMAT", help="Keys and values in few bits (int4-head); default: as OUT says."),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Hold no more than this, Python included (512MiB); blocks beyond it are read at every token.",
    ),
]


class Opened(NamedTuple):
    """A ``PreTrainedModel`` and its tokenizer; ``kv`` None keeps keys and values as they are."""

    model: Any
    tokenizer: Any
    kv: CacheFormat | None
    longest: int | None
    """Tokens that the model reads at most, where its configuration says so."""


def opened(name: str, dtype: str, kernels: str, kv: str | None, memory: str | None, tokens: int) -> Opened:
    """Load a native checkpoint, or any model, for texts of ``tokens``, or as many as it reads if that is less.

    Raises RecipeError for options that mean nothing here, ModelError and CheckpointError.
    """
    from transformers import AutoConfig, AutoTokenizer

    from lowbit.errors import ModelError, RecipeError
    from lowbit.formats.heads import CacheFormat
    from lowbit.io import native
    from lowbit.models.resolve import locate
    from lowbit.pipeline.allocate import size
    from lowbit.runtime.facade import cache_format, load
    from lowbit.study.stages import dense_model, torch_dtype

    asked = None if kv is None else CacheFormat.parse(kv)
    limit = None if memory is None else size(memory)
    path = locate(name, say)
    kind = torch_dtype(dtype)
    if limit is not None and not native.is_native(path):
        raise RecipeError("--memory is of low-bit checkpoints", where=name, fix="lowbit quantize it first")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"its tokenizer or configuration cannot be read: {error}", where=str(path)) from error
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = tokens if longest is None else min(tokens, longest)
    if native.is_native(path):
        model = load(path, dtype=kind, kernels=kernels, memory=limit, tokens=tokens)
    else:
        model = dense_model(path, dtype)
    return Opened(model, tokenizer, asked or cache_format(model), longest)
